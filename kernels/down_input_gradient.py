"""The gradients of x and h0 through the down-projections ``t = drop(x~) A^T``, from u, the gradient of each t.

    dx~ = drop'(u A)        dx = sum of (1 - lambda) dx~        dh0 = sum of lambda dx~

The sums are over siblings (q, k, v) that share x and h0; each is taken in registers and written once. The gradient of
lambda is taken in the rank space, elsewhere. Called by ``sibo_triton.ops``.

Compiled once for all ranks, dtypes, what each sibling does and what is wanted; whatever M, and K but for what divides
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import targets
from .autotune import tuned
from .checks import check_dropout, check_dtype, check_low_rank, check_matrix, check_one_value
from .dropout import column_hashes, keep_from_and_scale, keep_hashed, row_hashes, seed_keys
from .launching import BoundedCache, Launch, tensor_key, value_argument, value_key
from .precision import Operands, float32_is_exact, operands, split_dot
from .siblings import DownGradients
from .targets import Target, cdiv, rank_block


@triton.jit(do_not_specialize=["M"])
def down_input_gradient_kernel(
    p_dx,  # [M, K], contiguous, or None
    p_dh,  # likewise
    p_base,  # [M, K], or None: what dx is added to
    p_u,  # tuples from here, with one element for each sibling: [M, r], contiguous
    p_lora_a,  # [r, K]
    p_seed,  # int64, [1], or None
    lambda_,  # numbers, or pointers to one
    keep_from,  # these two from dropout.keep_from_and_scale
    dropout_scale,
    stride_a_r,
    stride_a_k,
    M,  # numbers again
    K,
    stride_base_m,
    stride_base_k,
    R: tl.constexpr,  # the ranks, a tuple: so that each loop's bound is constant
    STEPS: tl.constexpr,  # tiles of rows to a program: constant, as every loop's bound
    SIBLINGS: tl.constexpr,
    KEEPS_TILES: tl.constexpr,  # of A, where the rank is one tile: loaded once for all rows of a program
    MIXES: tl.constexpr,  # tuples, these four
    LAMBDA_IS_TENSOR: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    OWN_SUM: tl.constexpr,  # a sibling's own sum, to be masked or shared out to dx and dh0; else all add to one
    HAS_DX: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_DH: tl.constexpr,
    SPLIT_U: tl.constexpr,
    SPLIT_A: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    k_tiles = tl.cdiv(K, BK)
    i_strip = (tl.program_id(0) // k_tiles).to(tl.int64)  # neighbours share rows of u, which then come from the cache
    i_k = tl.program_id(0) % k_tiles
    o_k = i_k * BK + tl.arange(0, BK)  # [BK]
    o_k64 = o_k.to(tl.int64)
    m_k = o_k < K

    # What a strip's tiles have in common, of all siblings in turn: above all the hashes of the columns.
    lambdas, tiles, hashes = (), (), ()
    for i in tl.static_range(SIBLINGS):
        if not MIXES[i]:
            lambdas = lambdas + (0.0,)
        elif LAMBDA_IS_TENSOR[i]:
            lambdas = lambdas + (tl.load(lambda_[i]).to(tl.float32),)
        else:
            lambdas = lambdas + (lambda_[i],)
        if KEEPS_TILES and R[i] <= BR:
            o_r = tl.arange(0, BR)  # [BR]
            b_p_a = p_lora_a[i] + o_r.to(tl.int64)[:, None] * stride_a_r[i] + o_k64[None, :] * stride_a_k[i]
            tiles = tiles + (tl.load(b_p_a, mask=(o_r < R[i])[:, None] & m_k[None, :], other=0.0),)  # [BR, BK]
        else:
            tiles = tiles + (0,)
        if HAS_DROPOUT[i]:
            row_key1, row_key2, col_key1, col_key2 = seed_keys(p_seed[i])
            col1, col2 = column_hashes(o_k, col_key1, col_key2)
            hashes = hashes + ((row_key1, row_key2, col1, col2),)
        else:
            hashes = hashes + ((0, 0, 0, 0),)

    for i_step in range(STEPS):
        first_row = (i_strip * STEPS + i_step) * BM
        o_m = first_row + tl.arange(0, BM)  # [BM]
        m_m = o_m < M
        m_g = m_m[:, None] & m_k[None, :]  # [BM, BK]
        b_dx = tl.zeros([BM, BK], dtype=tl.float32)  # [BM, BK]
        b_dh = tl.zeros([BM, BK], dtype=tl.float32)  # [BM, BK]
        for i in tl.static_range(SIBLINGS):
            # Numbers go onto u, where they can, and not onto the sum, which is larger.
            b_scale = 1.0 if HAS_DH else 1.0 - lambdas[i]
            if HAS_DROPOUT[i]:
                b_scale *= dropout_scale[i]
            b_g = tl.zeros([BM, BK], dtype=tl.float32) if OWN_SUM[i] else b_dx  # [BM, BK]
            for i_r in range(tl.cdiv(R[i], BR)):
                o_r = i_r * BR + tl.arange(0, BR)  # [BR]
                m_r = o_r < R[i]
                b_p_u = p_u[i] + o_m[:, None] * R[i] + o_r[None, :]
                b_p_a = p_lora_a[i] + o_r.to(tl.int64)[:, None] * stride_a_r[i] + o_k64[None, :] * stride_a_k[i]
                b_u = tl.load(b_p_u, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
                if KEEPS_TILES and R[i] <= BR:
                    b_a = tiles[i]  # [BR, BK]
                else:
                    b_a = tl.load(b_p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BR, BK]
                if MIXES[i] or HAS_DROPOUT[i]:
                    b_u *= b_scale
                b_g = split_dot(b_u, b_a, b_g, SPLIT_U, SPLIT_A, DOT_DTYPE)
            if HAS_DROPOUT[i]:
                row_key1, row_key2, col1, col2 = hashes[i]
                row1, row2 = row_hashes(first_row, tl.arange(0, BM), row_key1, row_key2)
                b_g *= keep_hashed(row1, row2, col1, col2, o_k, keep_from[i]).to(tl.float32)
            if not OWN_SUM[i]:
                b_dx = b_g
            elif HAS_DH:
                b_dx += (1.0 - lambdas[i]) * b_g
                if MIXES[i]:
                    b_dh += lambdas[i] * b_g
            else:
                b_dx += b_g

        if HAS_DX:
            if HAS_BASE:
                b_p_base = p_base + o_m[:, None] * stride_base_m + o_k64[None, :] * stride_base_k
                b_dx += tl.load(b_p_base, mask=m_g, other=0.0).to(tl.float32)
            tl.store(p_dx + o_m[:, None] * K + o_k64[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_g)
        if HAS_DH:
            b_p_dh = p_dh + o_m[:, None] * K + o_k64[None, :]
            tl.store(b_p_dh, b_dh.to(p_dh.dtype.element_ty), mask=m_g)


@dataclass(frozen=True)
class Plan:
    """How a launch multiplies, and its tiles."""

    operands: Operands
    config: dict[str, int]  # BM, BK, BR, num_warps, num_stages
    programs: int = 4  # with dropout about so many at least for each multiprocessor, where there is work for them


@lru_cache(maxsize=1024)
def plan(
    ranks: tuple[int, ...],
    lora_a_dtype: torch.dtype,
    output_dtypes: frozenset[torch.dtype],
    sums: int,
    target: Target,
    exact: bool = True,
    drops: bool = False,
) -> Plan:
    """The plan of a launch; ``sums``: [BM, BK] tiles that a program adds; ``exact``: float32 is multiplied so."""
    throughout = output_dtypes | {lora_a_dtype} == {torch.float32}
    product = operands(lora_a_dtype, lora_a_dtype, throughout and exact)  # u counts as A's dtype
    BR = rank_block(max(ranks))
    if product.dtype == torch.float32:
        # Multiplied without tensor cores, and so that operands pass through registers.
        BM = 32 if (len(ranks) > 1 or drops and target.capability == 80) and not target.hip else 64
        config = {"BM": BM, "BK": 64, "BR": 16, "num_warps": 4, "num_stages": 2}
        if target.capability == 100 and len(ranks) > 1:
            # Of three the operands of two stages spill, and of wider tiles one or the other number of warps.
            config |= {"BK": 32, "num_stages": 1} if len(ranks) > 2 else {"num_warps": 8}
        elif target.capability == 80 and len(ranks) > 2 and max(ranks) <= 16:
            config["num_warps"] = 8
        return Plan(product, config)
    split = product.split_a or product.split_b
    # On AMD's GPUs, whose warps are wider, 4 spill only at rank 128, with operands in parts.
    num_warps = 8 if (split and BR > 16 if target.hip else sums > 1) else 4
    # Tensor cores that multiply from registers, which the sums of three siblings' own tiles would overflow.
    crowded = target.capability in (80, 120) and len(ranks) > 2 and sums > 1 and BR == 64 and not split
    BM, BK = 32 if crowded else 64, 128
    if target.capability == 80 and split and BR > 16 and len(ranks) == 1:
        num_warps = 8  # of a number lambda 4 spill
    if drops:
        # Smaller, as the hashes of the columns take registers too. Measured on an H100: twice as fast with 4 warps as
        # with 8, of which half multiply what the others do.
        BM, BK, num_warps = 64, 64, 4
        if target.capability == 90:
            BK = 32 if len(ranks) > 2 and BR > 16 else 64
        elif target.capability == 100:
            num_warps = 8
        elif not target.hip:
            BM = 32
            BK = 32 if target.capability == 80 and len(ranks) > 2 and split and 32 < max(ranks) <= 64 else 64
    config = {"BM": BM, "BK": BK, "BR": min(BR, 32 if split else 64), "num_warps": num_warps, "num_stages": 2}
    return Plan(product, config)


def down_input_gradient(
    siblings: Sequence[DownGradients],
    *,
    dtype: torch.dtype | None = None,
    base: Tensor | None = None,  # [M, K]
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # [M, K], [M, K]
    """``dx = sum of (1 - lambda) dx~`` and ``dh0 = sum of lambda dx~``, where ``dx~ = drop'(u A)``; either or both.

    One launch for all siblings, and one rounding of the sum. With A in 16 bits, u is rounded to A's dtype; unless the
    siblings' A differ in dtype: then all count as float32. With A in float32 and a result in 16 bits, the product
    before its last rounding is within 1e-5 (norm-wise) of float32's, by ``precision.split_dot``.

    Args:
        siblings: u, the gradient of t, float32, ``[M, r]``, contiguous; A, ``[r, K]``, float16, bfloat16 or float32,
            with any strides; lambda, a number in [0, 1], or a floating point tensor with one element on the device of
            u; dropout and its seed. Any ranks. One or more.
        dtype: of dx; None: not wanted.
        base: what dx is added to, before it is rounded: the gradient of another path. Any of these dtypes, any strides;
            only read. Or None.
        residual_dtype: of dh0; None: not wanted.

    Returns:
        dx and dh0, contiguous, each None if not wanted.

    Raises:
        TypeError: a dtype that the kernel does not take.
        ValueError: a shape that does not fit, u not contiguous, the seed missing, a rate of dropout
            outside [0, 1), or dh0 wanted where nothing mixes.
    """
    device = siblings[0].u.device
    key = (
        tuple(
            (tensor_key(of.u), tensor_key(of.lora_a), value_key(of.lambda_), of.dropout_p, tensor_key(of.dropout_seed))
            for of in siblings
        ),
        dtype,
        residual_dtype,
        tensor_key(base),
        device,
        targets.target_of(device),
        float32_is_exact(),
    )

    def run(prepared: Prepared) -> tuple[Tensor | None, Tensor | None]:
        dx = None if dtype is None else torch.empty(prepared.shape, dtype=dtype, device=device)
        dh = None if residual_dtype is None else torch.empty(prepared.shape, dtype=residual_dtype, device=device)
        if prepared.launch is None:
            if dx is not None:
                dx = dx.zero_() if base is None else dx.copy_(base)
            return dx, None if dh is None else dh.zero_()
        sharing = siblings if prepared.sharing is None else [siblings[i] for i in prepared.sharing]
        prepared.launch(
            p_dx=dx,
            p_dh=dh,
            p_base=None if dx is None else base,
            p_u=tuple([of.u for of in sharing]),
            p_lora_a=tuple([of.lora_a for of in sharing]),
            p_seed=tuple([of.dropout_seed if of.dropout_p else None for of in sharing]),
            lambda_=tuple([value_argument(of.lambda_) for of in sharing]),
        )
        return dx, dh

    prepared = _launches.get(key)
    if prepared is None:
        prepared = _launches.keep(key, _prepared(run, siblings, dtype, base, residual_dtype))
    return run(prepared)


_launches = BoundedCache()


class Prepared(NamedTuple):
    """A launch, what it writes, and which siblings it is for."""

    shape: tuple[int, int]  # of dx and dh0
    launch: Launch | None  # none where nothing has a share
    sharing: list[int] | None  # those with a share in something wanted; None: all


def _prepared(
    run: Callable[[Prepared], object],
    siblings: Sequence[DownGradients],
    dtype: torch.dtype | None,
    base: Tensor | None,
    residual_dtype: torch.dtype | None,
) -> Prepared:
    """The launch for such arguments, checked and planned."""
    M, K = shape = _checked_sizes(siblings)
    if residual_dtype is not None and not any(sibling.mixes for sibling in siblings):
        raise ValueError("residual_dtype asks for the gradient of h0, but lambda_ is the number 0: it has none")
    if base is not None:
        check_matrix("base", base, M, K, "u and lora_a")
    written = [wanted for wanted in (dtype, residual_dtype) if wanted is not None]
    for wanted in written:
        check_dtype("the gradient", wanted)
    sharing = [i for i, of in enumerate(siblings) if of.u.shape[1] and (dtype is not None or of.mixes)]
    if M == 0 or K == 0 or not written or not sharing:
        return Prepared(shape, None, None)
    siblings, everyone = [siblings[i] for i in sharing], len(sharing) == len(siblings)
    device = siblings[0].u.device
    has_base = base is not None and dtype is not None
    ranks = tuple(sibling.u.shape[1] for sibling in siblings)
    mixes = tuple(sibling.mixes for sibling in siblings)
    drops = tuple(sibling.dropout_p > 0 for sibling in siblings)
    dtypes = {sibling.lora_a.dtype for sibling in siblings}
    lora_a_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    wants_dh = residual_dtype is not None
    own_sum = tuple(of_drops or (wants_dh and of_mixes) for of_drops, of_mixes in zip(drops, mixes, strict=True))
    sums = 1 if len(siblings) == 1 else len(written) + any(own_sum)
    chosen = plan(
        ranks, lora_a_dtype, frozenset(written), sums, targets.target_of(device), float32_is_exact(), any(drops)
    )
    product = chosen.operands
    rates = [keep_from_and_scale(sibling.dropout_p) for sibling in siblings]

    def prepare(config: dict[str, int]) -> Prepared:
        k_tiles, m_tiles = cdiv(K, config["BK"]), cdiv(M, config["BM"])
        steps = 1
        if any(drops):  # whose columns are then hashed once for several tiles of rows; a power of two
            programs = chosen.programs * targets.target_of(device).multiprocessors
            steps = 1 << max(0, (m_tiles * k_tiles // programs).bit_length() - 1)
        grid = (cdiv(m_tiles, steps) * k_tiles,)
        arguments = {
            "keep_from": tuple(keep_from for keep_from, _ in rates),
            "dropout_scale": tuple(scale for _, scale in rates),
            "stride_a_r": tuple(sibling.lora_a.stride(0) for sibling in siblings),
            "stride_a_k": tuple(sibling.lora_a.stride(1) for sibling in siblings),
            "M": M,
            "K": K,
            "stride_base_m": base.stride(0) if has_base else 0,
            "stride_base_k": base.stride(1) if has_base else 0,
            "R": ranks,
            "STEPS": steps,
            "SIBLINGS": len(siblings),
            "KEEPS_TILES": len(siblings) <= 2,  # three siblings' would overflow registers
            "MIXES": mixes,
            "LAMBDA_IS_TENSOR": tuple(isinstance(sibling.lambda_, Tensor) for sibling in siblings),
            "HAS_DROPOUT": drops,
            "OWN_SUM": own_sum,
            "HAS_DX": dtype is not None,
            "HAS_BASE": has_base,
            "HAS_DH": wants_dh,
            "SPLIT_U": product.split_a,
            "SPLIT_A": product.split_b,
            "DOT_DTYPE": product.tl_dtype,
            **config,
        }
        launch = Launch(down_input_gradient_kernel, grid, device, arguments)
        return Prepared(shape, launch, None if everyone else sharing)

    key = ("input gradient", M.bit_length(), K, ranks, lora_a_dtype, frozenset(written), dtype is None, not wants_dh)
    key += (product, mixes, drops, has_base, device)
    return prepare(tuned(key, chosen.config, lambda config: run(prepare(config)), "BM"))


def _checked_sizes(siblings: Sequence[DownGradients]) -> tuple[int, int]:
    """M and K, which are all siblings'."""
    M, K = "M", "K"
    for sibling in siblings:
        check_low_rank("u", sibling.u)
        check_matrix("u", sibling.u, M, "r", "the other siblings'")
        check_one_value("lambda_", sibling.lambda_)
        check_dropout(sibling.dropout_p, sibling.dropout_seed)
        check_matrix("lora_a", sibling.lora_a, sibling.u.shape[1], K, "u")
        M, K = sibling.u.shape[0], sibling.lora_a.shape[1]
    return M, K

"""The gradient of A through the down-projection ``t = drop(x~) A^T``, from u, the gradient of t: ``dA = u^T drop(x~)``.

One pass over x and h0. No atomics: dA is summed over parts of the rows, and the parts in a second stage, always in the
same order. Called by ``sibo_triton.ops``.

Compiled once for every K, dtypes, rank's tile and plan; whatever M, but for the length of the parts, a power of two.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import targets
from .autotune import tuned
from .checks import check_dropout, check_dtype, check_low_rank, check_matrix, check_mix
from .dropout import drawn, keep_tile, row_hashes, seed_keys
from .partial_sums import sum_parts
from .precision import Operands, float32_is_exact, operands, split_dot
from .targets import Target, cdiv

#: About how many programs compute dA, for each multiprocessor.
PROGRAMS = 4


@triton.jit(do_not_specialize=["M"])
def down_weight_gradient_kernel(
    p_u,  # [M, r], contiguous
    p_x,  # [M, K]
    p_initial_residual,  # [M, K], or None
    p_seed,  # int64, [1], or None
    p_partial,  # [parts, r, K], contiguous
    lambda_,  # a number, or a pointer to one
    keep_from,
    scale,
    M,
    r,
    stride_x_m,
    stride_x_k,
    stride_h_m,
    stride_h_k,
    K: tl.constexpr,
    STEPS: tl.constexpr,  # tiles of rows to a part: constant, as every loop's bound
    HAS_INITIAL_RESIDUAL: tl.constexpr,
    LAMBDA_IS_TENSOR: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MIX_FIRST: tl.constexpr,  # mix the tiles and not the accumulators
    SPLIT_X: tl.constexpr,  # of x, or of the mixed tile
    SPLIT_U: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    SPLIT_H: tl.constexpr,  # of the product of h0 and u
    SPLIT_U_H: tl.constexpr,
    DOT_DTYPE_H: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    r_tiles = tl.cdiv(r, BR)
    i_r = tl.program_id(0) % r_tiles  # neighbouring programs share a tile of x, which then comes from the cache
    i_k = tl.program_id(0) // r_tiles % tl.cdiv(K, BK)
    i_part = tl.program_id(0) // r_tiles // tl.cdiv(K, BK)
    o_m = i_part.to(tl.int64) * (STEPS * BM) + tl.arange(0, BM)  # [BM]
    o_k = i_k * BK + tl.arange(0, BK)  # [BK]
    o_r = i_r * BR + tl.arange(0, BR)  # [BR]
    m_k = o_k < K
    m_r = o_r < r

    # int64 throughout: a row times its stride passes 2^31 in long batches.
    o_k64 = o_k.to(tl.int64)
    b_p_u = p_u + o_m[:, None] * r + o_r[None, :]  # [BM, BR]
    b_p_x = p_x + o_m[:, None] * stride_x_m + o_k64[None, :] * stride_x_k  # [BM, BK]
    step_u = tl.cast(BM, tl.int64) * r
    step_x = tl.cast(BM, tl.int64) * stride_x_m
    if HAS_INITIAL_RESIDUAL:
        b_p_h = p_initial_residual + o_m[:, None] * stride_h_m + o_k64[None, :] * stride_h_k  # [BM, BK]
        step_h = tl.cast(BM, tl.int64) * stride_h_m
        if LAMBDA_IS_TENSOR:
            b_lambda = tl.load(lambda_).to(tl.float32)
        else:
            b_lambda = lambda_
    if HAS_DROPOUT:
        row_key1, row_key2, col_key1, col_key2 = seed_keys(p_seed)

    # Transposed: the side of K, which is long, is then the one of which Hopper's tensor cores want 64.
    b_da = tl.zeros([BK, BR], dtype=tl.float32)  # [BK, BR]
    b_da_h = tl.zeros([BK, BR], dtype=tl.float32)  # [BK, BR], the part of h0
    for _ in range(STEPS):
        m_m = o_m < M
        if K % BK == 0:
            m_x = m_m[:, None]
        else:
            m_x = m_m[:, None] & m_k[None, :]
        b_u = tl.load(b_p_u, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        b_x = tl.load(b_p_x, mask=m_x, other=0.0)  # [BM, BK]
        if HAS_DROPOUT:
            row1, row2 = row_hashes(o_m, row_key1, row_key2)
            b_keep = keep_tile(row1, row2, col_key1, col_key2, o_k, keep_from)  # [BM, BK]
        if HAS_INITIAL_RESIDUAL:
            b_h = tl.load(b_p_h, mask=m_x, other=0.0)  # [BM, BK]
            if MIX_FIRST:
                b_x = (1.0 - b_lambda) * b_x.to(tl.float32) + b_lambda * b_h.to(tl.float32)
            else:
                if HAS_DROPOUT:
                    b_h = _drop(b_h, b_keep, SPLIT_H, DOT_DTYPE_H)
                b_da_h = split_dot(tl.trans(b_h), b_u, b_da_h, SPLIT_H, SPLIT_U_H, DOT_DTYPE_H)
            b_p_h += step_h
        if HAS_DROPOUT:
            b_x = _drop(b_x, b_keep, SPLIT_X, DOT_DTYPE)
        b_da = split_dot(tl.trans(b_x), b_u, b_da, SPLIT_X, SPLIT_U, DOT_DTYPE)
        o_m += BM
        b_p_u += step_u
        b_p_x += step_x
    if HAS_INITIAL_RESIDUAL and not MIX_FIRST:
        b_da = (1.0 - b_lambda) * b_da + b_lambda * b_da_h
    if HAS_DROPOUT:
        b_da *= scale

    b_p_partial = p_partial + (i_part.to(tl.int64) * r + o_r[None, :]) * K + o_k64[:, None]  # [BK, BR]
    tl.store(b_p_partial, b_da, mask=m_k[:, None] & m_r[None, :])


@triton.jit
def _drop(b, b_keep, SPLIT: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """Times 0 or 1, in a dtype that holds b and that the interpreter multiplies: NaN under the mask stays NaN."""
    if SPLIT:
        return b.to(tl.float32) * b_keep.to(tl.float32)
    else:
        return b.to(DOT_DTYPE) * b_keep.to(DOT_DTYPE)


@dataclass(frozen=True)
class Plan:
    """How a launch multiplies, and its tiles."""

    mix_first: bool
    product: Operands  # of x, or of the mixed tile, and u
    product_h: Operands  # of h0 and u
    config: dict[str, int]  # BM, BK, BR, num_warps, num_stages


@lru_cache(maxsize=1024)
def plan(
    rank: int,
    x_dtype: torch.dtype,
    h0_dtype: torch.dtype | None,
    adapter_dtype: torch.dtype,
    target: Target,
    exact: bool = True,
) -> Plan:
    """The plan of a launch; ``h0_dtype`` is None where nothing mixes; ``exact``: float32 is multiplied as float32."""
    mixes = h0_dtype is not None
    dtypes = {x_dtype, adapter_dtype} | ({h0_dtype} if mixes else set())
    throughout = dtypes == {torch.float32}
    exact = exact and throughout
    # Where the second product would cost more than mixing the tiles, and where nothing is lost by mixing them first.
    mix_first = mixes and (throughout or rank > 64)
    product = operands(x_dtype if len(dtypes) == 1 or not mix_first else torch.float32, adapter_dtype, exact)
    product_h = operands(h0_dtype, adapter_dtype, exact) if mixes and not mix_first else product

    BR = max(16, triton.next_power_of_2(rank))  # 16: the least that a dot takes
    if product.dtype == torch.float32:
        # Multiplied without tensor cores, and so that operands pass through registers: larger tiles spill.
        BM, BR = 16, min(BR, 64)
        num_warps = 8 if BR == 64 and target.capability in (80, 100) else 4  # there 4 warps spill
    elif any(of.split_a or of.split_b for of in (product, product_h)):
        BM, BR, num_warps = 32, min(BR, 64), 4 if BR <= 32 else 8
        if target.capability == 120 and BR == 64 and product.split_a and product.split_b:
            BM, num_warps = 16, 4  # the parts of more rows would overflow registers
    elif BR <= 32:
        BM, num_warps = 64, 4
    else:
        BM, BR, num_warps = 32, min(BR, 128), 4
    BK = 64
    bytes_of_stage = BM * (BK * (x_dtype.itemsize + (h0_dtype.itemsize if mixes else 0)) + 4 * BR)
    num_stages = target.stages(3, bytes_of_stage, programs=2)
    config = {"BM": BM, "BK": BK, "BR": BR, "num_warps": num_warps, "num_stages": num_stages}
    return Plan(mix_first, product, product_h, config)


@lru_cache(maxsize=1024)
def cut(M: int, K: int, r: int, BM: int, BK: int, BR: int, multiprocessors: int) -> tuple[int, int, int]:
    """Tiles of dA, parts of each, and the tiles of rows in a part: a power of two."""
    tiles = cdiv(K, BK) * cdiv(r, BR)
    m_tiles = cdiv(M, BM)
    steps = 1 << max(0, (m_tiles * tiles // (PROGRAMS * multiprocessors)).bit_length() - 1)
    return tiles, cdiv(m_tiles, steps), steps


def down_weight_gradient(
    u: Tensor,  # [M, r]
    x: Tensor,  # [M, K]
    initial_residual: Tensor | None = None,  # [M, K]
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,  # [1]
    *,
    adapter_dtype: torch.dtype,
) -> Tensor:  # [r, K]
    """``dA = u^T drop((1 - lambda) x + lambda h0)``, in float32 whatever the inputs' dtypes.

    Where x, h0 and the adapter have one 16-bit dtype, u is rounded to it, and above rank 64 so is the mix; where dtypes
    meet, the products are within 1e-5 (norm-wise) of float32's, by ``precision.split_dot``.

    Args:
        u: the gradient of t, float32, ``[M, r]``, contiguous.
        x: ``[M, K]``, float16, bfloat16 or float32, with any strides.
        initial_residual: h0, likewise, of the shape of x. Not read when ``lambda_`` is the number 0, and may then be
            None.
        lambda_: a number in [0, 1], or a floating point tensor with one element on the device of x.
        dropout_p: the probability of dropping an element, in [0, 1).
        dropout_seed: int64, one element, on the device of x; needed, and read, when ``dropout_p`` is not 0.
        adapter_dtype: of A.

    Returns:
        dA, float32, ``[r, K]``, contiguous. The same bits for the same arguments on the same kind of GPU.

    Raises:
        TypeError: a dtype that the kernel does not take.
        ValueError: a shape that does not fit, u not contiguous, or h0 or the seed missing, or
            a rate of dropout outside [0, 1).
    """
    mixes = isinstance(lambda_, Tensor) or lambda_ != 0
    check_mix(lambda_, mixes, initial_residual)
    check_low_rank("u", u)
    check_dropout(dropout_p, dropout_seed)
    check_dtype("adapter_dtype", adapter_dtype)
    check_matrix("x", x, u.shape[0], "K", "u")
    (M, K), r = x.shape, u.shape[1]
    if mixes:
        check_matrix("initial_residual", initial_residual, M, K, "x")
    if M == 0 or K == 0 or r == 0:
        return torch.zeros((r, K), dtype=torch.float32, device=x.device)

    target = targets.target_of(x.device)
    h0 = initial_residual if mixes else None
    chosen = plan(r, x.dtype, None if h0 is None else h0.dtype, adapter_dtype, target, float32_is_exact())
    product, product_h = chosen.product, chosen.product_h
    keep_from, scale = drawn(dropout_p)

    def launch(config: dict[str, int]) -> Tensor:
        tiles, parts, steps = cut(M, K, r, config["BM"], config["BK"], config["BR"], target.multiprocessors)
        partial = torch.empty((parts, r, K), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):  # Triton launches on the current device; does nothing for a CPU tensor
            down_weight_gradient_kernel[(tiles * parts,)](
                p_u=u,
                p_x=x,
                p_initial_residual=h0,
                p_seed=dropout_seed if dropout_p else None,
                p_partial=partial,
                lambda_=lambda_ if isinstance(lambda_, Tensor) else float(lambda_),
                keep_from=keep_from,
                scale=scale,
                M=M,
                r=r,
                stride_x_m=x.stride(0),
                stride_x_k=x.stride(1),
                stride_h_m=0 if h0 is None else h0.stride(0),
                stride_h_k=0 if h0 is None else h0.stride(1),
                K=K,
                STEPS=steps,
                HAS_INITIAL_RESIDUAL=mixes,
                LAMBDA_IS_TENSOR=isinstance(lambda_, Tensor),
                HAS_DROPOUT=dropout_p != 0,
                MIX_FIRST=chosen.mix_first,
                SPLIT_X=product.split_a,
                SPLIT_U=product.split_b,
                DOT_DTYPE=product.tl_dtype,
                SPLIT_H=product_h.split_a,
                SPLIT_U_H=product_h.split_b,
                DOT_DTYPE_H=product_h.tl_dtype,
                **config,
            )
        return partial

    dtypes = x.dtype, None if h0 is None else h0.dtype, adapter_dtype
    key = ("weight gradient", M.bit_length(), K, r, dtypes, product, dropout_p != 0, x.device)
    return sum_parts(launch(tuned(key, chosen.config, launch, "BM")))[0]

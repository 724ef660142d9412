"""The gradients of x and h0 through the down-projection ``t = drop(x~) A^T``, from u, the gradient of t.

    dx~ = drop'(u A)        dx = (1 - lambda) dx~        dh0 = lambda dx~

The gradient of lambda is taken in the rank space, elsewhere. Called by ``sibo_triton.ops``.

Compiled once for every rank, dtypes and what is wanted; whatever M, and K but for what divides it.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import targets
from .autotune import tuned
from .checks import check_dropout, check_dtype, check_low_rank, check_matrix, check_one_value
from .dropout import drawn, dropout_rows, keep_tile
from .precision import Operands, float32_is_exact, operands, split_dot
from .targets import Target, cdiv


@triton.jit(do_not_specialize=["M"])
def down_input_gradient_kernel(
    p_u,  # [M, r], contiguous
    p_lora_a,  # [r, K]
    p_seed,  # int64, [1], or None
    p_dx,  # [M, K], or None
    p_dh,  # [M, K], contiguous, or None
    lambda_,  # a number, or a pointer to one
    keep_from,
    scale,
    M,
    K,
    stride_a_r,
    stride_a_k,
    stride_dx_m,
    stride_dx_k,
    R: tl.constexpr,  # the rank: so that the loop's bound is constant
    MIXES: tl.constexpr,
    LAMBDA_IS_TENSOR: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DX: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # add to what dx holds
    HAS_DH: tl.constexpr,
    SPLIT_U: tl.constexpr,
    SPLIT_A: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    k_tiles = tl.cdiv(K, BK)
    i_m = tl.program_id(0) // k_tiles  # neighbouring programs share rows of u, which then come from the cache
    i_k = tl.program_id(0) % k_tiles
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    o_k = i_k * BK + tl.arange(0, BK)  # [BK]
    o_k64 = o_k.to(tl.int64)
    m_m = o_m < M
    m_k = o_k < K
    m_g = m_m[:, None] & m_k[None, :]  # [BM, BK]

    b_g = tl.zeros([BM, BK], dtype=tl.float32)  # [BM, BK]
    for i_r in range(tl.cdiv(R, BR)):
        o_r = i_r * BR + tl.arange(0, BR)  # [BR]
        m_r = o_r < R
        b_p_u = p_u + o_m[:, None] * R + o_r[None, :]
        b_p_a = p_lora_a + o_r.to(tl.int64)[:, None] * stride_a_r + o_k64[None, :] * stride_a_k
        b_u = tl.load(b_p_u, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        b_a = tl.load(b_p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BR, BK]
        b_g = split_dot(b_u, b_a, b_g, SPLIT_U, SPLIT_A, DOT_DTYPE)

    if HAS_DROPOUT:
        row1, row2, col_key1, col_key2 = dropout_rows(p_seed, o_m)
        b_keep = keep_tile(row1, row2, col_key1, col_key2, o_k, keep_from)  # [BM, BK]
        b_g *= b_keep.to(tl.float32) * scale
    if MIXES:
        if LAMBDA_IS_TENSOR:
            b_lambda = tl.load(lambda_).to(tl.float32)
        else:
            b_lambda = lambda_
        b_dx = (1.0 - b_lambda) * b_g
    else:
        b_dx = b_g
    if HAS_DX:
        b_p_dx = p_dx + o_m[:, None] * stride_dx_m + o_k64[None, :] * stride_dx_k
        if ACCUMULATE:
            b_dx += tl.load(b_p_dx, mask=m_g, other=0.0).to(tl.float32)
        tl.store(b_p_dx, b_dx.to(p_dx.dtype.element_ty), mask=m_g)
    if HAS_DH:
        b_p_dh = p_dh + o_m[:, None] * K + o_k64[None, :]
        tl.store(b_p_dh, (b_lambda * b_g).to(p_dh.dtype.element_ty), mask=m_g)


@dataclass(frozen=True)
class Plan:
    """How a launch multiplies, and its tiles."""

    operands: Operands
    config: dict[str, int]  # BM, BK, BR, num_warps, num_stages


@lru_cache(maxsize=1024)
def plan(
    rank: int, lora_a_dtype: torch.dtype, output_dtypes: frozenset[torch.dtype], target: Target, exact: bool = True
) -> Plan:
    """The plan of a launch; ``exact``: float32 is multiplied as float32."""
    throughout = output_dtypes | {lora_a_dtype} == {torch.float32}
    product = operands(lora_a_dtype, lora_a_dtype, throughout and exact)  # u counts as A's dtype
    BR = max(16, triton.next_power_of_2(rank))  # 16: the least that a dot takes
    if product.dtype == torch.float32:
        return Plan(product, {"BM": 64, "BK": 64, "BR": 16, "num_warps": 4, "num_stages": 2})
    split = product.split_a or product.split_b
    num_warps = 8 if split and BR > 16 and target.hip else 4  # there 4 warps spill at rank 128
    config = {"BM": 64, "BK": 128, "BR": min(BR, 32 if split else 64), "num_warps": num_warps, "num_stages": 2}
    return Plan(product, config)


def down_input_gradient(
    u: Tensor,  # [M, r]
    lora_a: Tensor,  # [r, K]
    lambda_: float | Tensor = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,  # [1]
    *,
    dtype: torch.dtype | None = None,
    accumulate_into: Tensor | None = None,  # [M, K]
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # [M, K], [M, K]
    """``dx = (1 - lambda) dx~`` and ``dh0 = lambda dx~``, where ``dx~ = drop'(u A)``; either or both.

    With A in 16 bits, u is rounded to A's dtype. With A in float32 and a result in 16 bits, the product before its last
    rounding is within 1e-5 (norm-wise) of float32's, by ``precision.split_dot``.

    Args:
        u: the gradient of t, float32, ``[M, r]``, contiguous.
        lora_a: A, ``[r, K]``, float16, bfloat16 or float32, with any strides.
        lambda_: a number in [0, 1], or a floating point tensor with one element on the device of u.
        dropout_p, dropout_seed: as for the down-projection.
        dtype: of a fresh dx. None, and no ``accumulate_into``: dx is not wanted.
        accumulate_into: the gradient of the frozen path, to which dx is added in place, in float32 and rounded once;
            any of these dtypes, and any strides by which no two elements meet.
        residual_dtype: of dh0; None: not wanted.

    Returns:
        dx (``accumulate_into`` itself if given) and dh0, each None if not wanted. What is fresh is contiguous.

    Raises:
        TypeError: a dtype that the kernel does not take.
        ValueError: a shape that does not fit, u not contiguous, the seed missing, a rate of dropout
            outside [0, 1), both ``dtype`` and ``accumulate_into``, or dh0 wanted of what does not mix.
    """
    mixes = isinstance(lambda_, Tensor) or lambda_ != 0
    check_low_rank("u", u)
    check_one_value("lambda_", lambda_)
    check_dropout(dropout_p, dropout_seed)
    check_matrix("lora_a", lora_a, u.shape[1], "K", "u")
    (M, r), K = u.shape, lora_a.shape[1]
    if residual_dtype is not None and not mixes:
        raise ValueError("residual_dtype asks for the gradient of h0, but lambda_ is the number 0: it has none")
    if accumulate_into is not None:
        if dtype is not None:
            raise ValueError("both dtype and accumulate_into: a fresh dx or a sum, not both")
        check_matrix("accumulate_into", accumulate_into, M, K, "u and lora_a")
        if any(stride == 0 and size > 1 for stride, size in zip(accumulate_into.stride(), (M, K), strict=True)):
            raise ValueError("accumulate_into is expanded, its elements share memory: clone it first")
        dx = accumulate_into
    else:
        dx = None if dtype is None else torch.empty((M, K), dtype=dtype, device=u.device)
    dh = None if residual_dtype is None else torch.empty((M, K), dtype=residual_dtype, device=u.device)
    written = [tensor for tensor in (dx, dh) if tensor is not None]
    for tensor in written:
        check_dtype("the gradient", tensor.dtype)
    if M == 0 or K == 0 or not written:
        return dx, dh
    if r == 0:
        return dx if dx is None or accumulate_into is not None else dx.zero_(), None if dh is None else dh.zero_()

    written_dtypes = frozenset(tensor.dtype for tensor in written)
    chosen = plan(r, lora_a.dtype, written_dtypes, targets.target_of(u.device), float32_is_exact())
    product = chosen.operands
    keep_from, scale = drawn(dropout_p)

    def launch(config: dict[str, int], dx: Tensor | None = dx) -> None:
        grid = (cdiv(M, config["BM"]) * cdiv(K, config["BK"]),)
        with torch.cuda.device_of(u):  # Triton launches on the current device; does nothing for a CPU tensor
            down_input_gradient_kernel[grid](
                p_u=u,
                p_lora_a=lora_a,
                p_seed=dropout_seed if dropout_p else None,
                p_dx=dx,
                p_dh=dh,
                lambda_=lambda_ if isinstance(lambda_, Tensor) else float(lambda_),
                keep_from=keep_from,
                scale=scale,
                M=M,
                K=K,
                stride_a_r=lora_a.stride(0),
                stride_a_k=lora_a.stride(1),
                stride_dx_m=0 if dx is None else dx.stride(0),
                stride_dx_k=0 if dx is None else dx.stride(1),
                R=r,
                MIXES=mixes,
                LAMBDA_IS_TENSOR=isinstance(lambda_, Tensor),
                HAS_DROPOUT=dropout_p != 0,
                HAS_DX=dx is not None,
                ACCUMULATE=accumulate_into is not None,
                HAS_DH=dh is not None,
                SPLIT_U=product.split_a,
                SPLIT_A=product.split_b,
                DOT_DTYPE=product.tl_dtype,
                **config,
            )

    def trial(config: dict[str, int]) -> None:
        launch(config, dx if accumulate_into is None else dx.clone())  # to which only the launch itself may add

    key = ("input gradient", M.bit_length(), K, r, lora_a.dtype, written_dtypes, dx is None, dh is None)
    key += (product, mixes, dropout_p != 0, accumulate_into is not None, u.device)
    launch(tuned(key, chosen.config, trial, "BM"))
    return dx, dh

"""The up-projection of a SIBO-LoRA layer as one kernel: ``y = s (t B^T + b_B)``, alone or added to a base output.

Called by ``sibo_triton.ops``; ``sibo_triton.reference.up`` is the definition. Two functions, each of which writes a
fresh y:

* :func:`up` for a frozen GEMM that accumulates onto y afterwards (beta = 1) and leaves its own bias to us;
* :func:`add_up` for a base output that is there already. Not in place: a hook may hold that output, or it may be a view
  of another tensor, and both would change unseen. The bytes that move are the same.

With B in 16 bits, t is rounded to B's dtype, as the definition does. With B in float32 (PEFT's default, also on a
16-bit model) the product before its last rounding is within 1e-5 (norm-wise) of float32's, by ``precision.split_dot``.

Compiled once for every rank, dtypes and what there is to add; whatever M, and N but for what divides it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import targets
from .autotune import tuned
from .checks import check_bias, check_dtype, check_low_rank, check_matrix, check_one_value
from .launching import BoundedCache, Launch, no_launch, tensor_key, value_argument, value_key
from .precision import Operands, float32_is_exact, operands, split_dot
from .targets import Target, cdiv, rank_block


@triton.jit(do_not_specialize=["M"])
def up_kernel(
    p_t,  # [M, r], contiguous
    p_lora_b,  # [N, r]
    p_lora_bias,  # [N], or None
    p_base_bias,  # [N], or None: added as it is
    p_base,  # [M, N], or None: likewise
    p_y,  # [M, N], contiguous
    scaling,  # a number, or a pointer to one
    M,
    N,
    stride_b_n,
    stride_b_r,
    stride_lora_bias_n,
    stride_base_bias_n,
    stride_base_m,
    stride_base_n,
    R: tl.constexpr,  # the rank: so that the loop's bound is constant
    HAS_LORA_BIAS: tl.constexpr,
    HAS_BASE_BIAS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    SCALING_IS_TENSOR: tl.constexpr,
    SPLIT_T: tl.constexpr,
    SPLIT_B: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    n_tiles = tl.cdiv(N, BN)
    i_m = tl.program_id(0) // n_tiles  # neighbouring programs share rows of t, which then come from the cache
    i_n = tl.program_id(0) % n_tiles
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    m_m = o_m < M
    m_n = o_n < N
    m_y = m_m[:, None] & m_n[None, :]  # [BM, BN]

    b_y = tl.zeros([BM, BN], dtype=tl.float32)  # [BM, BN]
    for i_r in range(tl.cdiv(R, BR)):
        o_r = i_r * BR + tl.arange(0, BR).to(tl.int64)  # [BR]
        m_r = o_r < R
        b_p_t = p_t + o_m[:, None] * R + o_r[None, :]
        b_p_b = p_lora_b + o_n[:, None] * stride_b_n + o_r[None, :] * stride_b_r
        b_t = tl.load(b_p_t, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        b_b = tl.load(b_p_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
        b_y = split_dot(b_t, tl.trans(b_b), b_y, SPLIT_T, SPLIT_B, DOT_DTYPE)

    b_y = scaled(
        b_y,
        p_lora_bias,
        p_base_bias,
        scaling,
        o_n,
        m_n,
        stride_lora_bias_n,
        stride_base_bias_n,
        HAS_LORA_BIAS,
        HAS_BASE_BIAS,
        SCALING_IS_TENSOR,
    )
    if HAS_BASE:
        b_p_base = p_base + o_m[:, None] * stride_base_m + o_n[None, :] * stride_base_n
        b_y += tl.load(b_p_base, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def scaled(
    b_y,  # [BM, BN]
    p_lora_bias,
    p_base_bias,
    scaling,
    o_n,  # [BN]
    m_n,  # [BN]
    stride_lora_bias_n,
    stride_base_bias_n,
    HAS_LORA_BIAS: tl.constexpr,
    HAS_BASE_BIAS: tl.constexpr,
    SCALING_IS_TENSOR: tl.constexpr,
):
    """``s (b_y + b_B) + b``, each bias where there is one."""
    if SCALING_IS_TENSOR:
        b_scaling = tl.load(scaling).to(tl.float32)
    else:
        b_scaling = scaling
    if HAS_LORA_BIAS:
        b_bias = tl.load(p_lora_bias + o_n * stride_lora_bias_n, mask=m_n, other=0.0)  # [BN]
        b_y += b_bias.to(tl.float32)[None, :]
    b_y *= b_scaling
    if HAS_BASE_BIAS:
        b_bias = tl.load(p_base_bias + o_n * stride_base_bias_n, mask=m_n, other=0.0)  # [BN]
        b_y += b_bias.to(tl.float32)[None, :]
    return b_y


@dataclass(frozen=True)
class Plan:
    """How a launch multiplies, and its tiles."""

    operands: Operands
    config: dict[str, int]  # BM, BN, BR, num_warps, num_stages


@lru_cache(maxsize=1024)
def plan(rank: int, lora_b_dtype: torch.dtype, y_dtype: torch.dtype, target: Target, exact: bool = True) -> Plan:
    """The plan of a launch; ``exact``: float32 is multiplied as float32."""
    if lora_b_dtype == torch.float32:
        dot = operands(torch.float32, torch.float32, exact=exact and y_dtype == torch.float32)
    else:
        dot = operands(lora_b_dtype, lora_b_dtype)  # t counts as B's dtype
    BR = rank_block(rank)
    if dot.dtype == torch.float32:
        # Multiplied without tensor cores, from registers: larger tiles spill. 256 threads load 16 bytes each, and a
        # warp has 64 on AMD's GPUs.
        num_warps = 4 if target.hip else 8
        num_stages = 1 if target.capability == 120 and rank > 16 else 2  # there 2 spill on Triton 3.6
        return Plan(dot, {"BM": 64, "BN": 64, "BR": 16, "num_warps": num_warps, "num_stages": num_stages})
    split = dot.split_a or dot.split_b
    # There 4 warps spill at rank 64 with operands in parts, and in two steps of the rank as they are.
    num_warps = 8 if target.capability == 120 and (split or BR == 128) else 4
    config = {"BM": 64, "BN": 128, "BR": min(BR, 32 if split else 64), "num_warps": num_warps, "num_stages": 2}
    return Plan(dot, config)


def up(
    t: Tensor,  # [M, r]
    lora_b: Tensor,  # [N, r]
    scaling: float | Tensor,
    dtype: torch.dtype,
    lora_bias: Tensor | None = None,  # [N]
    base_bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N]
    """``y = s (t B^T + b_B) + b`` as a fresh tensor, summed in float32 and rounded once. Forward only.

    Args:
        t: ``[M, r]``, contiguous, as :func:`~sibo_triton.kernels.down.down_siblings` returns it.
        lora_b: B, ``[N, r]``, float16, bfloat16 or float32, with any strides.
        scaling: s, a number, or a floating point tensor with one element on the device of t.
        dtype: of y: float16, bfloat16 or float32.
        lora_bias: b_B, ``[N]``, any of these dtypes and any stride, or None; scaled with B.
        base_bias: b, likewise: of the frozen layer, whose GEMM is to accumulate onto y.

    Returns:
        y, ``[M, N]``, contiguous.

    Raises:
        TypeError: a dtype that the kernel does not take.
        ValueError: a shape that does not fit, or t not contiguous.
    """
    return _launch(t, lora_b, scaling, dtype, lora_bias, base_bias, None)


def add_up(
    base: Tensor,  # [M, N]
    t: Tensor,  # [M, r]
    lora_b: Tensor,  # [N, r]
    scaling: float | Tensor,
    lora_bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N]
    """``y = base + s (t B^T + b_B)`` as a fresh tensor of base's dtype, summed in float32, rounded once. Forward only.

    Args:
        base: the base output, ``[M, N]``, float16, bfloat16 or float32, with any strides, expanded too; only read.
        t, lora_b, scaling, lora_bias: as for :func:`up`.

    Returns:
        y, ``[M, N]``, contiguous.

    Raises:
        TypeError, ValueError: as :func:`up`.
    """
    return _launch(t, lora_b, scaling, base.dtype, lora_bias, None, base)


_launches = BoundedCache()


def _launch(
    t: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    dtype: torch.dtype,
    lora_bias: Tensor | None,
    base_bias: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    device = t.device
    of_matrices = tensor_key(t), tensor_key(lora_b), tensor_key(base), dtype
    of_vectors = value_key(scaling), tensor_key(lora_bias), tensor_key(base_bias)
    key = (of_matrices, of_vectors, device, targets.target_of(device), float32_is_exact())

    def run(launch: Callable[..., None]) -> Tensor:
        y = torch.empty((t.shape[0], lora_b.shape[0]), dtype=dtype, device=device)
        launch(
            p_t=t,
            p_lora_b=lora_b,
            p_lora_bias=lora_bias,
            p_base_bias=base_bias,
            p_base=base,
            p_y=y,
            scaling=value_argument(scaling),
        )
        return y

    launch = _launches.get(key)
    if launch is None:
        arguments = (t, lora_b, scaling, dtype, lora_bias, base_bias, base)
        launch = _launches.keep(key, _prepared(run, *arguments))
    return run(launch)


def _prepared(
    run: Callable[[Callable[..., None]], Tensor],
    t: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    dtype: torch.dtype,
    lora_bias: Tensor | None,
    base_bias: Tensor | None,
    base: Tensor | None,
) -> Callable[..., None]:
    """The launch for such arguments, checked and planned."""
    if base is None:
        check_dtype("y", dtype)
    check_low_rank("t", t)
    check_matrix("lora_b", lora_b, "N", t.shape[1], "t")
    (M, r), N, device = t.shape, lora_b.shape[0], t.device
    check_bias("lora_bias", lora_bias, N)
    check_one_value("scaling", scaling)
    check_bias("base_bias", base_bias, N)
    if base is not None:
        check_matrix("base", base, M, N, "t and lora_b")
    if M == 0 or N == 0:
        return no_launch
    chosen = plan(r, lora_b.dtype, dtype, targets.target_of(device), float32_is_exact())
    dot = chosen.operands

    def launch_of(config: dict[str, int]) -> Launch:
        grid = (cdiv(M, config["BM"]) * cdiv(N, config["BN"]),)
        arguments = {
            "M": M,
            "N": N,
            "stride_b_n": lora_b.stride(0),
            "stride_b_r": lora_b.stride(1),
            "stride_lora_bias_n": 0 if lora_bias is None else lora_bias.stride(0),
            "stride_base_bias_n": 0 if base_bias is None else base_bias.stride(0),
            "stride_base_m": 0 if base is None else base.stride(0),
            "stride_base_n": 0 if base is None else base.stride(1),
            "R": r,
            "HAS_LORA_BIAS": lora_bias is not None,
            "HAS_BASE_BIAS": base_bias is not None,
            "HAS_BASE": base is not None,
            "SCALING_IS_TENSOR": isinstance(scaling, Tensor),
            "SPLIT_T": dot.split_a,
            "SPLIT_B": dot.split_b,
            "DOT_DTYPE": dot.tl_dtype,
            **config,
        }
        return Launch(up_kernel, grid, device, arguments)

    added = lora_bias is not None, base_bias is not None, base is not None
    key = ("up", M.bit_length(), N, r, lora_b.dtype, dtype, dot, added, device)
    return launch_of(tuned(key, chosen.config, lambda config: run(launch_of(config)), "BM"))

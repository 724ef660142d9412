"""The low-rank products of siblings for few rows, forward, in two launches: ``y = s (drop(x~) A^T B^T + b_B) + b``.

When a model generates, each step has a row or some for every sequence, and the launches take longer than what they do.
The first launch is the down-projections', which cut K so as to fill the GPU; the second is the up-projections', of all
siblings, whose programs add the parts of t themselves. t is not kept.

Called by ``sibo_triton.ops``. Compiled once for all ranks, dtypes, biases, number of parts and of siblings; whatever M,
and each N but for what divides it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import targets
from .autotune import tuned
from .checks import check_bias, check_dtype, check_matrix, check_one_value
from .down import down_parts
from .launching import BoundedCache, Launch, tensor_key, value_argument, value_key
from .precision import float32_is_exact, split_dot
from .siblings import DownProjection, UpProjection
from .targets import cdiv
from .up import plan, scaled


@triton.jit(do_not_specialize=["M", "n_tiles"])
def up_siblings_kernel(
    p_t,  # tuples, with one element for each sibling: [parts, M, r], each part contiguous
    p_lora_b,  # [N, r]
    p_lora_bias,  # [N], or None
    p_base_bias,  # [N], or None
    p_y,  # [M, N], contiguous
    scaling,  # numbers, or pointers to one
    N,
    first_tile,  # of the sibling's tiles of columns, among those of all, and the number of all
    stride_t_part,
    stride_b_n,
    stride_b_r,
    stride_lora_bias_n,
    stride_base_bias_n,
    M,  # numbers again
    n_tiles,
    SIBLINGS: tl.constexpr,
    R: tl.constexpr,  # tuples from here: the ranks
    PARTS: tl.constexpr,
    HAS_LORA_BIAS: tl.constexpr,
    HAS_BASE_BIAS: tl.constexpr,
    SCALING_IS_TENSOR: tl.constexpr,
    SPLIT_T: tl.constexpr,  # no tuples
    SPLIT_B: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    AT_ONCE: tl.constexpr,  # parts that are loaded at once
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    i_m = tl.program_id(0) // n_tiles  # neighbouring programs share rows of t, which then come from the cache
    i_tile = tl.program_id(0) % n_tiles
    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    m_m = o_m < M
    for i in tl.static_range(SIBLINGS):
        if (i_tile >= first_tile[i]) & (i_tile < first_tile[i + 1]):
            o_n = (i_tile - first_tile[i]).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
            m_n = o_n < N[i]
            b_y = tl.zeros([BM, BN], dtype=tl.float32)  # [BM, BN]
            for i_r in range(tl.cdiv(R[i], BR)):
                o_r = i_r * BR + tl.arange(0, BR).to(tl.int64)  # [BR]
                m_r = o_r < R[i]
                b_p_t = p_t[i] + o_m[:, None] * R[i] + o_r[None, :]
                b_t = _sum_of(b_p_t, m_m[:, None] & m_r[None, :], stride_t_part[i], PARTS[i], AT_ONCE)  # [BM, BR]
                b_p_b = p_lora_b[i] + o_n[:, None] * stride_b_n[i] + o_r[None, :] * stride_b_r[i]
                b_b = tl.load(b_p_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
                b_y = split_dot(b_t, tl.trans(b_b), b_y, SPLIT_T, SPLIT_B, DOT_DTYPE)
            b_y = scaled(
                b_y,
                p_lora_bias[i],
                p_base_bias[i],
                scaling[i],
                o_n,
                m_n,
                stride_lora_bias_n[i],
                stride_base_bias_n[i],
                HAS_LORA_BIAS[i],
                HAS_BASE_BIAS[i],
                SCALING_IS_TENSOR[i],
            )
            b_p_y = p_y[i] + o_m[:, None] * N[i] + o_n[None, :]
            tl.store(b_p_y, b_y.to(p_y[i].dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _sum_of(b_p_first, mask, stride_part, PARTS: tl.constexpr, AT_ONCE: tl.constexpr):
    """The sum of the parts, one after the other; so many are loaded before the first is waited for."""
    b_sum = tl.zeros(mask.shape, dtype=tl.float32)
    for i in range(tl.cdiv(PARTS, AT_ONCE)):
        for j in tl.static_range(AT_ONCE):
            i_part = i * AT_ONCE + j
            b_p_part = b_p_first + tl.cast(i_part, tl.int64) * stride_part
            # Of one element: with a scalar's a mask is none to the interpreter of Triton 3.9.
            is_part = tl.full([1, 1], i_part, tl.int32) < PARTS
            b_sum += tl.load(b_p_part, mask=mask & is_part, other=0.0)
    return b_sum


def low_rank_siblings(
    x: Tensor,  # [M, K]
    siblings: Sequence[DownProjection],
    ups: Sequence[UpProjection],
    initial_residual: Tensor | None,  # [M, K]
    dtype: torch.dtype,
) -> list[Tensor]:  # [M, N] each
    """``y = s (t B^T + b_B) + b`` for siblings, as :func:`~.down.down_siblings` and :func:`~.up.up` in two launches.

    For any number of rows, though made for few. A launch more for each further kind of siblings, and for each further
    dtype of B. The same bits from run to run.

    Args:
        x, siblings, initial_residual: as for :func:`~.down.down_siblings`; d is not computed for the caller.
        ups: B, ``[N, r]``, s and the biases, as for :func:`~.up.up`: one for each sibling, of its rank and any N.
        dtype: of y.

    Returns:
        y, ``[M, N]``, contiguous, for a frozen GEMM that accumulates onto it.

    Raises:
        TypeError, ValueError: as the two; ValueError also for as many ups as there are not siblings.
    """
    if len(ups) != len(siblings):
        raise ValueError(f"{len(siblings)} siblings and {len(ups)} up-projections: pass one for each")
    parts, device = down_parts(x, siblings, initial_residual), x.device
    up_keys = tuple(
        [
            (tensor_key(up.lora_b), value_key(up.scaling), tensor_key(up.lora_bias), tensor_key(up.base_bias))
            for up in ups
        ]
    )
    part_keys = tuple([(part.shape, part.stride(0)) for part in parts])
    key = (up_keys, part_keys, dtype, device, targets.target_of(device), float32_is_exact())
    ys = [torch.empty((x.shape[0], up.lora_b.shape[0]), dtype=dtype, device=device) for up in ups]
    launches = _launches.get(key)
    if launches is None:
        launches = _launches.keep(key, _prepared(parts, ups, ys, dtype))
    for own, launch in launches:
        _launch(launch, [parts[i] for i in own], [ups[i] for i in own], [ys[i] for i in own])
    return ys


_launches = BoundedCache()


def _launch(launch: Launch, parts: Sequence[Tensor], ups: Sequence[UpProjection], ys: Sequence[Tensor]) -> None:
    launch(
        p_t=tuple(parts),
        p_lora_b=tuple([up.lora_b for up in ups]),
        p_lora_bias=tuple([up.lora_bias for up in ups]),
        p_base_bias=tuple([up.base_bias for up in ups]),
        p_y=tuple(ys),
        scaling=tuple([value_argument(up.scaling) for up in ups]),
    )


def _prepared(
    parts: Sequence[Tensor], ups: Sequence[UpProjection], ys: Sequence[Tensor], dtype: torch.dtype
) -> list[tuple[list[int], Launch]]:
    """Launches for such arguments, checked and planned: one for each dtype of B, and which siblings it is for."""
    check_dtype("y", dtype)
    places: dict[torch.dtype, list[int]] = {}
    for i, (of, up, y) in enumerate(zip(parts, ups, ys, strict=True)):
        check_matrix("lora_b", up.lora_b, "N", of.shape[2], "lora_a")
        check_bias("lora_bias", up.lora_bias, up.lora_b.shape[0])
        check_bias("base_bias", up.base_bias, up.lora_b.shape[0])
        check_one_value("scaling", up.scaling)
        if y.numel():
            places.setdefault(up.lora_b.dtype, []).append(i)
    return [
        (own, _launch_of([parts[i] for i in own], [ups[i] for i in own], [ys[i] for i in own]))
        for own in places.values()
    ]


def _launch_of(parts: Sequence[Tensor], ups: Sequence[UpProjection], ys: Sequence[Tensor]) -> Launch:
    """For siblings whose B have one dtype and of whose y none is empty."""
    M, b_dtype, dtype, device = ys[0].shape[0], ups[0].lora_b.dtype, ys[0].dtype, ys[0].device
    ranks, widths = tuple(of.shape[2] for of in parts), tuple(y.shape[1] for y in ys)
    target = targets.target_of(device)
    chosen = plan(max(ranks), b_dtype, dtype, target, float32_is_exact())
    dot = chosen.operands

    def launch_of(config: dict[str, int]) -> Launch:
        tiles = [cdiv(N, config["BN"]) for N in widths]
        arguments = {
            "N": widths,
            "first_tile": tuple(sum(tiles[:i]) for i in range(len(tiles) + 1)),
            "stride_t_part": tuple(of.stride(0) for of in parts),
            "stride_b_n": tuple(up.lora_b.stride(0) for up in ups),
            "stride_b_r": tuple(up.lora_b.stride(1) for up in ups),
            "stride_lora_bias_n": tuple(0 if up.lora_bias is None else up.lora_bias.stride(0) for up in ups),
            "stride_base_bias_n": tuple(0 if up.base_bias is None else up.base_bias.stride(0) for up in ups),
            "M": M,
            "n_tiles": sum(tiles),
            "SIBLINGS": len(ups),
            "R": ranks,
            "PARTS": tuple(len(of) for of in parts),
            "HAS_LORA_BIAS": tuple(up.lora_bias is not None for up in ups),
            "HAS_BASE_BIAS": tuple(up.base_bias is not None for up in ups),
            "SCALING_IS_TENSOR": tuple(isinstance(up.scaling, Tensor) for up in ups),
            "SPLIT_T": dot.split_a,
            "SPLIT_B": dot.split_b,
            "DOT_DTYPE": dot.tl_dtype,
            "AT_ONCE": max(1, 128 // config["BM"]),
            **config,
        }
        return Launch(up_siblings_kernel, (cdiv(M, config["BM"]) * sum(tiles),), device, arguments)

    key = ("up of siblings", M.bit_length(), widths, ranks, b_dtype, dtype, dot, device)
    # So small that registers have room for several parts of t, and few rows make many programs; AMD's 256 threads load
    # 16 bytes of B each only from 128 columns. Not pipelined, or shared memory had to hold the parts.
    small = {"BM": 16 if M <= 16 else 64, "BN": 128 if target.hip else 64, "BR": 16, "num_stages": 1}
    if dot.dtype != torch.float32:
        small["num_warps"] = 4
    return launch_of(tuned(key, chosen.config | small, lambda config: _launch(launch_of(config), parts, ups, ys), "BM"))

"""The down-projections of SIBO-LoRA layers as one Triton kernel: ``t = drop((1 - lambda) x + lambda h0) A^T``.

Called by ``sibo_triton.ops``; ``sibo_triton.reference.down`` is the definition.

Every program reads its rows of x and h0 once. In 16 bits and up to rank 64, the tiles of x and h0 go to the tensor
cores as they are and the two products are mixed in float32: no arithmetic on the [M, K] tiles but the dropout mask, and
nothing is rounded to 16 bits. Elsewhere the second product would cost more than mixing the tiles, so they are mixed
first, in float32; unless ``d = drop(h0 - x) A^T`` is wanted too, which comes from the two products. The mask takes both
tiles alike, and the sum is divided by the rate of keeping at the end.

Few rows are split along K, and the parts added in fixed order. Siblings (q, k, v) that share x share a launch;
neighbouring programs, of one sibling each, find x in the cache.

Compiled once for every K, dtypes, kind and number of siblings, and plan; whatever M, but for the splits along K, whose
steps are powers of two.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import targets
from .activations import activate, activate_parts
from .autotune import tuned
from .down_plan import PreparedLaunch, check_down, cut, lay_out, plan, sibling_key
from .dropout import dropout_rows, keep_from_and_scale, keep_tile
from .launching import BoundedCache, Launch, tensor_key, value_argument
from .partial_sums import sum_parts
from .precision import float32_is_exact, split_dot
from .siblings import DownProjection, kept_dtype


@triton.jit(do_not_specialize=["M"])
def down_kernel(
    p_x,  # [M, K]
    p_initial_residual,  # [M, K], or None
    p_t,  # [splits of K, all results], of which each sibling has [1 or 2, M, r]: t and, if HAS_DIFFERENCE, d
    p_activated,  # [all results], laid out as t: f(t), of a bottleneck adapter; or None
    p_lora_a,  # tuples from here, with one element for each sibling: [r, K]
    p_bias,  # [r], of a bottleneck adapter, or None
    p_seed,  # int64, [1]
    lambda_,  # numbers, or pointers to one
    keep_from,  # these two from dropout.keep_from_and_scale
    dropout_scale,
    r,
    first_tile,  # of the sibling's tiles along its rank, among those of all siblings
    t_start,  # of the sibling's results, among those of all
    stride_a_r,
    stride_a_k,
    stride_bias,
    M,  # numbers again
    r_tiles,  # of all siblings
    stride_x_m,
    stride_x_k,
    stride_h_m,
    stride_h_k,
    stride_t_split,
    K: tl.constexpr,
    K_STEPS: tl.constexpr,  # of BK columns, in each split: constant, as some versions of the interpreter need
    SIBLINGS: tl.constexpr,
    HAS_INITIAL_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DIFFERENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # f's name, or None
    LAMBDA_IS_TENSOR: tl.constexpr,  # a tuple
    MIX_FIRST: tl.constexpr,  # mix the tiles and not the accumulators
    SPLIT_X: tl.constexpr,  # these three for split_dot
    SPLIT_A: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    i_m = tl.program_id(0) // r_tiles  # neighbouring programs share rows of x, which then come from the cache
    i_r = tl.program_id(0) % r_tiles
    i_k_split = tl.program_id(1)

    p_a_own, stride_r_own, stride_k_own = p_lora_a[0], stride_a_r[0], stride_a_k[0]
    r_own, first_own, start_own = r[0], first_tile[0], t_start[0]
    for i in tl.static_range(1, SIBLINGS):
        is_own = i_r >= first_tile[i]
        p_a_own = tl.where(is_own, p_lora_a[i], p_a_own)
        stride_r_own = tl.where(is_own, stride_a_r[i], stride_r_own)
        stride_k_own = tl.where(is_own, stride_a_k[i], stride_k_own)
        r_own = tl.where(is_own, r[i], r_own)
        first_own = tl.where(is_own, first_tile[i], first_own)
        start_own = tl.where(is_own, t_start[i], start_own)

    o_m = i_m.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    o_r = (i_r - first_own) * BR + tl.arange(0, BR)  # [BR]
    o_k = i_k_split * (K_STEPS * BK) + tl.arange(0, BK)  # [BK]
    m_m = o_m < M
    m_r = o_r < r_own

    # int64 throughout: a row times its stride passes 2^31 in long batches.
    o_k64 = o_k.to(tl.int64)
    b_p_x = p_x + o_m[:, None] * stride_x_m + o_k64[None, :] * stride_x_k  # [BM, BK]
    b_p_a = p_a_own + o_r.to(tl.int64)[:, None] * stride_r_own + o_k64[None, :] * stride_k_own  # [BR, BK]
    step_x = tl.cast(BK, tl.int64) * stride_x_k
    step_a = tl.cast(BK, tl.int64) * stride_k_own
    if HAS_INITIAL_RESIDUAL:
        b_p_h = p_initial_residual + o_m[:, None] * stride_h_m + o_k64[None, :] * stride_h_k  # [BM, BK]
        step_h = tl.cast(BK, tl.int64) * stride_h_k
        b_lambda = tl.load(lambda_[0]).to(tl.float32) if LAMBDA_IS_TENSOR[0] else lambda_[0]
        for i in tl.static_range(1, SIBLINGS):
            b_lambda_i = tl.load(lambda_[i]).to(tl.float32) if LAMBDA_IS_TENSOR[i] else lambda_[i]
            b_lambda = tl.where(i_r >= first_tile[i], b_lambda_i, b_lambda)
    if HAS_DROPOUT:
        p_seed_own, keep_from_own, scale_own = p_seed[0], keep_from[0], dropout_scale[0]
        for i in tl.static_range(1, SIBLINGS):
            is_own = i_r >= first_tile[i]
            p_seed_own = tl.where(is_own, p_seed[i], p_seed_own)
            keep_from_own = tl.where(is_own, keep_from[i], keep_from_own)
            scale_own = tl.where(is_own, dropout_scale[i], scale_own)
        row1, row2, col_key1, col_key2 = dropout_rows(p_seed_own, i_m.to(tl.int64) * BM, tl.arange(0, BM))
        MASKED_DTYPE: tl.constexpr = tl.float32 if SPLIT_X or MIX_FIRST else DOT_DTYPE

    b_t = tl.zeros([BM, BR], dtype=tl.float32)  # [BM, BR]
    b_t_h = tl.zeros([BM, BR], dtype=tl.float32)  # [BM, BR], the part of h0
    for i_k in range(K_STEPS):
        if K % (K_STEPS * BK) == 0:
            m_x = m_m[:, None]
            m_a = m_r[:, None]
        else:
            m_k = o_k < K - i_k * BK
            m_x = m_m[:, None] & m_k[None, :]
            m_a = m_r[:, None] & m_k[None, :]
        b_x = tl.load(b_p_x, mask=m_x, other=0.0)  # [BM, BK]
        b_a = tl.trans(tl.load(b_p_a, mask=m_a, other=0.0))  # [BK, BR]
        if HAS_DROPOUT:
            b_keep = keep_tile(row1, row2, col_key1, col_key2, o_k + i_k * BK, keep_from_own).to(MASKED_DTYPE)
        if HAS_INITIAL_RESIDUAL:
            b_h = tl.load(b_p_h, mask=m_x, other=0.0)  # [BM, BK]
            b_p_h += step_h
            if MIX_FIRST:
                b_x = (1.0 - b_lambda) * b_x.to(tl.float32) + b_lambda * b_h.to(tl.float32)
            else:
                if HAS_DROPOUT:
                    b_h = b_h.to(MASKED_DTYPE) * b_keep
                b_t_h = split_dot(b_h, b_a, b_t_h, SPLIT_X, SPLIT_A, DOT_DTYPE)
        if HAS_DROPOUT:
            b_x = b_x.to(MASKED_DTYPE) * b_keep
        b_t = split_dot(b_x, b_a, b_t, SPLIT_X, SPLIT_A, DOT_DTYPE)
        b_p_x += step_x
        b_p_a += step_a

    p_t_own = p_t + i_k_split.to(tl.int64) * stride_t_split + start_own
    b_p_t = p_t_own + o_m[:, None] * r_own + o_r[None, :]  # [BM, BR]
    m_t = m_m[:, None] & m_r[None, :]
    if HAS_DIFFERENCE:
        b_d = b_t_h - b_t  # [BM, BR]
        if HAS_DROPOUT:
            b_d *= scale_own
        tl.store(b_p_t + tl.cast(M, tl.int64) * r_own, b_d.to(p_t.dtype.element_ty), mask=m_t)
    if HAS_INITIAL_RESIDUAL and not MIX_FIRST:
        b_t = (1.0 - b_lambda) * b_t + b_lambda * b_t_h
    if HAS_DROPOUT:
        b_t *= scale_own
    if HAS_BIAS:
        p_bias_own, stride_bias_own = p_bias[0], stride_bias[0]
        for i in tl.static_range(1, SIBLINGS):
            p_bias_own = tl.where(i_r >= first_tile[i], p_bias[i], p_bias_own)
            stride_bias_own = tl.where(i_r >= first_tile[i], stride_bias[i], stride_bias_own)
        b_t += tl.load(p_bias_own + o_r.to(tl.int64) * stride_bias_own, mask=m_r, other=0.0).to(tl.float32)[None, :]
    tl.store(b_p_t, b_t.to(p_t.dtype.element_ty), mask=m_t)
    if ACTIVATION is not None:
        b_p_activated = p_activated + start_own + o_m[:, None] * r_own + o_r[None, :]
        tl.store(b_p_activated, activate(b_t, ACTIVATION).to(p_activated.dtype.element_ty), mask=m_t)


def down_siblings(
    x: Tensor,  # [M, K]
    siblings: Sequence[DownProjection],
    initial_residual: Tensor | None = None,  # [M, K]
) -> list[tuple[Tensor, Tensor | None]]:  # [M, r] each
    """``t = drop((1 - lambda) x + lambda h0) A^T`` and ``d = drop(h0 - x) A^T`` for layers that share x and h0.

    Summed in float32, and rounded to A's dtype where x has the same (``siblings.kept_dtype``). One 16-bit dtype
    throughout is multiplied by tensor cores as it is; float32 throughout as ``torch.get_float32_matmul_precision()``
    says, without tensor cores at "highest"; all else in bfloat16 parts (``kernels/precision.py``), near float32's
    precision. The same bits from run to run. Forward only: gradients are for the op around it.

    Siblings share a launch, and x in the cache, if their A have one dtype and all or none of them mix, drop and want d.

    Args:
        x: ``[M, K]``, float16, bfloat16 or float32, with any strides.
        siblings: A, lambda, dropout and its seed (on the device of x, as A and lambda) for each; any ranks, and A with
            any of these dtypes and any strides.
        initial_residual: h0, of the shape of x, any of these dtypes, any strides. Read where ``lambda_`` is not the
            number 0 or d is wanted, else it may be None.

    Returns:
        For each sibling t and, where wanted, d: ``[M, r]``, contiguous, perhaps views of one buffer; in float32, or in
        A's dtype where x has the same.

    Raises:
        TypeError: a dtype that the kernel does not take.
        ValueError: a shape that does not fit, h0 or a seed missing, or a rate of dropout outside [0, 1).
    """
    return [(result.t, result.difference) for result in _results(x, siblings, initial_residual)]


class DownResult(NamedTuple):
    """Of one sibling, ``[M, r]`` each."""

    t: Tensor  # of a bottleneck adapter the pre-activation p
    difference: Tensor | None
    activated: Tensor | None  # f(p)


def down_activated_siblings(
    x: Tensor,  # [M, K]
    siblings: Sequence[DownProjection],
    initial_residual: Tensor | None = None,  # [M, K]
) -> list[DownResult]:
    """``p = drop((1 - lambda) x + lambda h0) W^T + b`` and f(p), of bottleneck adapters, in one pass over x.

    For few rows, of which K is split, in the launch that adds the parts. As :func:`down_siblings`, in t's dtype.

    Raises:
        TypeError, ValueError: as :func:`down_siblings`; ValueError for an activation that has no kernel.
    """
    return _results(x, siblings, initial_residual)


def _results(x: Tensor, siblings: Sequence[DownProjection], initial_residual: Tensor | None) -> list[DownResult]:
    launched = _launch_kinds(x, siblings, initial_residual)
    if all(kind.finished for kind, _, _ in launched):
        totals: list[Tensor | None] = [parts for _, parts, _ in launched]
    else:
        dtypes = [kind.dtype for kind, _, _ in launched]
        totals = sum_parts([None if kind.pending else parts for kind, parts, _ in launched], dtypes)
    results: dict[int, DownResult] = {}
    for (kind, parts, activated), total in zip(launched, totals, strict=True):
        for i, start, r in zip(kind.siblings, kind.t_start, kind.ranks, strict=True):
            if total is None:
                results[i] = _activated(x, siblings[i], parts, start)
                continue
            shape, strides = (x.shape[0], r), (r, 1)
            d = total.as_strided(shape, strides, start + math.prod(shape)) if siblings[i].difference else None
            f = None if activated is None else activated.as_strided(shape, strides, start)
            results[i] = DownResult(total.as_strided(shape, strides, start), d, f)
    return [results[i] for i in range(len(siblings))]


def _activated(x: Tensor, sibling: DownProjection, parts: Tensor, start: int) -> DownResult:
    """What is left to do for a bottleneck adapter of which K was split: the sums, the bias and f."""
    M, r, dtype = x.shape[0], sibling.lora_a.shape[0], kept_dtype(x.dtype, sibling.lora_a.dtype)

    def matrices(at: int) -> Tensor:
        return parts.as_strided((len(parts), M, r), (parts.shape[1], r, 1), at)

    assert sibling.activation is not None
    d = matrices(start + M * r).sum(0).to(dtype) if sibling.difference else None
    p, f = activate_parts(matrices(start), sibling.bias, sibling.activation, dtype)
    return DownResult(p, d, f)


def down_parts(
    x: Tensor,  # [M, K]
    siblings: Sequence[DownProjection],
    initial_residual: Tensor | None = None,  # [M, K]
) -> list[Tensor]:  # [parts, M, r] each
    """The parts of each sibling's t, which the caller adds: for few rows, of which K is split.

    As :func:`down_siblings`, without d. Each matrix of a part is contiguous, and the parts are evenly apart.
    """
    results: dict[int, Tensor] = {}
    for kind, parts, _ in _launch_kinds(x, siblings, initial_residual):
        count, size = parts.shape
        for i, start, r in zip(kind.siblings, kind.t_start, kind.ranks, strict=True):
            results[i] = parts.as_strided((count, x.shape[0], r), (size, r, 1), start)
    return [results[i] for i in range(len(siblings))]


_launches = BoundedCache()


def _launch_kinds(
    x: Tensor, siblings: Sequence[DownProjection], initial_residual: Tensor | None
) -> list[tuple[PreparedLaunch, Tensor, Tensor | None]]:
    """A launch for each kind: with the parts of all its results and, where there are any, those of f(t)."""
    device = x.device
    key = (
        tuple([sibling_key(sibling) for sibling in siblings]),
        tensor_key(x),
        tensor_key(initial_residual),
        device,
        targets.target_of(device),
        float32_is_exact(),
    )
    kinds = _launches.get(key)
    if kinds is None:
        kinds = _launches.keep(key, _prepared(x, siblings, initial_residual))
    return [(kind, *_launch(kind, x, siblings, initial_residual)) for kind in kinds]


def _launch(
    kind: PreparedLaunch, x: Tensor, siblings: Sequence[DownProjection], initial_residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The parts, and f(t), for siblings of one kind."""
    if kind.launch is None:
        return torch.zeros(kind.parts, dtype=torch.float32, device=x.device), None
    dtype = kind.dtype if kind.parts[0] == 1 else torch.float32
    parts = torch.empty(kind.parts, dtype=dtype, device=x.device)
    activated = torch.empty(kind.parts[1], dtype=dtype, device=x.device) if kind.activates else None
    own = [siblings[i] for i in kind.siblings]
    kind.launch(
        p_x=x,
        p_initial_residual=initial_residual if kind.mixes else None,
        p_t=parts,
        p_activated=activated,
        p_lora_a=tuple([of.lora_a for of in own]),
        p_bias=tuple([of.bias for of in own]) if kind.adds_bias else None,
        p_seed=tuple([of.dropout_seed for of in own]) if kind.drops else None,
        lambda_=tuple([value_argument(of.lambda_) for of in own]),
    )
    return parts, activated


def _prepared(x: Tensor, siblings: Sequence[DownProjection], initial_residual: Tensor | None) -> list[PreparedLaunch]:
    """The launches for such arguments, checked and planned."""
    check_down(x, siblings, initial_residual)
    places: dict[tuple, list[int]] = {}
    for i, sibling in enumerate(siblings):
        places.setdefault(sibling.kind, []).append(i)
    return [_prepared_for(own, kind, x, siblings, initial_residual) for kind, own in places.items()]


def _prepared_for(
    places: list[int], kind: tuple, x: Tensor, siblings: Sequence[DownProjection], h0: Tensor | None
) -> PreparedLaunch:
    """The launch for siblings of one kind; ``places``: which of all siblings these are."""
    own = [siblings[i] for i in places]
    (M, K), ranks = x.shape, tuple(sibling.lora_a.shape[0] for sibling in own)
    a_dtype, mixes, drops, difference, has_bias, activation = kind
    dtype, activates = kept_dtype(x.dtype, a_dtype), activation is not None
    if M == 0 or K == 0 or max(ranks) == 0:
        t_start, size = lay_out(M, ranks, 1 + difference)
        return PreparedLaunch(places, ranks, t_start, (1, size), dtype, launch=None, pending=activates)
    target = targets.target_of(x.device)
    h0_strides, h0_dtype = (h0.stride(), h0.dtype) if mixes else ((0, 0), None)
    chosen = plan(max(ranks), x.dtype, h0_dtype, kind, target, float32_is_exact(), len(own))
    product = chosen.operands
    rates = [keep_from_and_scale(sibling.dropout_p) for sibling in own]

    def prepare(config: dict[str, int]) -> PreparedLaunch:
        how = cut(M, K, ranks, 1 + difference, config["BM"], config["BK"], config["BR"], target.multiprocessors)
        whole = how.splits == 1
        adds_bias = has_bias and whole
        arguments = {
            "keep_from": tuple(keep_from for keep_from, _ in rates) if drops else None,
            "dropout_scale": tuple(scale for _, scale in rates) if drops else None,
            "r": ranks,
            "first_tile": how.first_tile,
            "t_start": how.t_start,
            "stride_a_r": tuple(sibling.lora_a.stride(0) for sibling in own),
            "stride_a_k": tuple(sibling.lora_a.stride(1) for sibling in own),
            "stride_bias": tuple(sibling.bias.stride(0) for sibling in own) if adds_bias else None,
            "M": M,
            "r_tiles": how.r_tiles,
            "stride_x_m": x.stride(0),
            "stride_x_k": x.stride(1),
            "stride_h_m": h0_strides[0],
            "stride_h_k": h0_strides[1],
            "stride_t_split": how.size,
            "K": K,
            "K_STEPS": how.k_steps,
            "SIBLINGS": len(own),
            "HAS_INITIAL_RESIDUAL": mixes,
            "HAS_DROPOUT": drops,
            "HAS_DIFFERENCE": difference,
            "HAS_BIAS": adds_bias,
            "ACTIVATION": activation if whole else None,
            "LAMBDA_IS_TENSOR": tuple(isinstance(sibling.lambda_, Tensor) for sibling in own),
            "MIX_FIRST": chosen.mix_first,
            "SPLIT_X": product.split_a,
            "SPLIT_A": product.split_b,
            "DOT_DTYPE": product.tl_dtype,
            # a pipeline longer than the loop would only take registers
            **config | {"num_stages": min(config["num_stages"], how.k_steps)},
        }
        return PreparedLaunch(
            places,
            ranks,
            how.t_start,
            (how.splits, how.size),
            dtype,
            Launch(down_kernel, (how.programs, how.splits), x.device, arguments),
            mixes=mixes,
            drops=drops,
            adds_bias=adds_bias,
            activates=activates and whole,
            pending=activates and not whole,
        )

    key = ("down", M.bit_length(), K, ranks, x.dtype, h0_dtype, kind, product, x.device)
    return prepare(tuned(key, chosen.config, lambda config: _launch(prepare(config), x, siblings, h0), "BM"))

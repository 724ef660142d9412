"""The gradients of A through down-projections ``t = drop(x~) A^T``, from u, the gradient of t: ``dA = u^T drop(x~)``.

One pass over x and h0 for siblings (q, k, v) that share them. No atomics: dA is summed over parts of the rows, and the
parts in a second stage, always in the same order. Called by ``sibo_triton.ops``.

The siblings' u lie side by side, as columns of one matrix. Where it can, a tile has columns of several siblings, whose
program loads x once for all. Where x is masked, or mixed before it is multiplied, a tile has columns of one, and its
neighbour finds x in the cache.

Compiled once for every K, dtypes, ranks, kind and number of siblings, and plan; whatever M, but for the length of the
parts, a power of two.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import targets
from .autotune import tuned
from .checks import check_dropout, check_dtype, check_low_rank, check_matrix, check_mix
from .down_weight_gradient_plan import cut, plan
from .dropout import column_hashes, keep_from_and_scale, keep_hashed, row_hashes, seed_keys
from .launching import BoundedCache, Launch, tensor_key, value_argument, value_key
from .partial_sums import sum_parts
from .precision import float32_is_exact, split_dot
from .siblings import DownGradients
from .targets import cdiv


@triton.jit(do_not_specialize=["M"])
def down_weight_gradient_kernel(
    p_x,  # [M, K]
    p_initial_residual,  # [M, K], or None
    p_u,  # tuples from here, with one element for each sibling: [M, r], contiguous
    p_partial,  # [parts, r, K], contiguous
    p_seed,  # int64, [1], or None
    lambda_,  # numbers, or pointers to one
    keep_from,  # these two from dropout.keep_from_and_scale
    dropout_scale,
    r,
    first,  # of the sibling's columns among those of all, of which a tile has BR
    M,  # numbers again
    r_tiles,  # of all siblings
    stride_x_m,
    stride_x_k,
    stride_h_m,
    stride_h_k,
    K: tl.constexpr,
    STEPS: tl.constexpr,  # tiles of rows to a part: constant, as every loop's bound
    SIBLINGS: tl.constexpr,
    SHARES_TILES: tl.constexpr,  # whether a tile has columns of several siblings; then neither masked nor mixed first
    HAS_INITIAL_RESIDUAL: tl.constexpr,
    LAMBDA_IS_TENSOR: tl.constexpr,  # a tuple
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
    i_r = tl.program_id(0) % r_tiles  # neighbouring programs share a tile of x, which then comes from the cache
    i_k = tl.program_id(0) // r_tiles % tl.cdiv(K, BK)
    i_part = tl.program_id(0) // r_tiles // tl.cdiv(K, BK)
    o_m = i_part.to(tl.int64) * (STEPS * BM) + tl.arange(0, BM)  # [BM]
    o_k = i_k * BK + tl.arange(0, BK)  # [BK]
    o_r = i_r * BR + tl.arange(0, BR)  # [BR]: among the columns of all siblings
    i_col = o_r if SHARES_TILES else i_r * BR  # what is chosen by it is then a [BR], else a number or pointer

    p_u_own, p_partial_own, r_own, first_own = p_u[0], p_partial[0], r[0], 0
    for i in tl.static_range(1, SIBLINGS):
        is_own = i_col >= first[i]
        p_u_own = tl.where(is_own, p_u[i], p_u_own)
        p_partial_own = tl.where(is_own, p_partial[i], p_partial_own)
        r_own = tl.where(is_own, r[i], r_own)
        first_own = tl.where(is_own, first[i], first_own)
    if HAS_INITIAL_RESIDUAL:
        b_lambda = tl.load(lambda_[0]).to(tl.float32) if LAMBDA_IS_TENSOR[0] else lambda_[0]
        for i in tl.static_range(1, SIBLINGS):
            b_lambda_i = tl.load(lambda_[i]).to(tl.float32) if LAMBDA_IS_TENSOR[i] else lambda_[i]
            b_lambda = tl.where(i_col >= first[i], b_lambda_i, b_lambda)
    if HAS_DROPOUT:
        p_seed_own, keep_from_own, scale_own = p_seed[0], keep_from[0], dropout_scale[0]
        for i in tl.static_range(1, SIBLINGS):
            is_own = i_col >= first[i]
            p_seed_own = tl.where(is_own, p_seed[i], p_seed_own)
            keep_from_own = tl.where(is_own, keep_from[i], keep_from_own)
            scale_own = tl.where(is_own, dropout_scale[i], scale_own)
        row_key1, row_key2, col_key1, col_key2 = seed_keys(p_seed_own)
        col1, col2 = column_hashes(o_k, col_key1, col_key2)

    # int64 throughout: a row times its stride passes 2^31 in long batches.
    o_k64 = o_k.to(tl.int64)
    o_r -= first_own
    m_k = o_k < K
    m_r = o_r < r_own
    b_p_u = p_u_own + o_m[:, None] * r_own + o_r[None, :]  # [BM, BR]
    b_p_x = p_x + o_m[:, None] * stride_x_m + o_k64[None, :] * stride_x_k  # [BM, BK]
    step_u = tl.cast(BM, tl.int64) * r_own
    step_x = tl.cast(BM, tl.int64) * stride_x_m
    if HAS_INITIAL_RESIDUAL:
        b_p_h = p_initial_residual + o_m[:, None] * stride_h_m + o_k64[None, :] * stride_h_k  # [BM, BK]
        step_h = tl.cast(BM, tl.int64) * stride_h_m

    # Transposed: the side of K, which is long, is then the one of which Hopper's tensor cores want 64.
    b_da = tl.zeros([BK, BR], dtype=tl.float32)  # [BK, BR]
    b_da_h = tl.zeros([BK, BR], dtype=tl.float32)  # [BK, BR], the part of h0
    for i in range(STEPS):
        m_m = o_m < M
        if K % BK == 0:
            m_x = m_m[:, None]
        else:
            m_x = m_m[:, None] & m_k[None, :]
        b_u = tl.load(b_p_u, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        b_x = tl.load(b_p_x, mask=m_x, other=0.0)  # [BM, BK]
        if HAS_DROPOUT:
            first_row = (i_part.to(tl.int64) * STEPS + i) * BM
            row1, row2 = row_hashes(first_row, tl.arange(0, BM), row_key1, row_key2)
            b_keep = keep_hashed(row1, row2, col1, col2, o_k, keep_from_own)  # [BM, BK]
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
        b_da *= scale_own

    b_p_partial = p_partial_own + (i_part.to(tl.int64) * r_own + o_r[None, :]) * K + o_k64[:, None]  # [BK, BR]
    tl.store(b_p_partial, b_da, mask=m_k[:, None] & m_r[None, :])


@triton.jit
def _drop(b, b_keep, SPLIT: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """Times 0 or 1, in a dtype that holds b and that the interpreter multiplies: NaN under the mask stays NaN."""
    if SPLIT:
        return b.to(tl.float32) * b_keep.to(tl.float32)
    else:
        return b.to(DOT_DTYPE) * b_keep.to(DOT_DTYPE)


def down_weight_gradient(
    siblings: Sequence[DownGradients],
    x: Tensor,  # [M, K]
    initial_residual: Tensor | None = None,  # [M, K]
) -> list[Tensor | None]:  # [r, K] each
    """``dA = u^T drop((1 - lambda) x + lambda h0)`` for layers that share x and h0, summed in float32 and rounded once.

    Where x, h0 and the adapter have one 16-bit dtype, u is rounded to it, and above rank 64 so is the mix; where dtypes
    meet, the products are within 1e-5 (norm-wise) of float32's, by ``precision.split_dot``.

    Siblings share a launch, and x in the cache, if their adapters have one dtype and all or none of them mix and drop;
    without dropout and up to rank 64 they share also what their programs load of it.

    Args:
        siblings: u, ``[M, r]``, contiguous; lambda, dropout and its seed; the dtypes of A and, unless None, of dA. A is
            not looked at. Any ranks.
        x: ``[M, K]``, float16, bfloat16 or float32, with any strides.
        initial_residual: h0, likewise, of the shape of x. Not read where ``lambda_`` is the number 0; if it is for all,
            it may be None.

    Returns:
        dA for each sibling, contiguous; None where its ``grad_dtype`` is. The same bits for the same arguments on the
        same kind of GPU.

    Raises:
        TypeError: a dtype that the kernel does not take.
        ValueError: a shape that does not fit, u not contiguous, or h0 or the seed missing, or
            a rate of dropout outside [0, 1).
    """
    key = (
        tuple(
            (
                tensor_key(of.u),
                of.adapter_dtype,
                value_key(of.lambda_),
                of.dropout_p,
                tensor_key(of.dropout_seed),
                of.grad_dtype,
            )
            for of in siblings
        ),
        tensor_key(x),
        tensor_key(initial_residual),
        x.device,
        targets.target_of(x.device),
        float32_is_exact(),
    )
    prepared = _launches.get(key)
    if prepared is None:
        prepared = _launches.keep(key, _prepared(siblings, x, initial_residual))
    parts: list[Tensor | None] = [None] * len(siblings)
    for kind in prepared:
        for i, of in zip(kind.siblings, _parts(kind, siblings, x, initial_residual), strict=True):
            parts[i] = of
    return sum_parts(parts, [sibling.grad_dtype for sibling in siblings])


_launches = BoundedCache()


class PreparedLaunch(NamedTuple):
    """A launch for siblings of one kind."""

    siblings: list[int]  # which of all
    launch: Launch | None  # none where there is nothing to sum
    mixes: bool
    drops: bool
    shapes: list[tuple[int, int, int]]  # of each sibling's parts


def _parts(kind: PreparedLaunch, siblings: Sequence[DownGradients], x: Tensor, h0: Tensor | None) -> list[Tensor]:
    """The parts of dA, ``[parts, r, K]``, for siblings of one kind."""
    if kind.launch is None:
        return [torch.zeros(shape, dtype=torch.float32, device=x.device) for shape in kind.shapes]
    own = [siblings[i] for i in kind.siblings]
    partial = [torch.empty(shape, dtype=torch.float32, device=x.device) for shape in kind.shapes]
    kind.launch(
        p_x=x,
        p_initial_residual=h0 if kind.mixes else None,
        p_u=tuple([of.u for of in own]),
        p_partial=tuple(partial),
        p_seed=tuple([of.dropout_seed for of in own]) if kind.drops else None,
        lambda_=tuple([value_argument(of.lambda_) for of in own]),
    )
    return partial


def _prepared(siblings: Sequence[DownGradients], x: Tensor, initial_residual: Tensor | None) -> list[PreparedLaunch]:
    """The launches for such arguments, checked and planned."""
    check_matrix("x", x, "M", "K")
    (M, K), kinds, prepared = x.shape, {}, []
    for i, sibling in enumerate(siblings):
        if sibling.grad_dtype is None:
            continue
        _check(sibling, x, initial_residual)
        r = sibling.u.shape[1]
        if M == 0 or K == 0 or r == 0:
            prepared.append(PreparedLaunch([i], None, False, False, [(1, r, K)]))
        else:
            kinds.setdefault(sibling.kind, []).append(i)
    return prepared + [_prepared_for(own, siblings, x, initial_residual) for own in kinds.values()]


def _check(sibling: DownGradients, x: Tensor, initial_residual: Tensor | None) -> None:
    check_low_rank("u", sibling.u)
    check_matrix("x", x, sibling.u.shape[0], "K", "u")
    check_mix(sibling.lambda_, sibling.mixes, initial_residual)
    check_dropout(sibling.dropout_p, sibling.dropout_seed)
    check_dtype("adapter_dtype", sibling.adapter_dtype)
    check_dtype("grad_dtype", sibling.grad_dtype)
    if sibling.mixes:
        check_matrix("initial_residual", initial_residual, *x.shape, "x")


def _prepared_for(places: list[int], siblings: Sequence[DownGradients], x: Tensor, h0: Tensor | None) -> PreparedLaunch:
    own = [siblings[i] for i in places]
    (M, K), ranks = x.shape, tuple(sibling.u.shape[1] for sibling in own)
    kind = own[0].kind
    _, mixes, drops = kind
    h0_strides, h0_dtype = (h0.stride(), h0.dtype) if mixes else ((0, 0), None)
    target = targets.target_of(x.device)
    chosen = plan(ranks, x.dtype, h0_dtype, kind, target, float32_is_exact())
    product, product_h = chosen.product, chosen.product_h
    rates = [keep_from_and_scale(sibling.dropout_p) for sibling in own]

    def prepare(config: dict[str, int]) -> PreparedLaunch:
        BR = config["BR"]
        programs = chosen.programs * target.multiprocessors
        tiles, parts, steps = cut(M, K, chosen.columns, config["BM"], config["BK"], BR, programs)
        arguments = {
            "keep_from": tuple(keep_from for keep_from, _ in rates) if drops else None,
            "dropout_scale": tuple(scale for _, scale in rates) if drops else None,
            "r": ranks,
            "first": chosen.first,
            "M": M,
            "r_tiles": cdiv(chosen.columns, BR),
            "stride_x_m": x.stride(0),
            "stride_x_k": x.stride(1),
            "stride_h_m": h0_strides[0],
            "stride_h_k": h0_strides[1],
            "K": K,
            "STEPS": steps,
            "SIBLINGS": len(own),
            "SHARES_TILES": chosen.shares_tiles,
            "HAS_INITIAL_RESIDUAL": mixes,
            "LAMBDA_IS_TENSOR": tuple(isinstance(sibling.lambda_, Tensor) for sibling in own),
            "HAS_DROPOUT": drops,
            "MIX_FIRST": chosen.mix_first,
            "SPLIT_X": product.split_a,
            "SPLIT_U": product.split_b,
            "DOT_DTYPE": product.tl_dtype,
            "SPLIT_H": product_h.split_a,
            "SPLIT_U_H": product_h.split_b,
            "DOT_DTYPE_H": product_h.tl_dtype,
            **config,
        }
        launch = Launch(down_weight_gradient_kernel, (tiles * parts,), x.device, arguments)
        return PreparedLaunch(places, launch, mixes, drops, [(parts, r, K) for r in ranks])

    key = ("weight gradient", M.bit_length(), K, ranks, x.dtype, h0_dtype, kind, product, x.device)
    return prepare(tuned(key, chosen.config, lambda config: _parts(prepare(config), siblings, x, h0), "BM"))

"""The PyTorch backend: layers that share x and h0, as one matrix of stacked ranks where no mask tells them apart.

Same functions as in ``triton_backend.py``. With masks each sibling has its own passes, as each has
its own mask.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from sibo_triton.kernels.siblings import DownGradients, DownProjection, UpGradients, UpProjection, kept_dtype
from sibo_triton.ops import plain
from sibo_triton.ops.activations import activation_gradient
from sibo_triton.ops.plain import add_up, up
from sibo_triton.ops.tensors import as_scalar
from sibo_triton.reference import ACTIVATIONS

__all__ = [
    "add_up",
    "down_activated_siblings",
    "down_backward_siblings",
    "down_siblings",
    "low_rank_siblings",
    "replayed",
    "up",
    "up_backward_siblings",
]


def down_activated_siblings(
    x: Tensor,  # [M, K]
    siblings: Sequence[DownProjection],
    initial_residual: Tensor | None = None,  # [M, K]
) -> list[tuple[Tensor, Tensor | None, Tensor]]:  # [M, r] each
    """``p = drop(x~) W^T + b``, d, where wanted, and f(p), of bottleneck adapters."""
    results = []
    for s, (p, d) in zip(siblings, _down_siblings(x, siblings, initial_residual), strict=True):
        assert s.activation is not None
        p = p if s.bias is None else p + s.bias
        kept = kept_dtype(x.dtype, s.lora_a.dtype)
        results.append((p.to(kept), None if d is None else d.to(kept), ACTIVATIONS[s.activation](p).to(kept)))
    return results


def down_siblings(
    x: Tensor,  # [M, K]
    siblings: Sequence[DownProjection],
    initial_residual: Tensor | None = None,  # [M, K]
) -> list[tuple[Tensor, Tensor | None]]:  # [M, r] each
    """t and, where wanted, d of each sibling: :func:`.plain.down`, in :func:`~..kernels.siblings.kept_dtype`."""
    kept = [kept_dtype(x.dtype, s.lora_a.dtype) for s in siblings]
    results = _down_siblings(x, siblings, initial_residual)
    return [(t.to(dtype), None if d is None else d.to(dtype)) for dtype, (t, d) in zip(kept, results, strict=True)]


def _down_siblings(
    x: Tensor, siblings: Sequence[DownProjection], initial_residual: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    if not _stack([s.dropout_p for s in siblings], [s.lora_a.dtype for s in siblings]):
        return [plain.down(x, s.lora_a, initial_residual, *s[1:5]) for s in siblings]
    ranks = [s.lora_a.shape[0] for s in siblings]
    lora_a = torch.cat([s.lora_a for s in siblings])
    common = _common_lambda([s.lambda_ for s in siblings])
    if common is not None and not any(s.difference for s in siblings):
        return [(t, None) for t in plain.down(x, lora_a, initial_residual, common)[0].split(ranks, 1)]
    t_x, d = plain.down(x, lora_a, initial_residual, difference=True)
    assert d is not None
    results: list[tuple[Tensor, Tensor | None]] = []
    for s, own_t, own_d in zip(siblings, t_x.split(ranks, 1), d.split(ranks, 1), strict=True):
        t = own_t + as_scalar(s.lambda_, own_t.dtype) * own_d if s.mixes else own_t
        results.append((t, own_d if s.difference else None))
    return results


def low_rank_siblings(
    x: Tensor,  # [M, K]
    siblings: Sequence[DownProjection],
    ups: Sequence[UpProjection],
    initial_residual: Tensor | None,  # [M, K]
    dtype: torch.dtype,
) -> list[Tensor]:  # [M, N] each
    """``y = s (t B^T + b_B) + b`` of each sibling, in a dtype; t is not kept."""
    ts = down_siblings(x, siblings, initial_residual)
    return [up(t, of.lora_b, of.scaling, dtype, of.lora_bias, of.base_bias) for (t, _), of in zip(ts, ups, strict=True)]


def up_backward_siblings(
    siblings: Sequence[UpGradients],
) -> list[tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """u, dB, in the dtype that it is asked in, and the sum of dY over its rows, of each sibling, where wanted.

    See :func:`.plain.up_backward`.
    """
    results = []
    for s in siblings:
        t, p, wants_grad_b = s.t, s.t, s.grad_dtype is not None
        wide = torch.promote_types(s.lora_b.dtype, torch.float32)
        sum_dtype = torch.promote_types(wide, s.grad_y.dtype)
        if s.activation is not None and p is not None:
            p = p.to(wide)
            t = ACTIVATIONS[s.activation](p)
        u, grad_b = plain.up_backward(s.grad_y, t, s.lora_b, s.scaling, s.wants_u, wants_grad_b)
        if s.activation is not None and u is not None and p is not None and t is not None:
            u = activation_gradient(s.activation, u, p, t)
        results.append((u, _in(grad_b, s.grad_dtype), s.grad_y.sum(0, dtype=sum_dtype) if s.wants_sum else None))
    return results


def down_backward_siblings(
    siblings: Sequence[DownGradients],
    x: Tensor | None,  # [M, K]
    initial_residual: Tensor | None,  # [M, K]
    dx_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    base: Tensor | None = None,  # [M, K]
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:  # [r, K] each, [M, K], [M, K]
    """dA of each sibling where wanted, and the sums over the siblings of dx and of dh0.

    Args:
        siblings: u, A, lambda and dropout of each.
        x: None if no dA is wanted.
        initial_residual: h0; None if no dA is wanted, or nothing mixes.
        dx_dtype, residual_dtype: of dx and dh0; None for what is not wanted.
        base: what dx is added to, or None.

    Returns:
        dA, in the dtypes that they are asked in; dx; dh0. None for what is not wanted.
    """
    stack = _stack([s.dropout_p for s in siblings], [s.adapter_dtype for s in siblings])
    alike = len({(s.grad_dtype is None, s.lora_a is None) for s in siblings}) == 1
    if len(siblings) == 1 or not stack or not alike:
        return _one_by_one(siblings, x, initial_residual, dx_dtype, residual_dtype, base)
    ranks = [s.u.shape[1] for s in siblings]
    first, u = siblings[0], torch.cat([s.u for s in siblings], 1)
    wants_input = first.lora_a is not None and (dx_dtype is not None or residual_dtype is not None)
    lora_a = torch.cat([s.lora_a for s in siblings if s.lora_a is not None]) if wants_input else None
    x = x if first.grad_dtype is not None else None
    common = _common_lambda([s.lambda_ for s in siblings])
    if common is not None:
        rest = (0.0, None, first.adapter_dtype, dx_dtype, residual_dtype, base)
        grad_a, dx, dh0 = plain.down_backward(u, lora_a, x, initial_residual, common, *rest)
    else:  # the shares of x and h0 are factors of u's columns
        of_h = torch.cat([u.new_ones(r) * as_scalar(s.lambda_, u.dtype) for r, s in zip(ranks, siblings, strict=True)])
        u_x, u_h, dtype = u * (1 - of_h), u * of_h, first.adapter_dtype
        grad_a, dx, _ = plain.down_backward(u_x, lora_a, x, None, 0.0, 0.0, None, dtype, dx_dtype, None, base)
        h0 = None if x is None else initial_residual
        more, dh0, _ = plain.down_backward(u_h, lora_a, h0, None, 0.0, 0.0, None, dtype, residual_dtype, None)
        grad_a = grad_a if more is None or grad_a is None else grad_a + more
    if grad_a is None:
        return [None] * len(siblings), dx, dh0
    return [_in(own, s.grad_dtype) for own, s in zip(grad_a.split(ranks), siblings, strict=True)], dx, dh0


def replayed(
    key: Hashable, tensors: Sequence[Tensor | None], compute: Callable[[], Sequence[Tensor | None]]
) -> Sequence[Tensor | None]:
    """What ``compute`` returns: there are no launches to repeat."""
    return compute()


def _one_by_one(
    siblings: Sequence[DownGradients],
    x: Tensor | None,
    initial_residual: Tensor | None,
    dx_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    base: Tensor | None,
) -> tuple[list[Tensor | None], Tensor | None, Tensor | None]:
    grads, dx, dh0 = [], None, None
    for s in siblings:
        own_x = None if s.grad_dtype is None else x
        mixing = (s.lambda_, s.dropout_p, s.dropout_seed)
        of_residual = residual_dtype if s.mixes else None
        grad_a, own_dx, own_dh0 = plain.down_backward(
            s.u, s.lora_a, own_x, initial_residual, *mixing, s.adapter_dtype, dx_dtype, of_residual, base
        )
        base = None  # only to the first
        grads.append(_in(grad_a, s.grad_dtype))
        dx = own_dx if dx is None or own_dx is None else dx.add_(own_dx)
        dh0 = own_dh0 if dh0 is None else dh0 if own_dh0 is None else dh0.add_(own_dh0)
    return grads, dx, dh0


def _stack(rates: list[float], dtypes: list[torch.dtype]) -> bool:
    """Whether the siblings can be one matrix, and are more than one."""
    return len(rates) > 1 and not any(rates) and len(set(dtypes)) == 1


def _common_lambda(lambdas: list[float | Tensor]) -> float | None:
    """The number lambda that all siblings have, or None."""
    first = lambdas[0]
    if isinstance(first, Tensor) or any(isinstance(other, Tensor) or other != first for other in lambdas):
        return None
    return first


def _in(gradient: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return gradient if gradient is None or dtype is None else gradient.to(dtype)

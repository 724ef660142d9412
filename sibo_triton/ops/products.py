"""The products of an adapter in the order that moves the fewest bytes, and their gradients, written by hand.

LoRA, ``t = drop(x~) A^T`` and ``y = x W0^T + b + s (t B^T + b_B)``, and the bottleneck adapter, which has a bias and an
activation f between its two products: ``p = drop(x~) W_down^T + b_down``, and f(p) takes the place of t.

Forward: t (and f of it), then the low-rank product into a fresh y, then the frozen GEMM accumulates onto it (beta = 1).
Backward: ``u = s (dY B) f'(p)`` and dB, then dA, then the low-rank part of dx into a fresh dx, onto which the frozen
GEMM accumulates.

Kept for the backward are x and h0 themselves, t (or p) and, if lambda learns, ``d = A drop(h0 - x)``, both ``[M, r]``,
and the seed of the mask: nothing of the size of x that was not there before, no cast of it, no mask.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sibo_triton.kernels.siblings import DownGradients, DownProjection, UpGradients
from sibo_triton.ops.activations import activation_gradient
from sibo_triton.ops.arguments import Inputs, Saved, Settings, scaling_of
from sibo_triton.ops.dispatch import implementation
from sibo_triton.ops.tensors import as_matrix, cast, fresh_like, shaped_like, without_autocast
from sibo_triton.reference import ACTIVATIONS


class Down(NamedTuple):
    """Of one layer, ``[M, r]`` each."""

    t: Any  # or p, of a bottleneck adapter
    difference: Any
    activated: Any  # f(p), or t where there is no f


def down(settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool]) -> list[Down]:
    """The down-projections of layers that share x and h0, and either all have an activation or none."""
    with without_autocast(inputs[0].x.device.type):
        x, h0, matrices = read_by_down(settings, inputs)
        return _down(settings, x, down_projections(settings, inputs, matrices, wants_differences), h0)


def _down(settings: Sequence[Settings], x: Tensor, siblings: Sequence[DownProjection], h0: Tensor | None) -> list[Down]:
    ops, h0 = implementation(settings[0].backend), None if h0 is None else as_matrix(h0)
    if settings[0].activation is None:
        return [Down(t, difference, t) for t, difference in ops.down_siblings(x, siblings, h0)]
    return [Down(*result) for result in ops.down_activated_siblings(x, siblings, h0)]


def read_by_down(
    settings: Sequence[Settings], inputs: Sequence[Inputs]
) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
    """x, ``[M, K]``, h0 as it is, and each layer's A and B in its adapter's dtype."""
    h0 = next((of.initial_residual for of in inputs if of.initial_residual is not None), None)
    matrices = [
        (cast(of.lora_a, own.adapter_dtype), cast(of.lora_b, own.adapter_dtype))
        for own, of in zip(settings, inputs, strict=True)
    ]
    return as_matrix(inputs[0].x), h0, matrices


def down_projections(
    settings: Sequence[Settings],
    inputs: Sequence[Inputs],
    matrices: Sequence[tuple[Tensor, Tensor]],
    wants_differences: Sequence[bool],
) -> list[DownProjection]:
    """Each layer's part of the pass over x, as the backends take it."""
    return [
        DownProjection(
            a,
            own.lambda_ if of.lambda_ is None else of.lambda_,
            own.dropout_p,
            of.seed,
            wants,
            of.down_bias,
            own.activation,
        )
        for own, of, (a, _), wants in zip(settings, inputs, matrices, wants_differences, strict=True)
    ]


def forward(
    settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool]
) -> tuple[list[Tensor], list[Down]]:
    """y, ``[..., N]``, and what it is made of, of layers that share x and h0."""
    with without_autocast(inputs[0].x.device.type):
        x, h0, matrices = read_by_down(settings, inputs)
        bases = [None if of.base is None else as_matrix(of.base) for of in inputs]

        def compute() -> list[Tensor | None]:
            siblings = down_projections(settings, inputs, matrices, wants_differences)
            found: list[Tensor | None] = []
            for i, own in enumerate(_down(settings, x, siblings, h0)):
                f = None if settings[i].activation is None else own.activated
                y = _up(settings[i], inputs[i], x, bases[i], own.activated, matrices[i][1])
                found += (own.t, own.difference, f, y)
            return found

        key, tensors, _ = _asked_forward(settings, inputs, wants_differences, (x, h0, matrices, bases))
        found = implementation(settings[0].backend).replayed(key, tensors, compute)
        ys, downs = [], []
        for i, (own, of) in enumerate(zip(settings, inputs, strict=True)):
            t, difference, f, y = found[PER_LAYER * i : PER_LAYER * (i + 1)]
            downs.append(Down(t, difference, t if f is None else f))
            ys.append(fresh_like(of.x, y) if of.weight is None else with_frozen(y, of.x, x, of.weight, own.dtype))
        return ys, downs


#: What the launches of a forward, and of a backward behind dx, dh0 and each dA, return for a layer: t, d, f(p) and the
#: low-rank y; and u, dB, the sum of dY and ds.
PER_LAYER = 4


def asked_of_forward(
    settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool]
) -> tuple[Hashable, list[Tensor | None], list[tuple[Tensor, Tensor]]]:
    """By what :func:`forward` has its launches repeated, what they read, and each layer's A and B among that.

    Not under autocast.
    """
    bases = [None if of.base is None else as_matrix(of.base) for of in inputs]
    return _asked_forward(settings, inputs, wants_differences, (*read_by_down(settings, inputs), bases))


def _asked_forward(
    settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool], read: tuple
) -> tuple[Hashable, list[Tensor | None], list[tuple[Tensor, Tensor]]]:
    x, h0, matrices, bases = read
    tensors = [x, h0]
    for of, (a, b), base in zip(inputs, matrices, bases, strict=True):
        tensors += (base, a, b, of.lora_bias, of.down_bias, of.bias, of.lambda_, of.scaling, of.seed)
    return (tuple(settings), tuple(wants_differences), inputs[0].weight is None), tensors, matrices


def output(settings: Settings, inputs: Inputs, x: Tensor, t: Tensor) -> Tensor:
    """y, ``[..., N]``, of x, ``[M, K]``, and t (or f(p)): the low-rank product and what it is added to."""
    with without_autocast(x.device.type):
        base = None if inputs.base is None else as_matrix(inputs.base)
        y = _up(settings, inputs, x, base, t, cast(inputs.lora_b, settings.adapter_dtype))
        return (
            fresh_like(inputs.x, y)
            if inputs.weight is None
            else with_frozen(y, inputs.x, x, inputs.weight, settings.dtype)
        )


def _up(settings: Settings, inputs: Inputs, x: Tensor, base: Tensor | None, t: Tensor, b: Tensor) -> Tensor:
    """The low-rank product, ``[M, N]``, plus the base output, or x in series; plus the frozen bias else."""
    ops, scaling = implementation(settings.backend), scaling_of(settings, inputs)
    if inputs.weight is None:
        return ops.add_up(x if base is None else base, t, b, scaling, inputs.lora_bias)
    return ops.up(t, b, scaling, settings.dtype, inputs.lora_bias, inputs.bias)


def with_frozen(y: Tensor, x: Tensor, matrix: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """y, ``[..., N]``: the low-rank product, ``[M, N]``, and onto it that of x, as a matrix, and the frozen weight.

    Not under autocast.
    """
    matrix, weight = cast(matrix, dtype), cast(weight, dtype).t()
    if torch._C._len_torch_dispatch_stack() > 0:  # selective checkpointing keeps what an operator returned
        return shaped_like(x, torch.addmm(y, matrix, weight))
    y.addmm_(matrix, weight)
    return fresh_like(x, y)


def _through_t(wants: Inputs) -> tuple[bool, bool]:
    """Whether dx~ is wanted, and whether u, the gradient of t, is."""
    wants_input = wants.x or wants.initial_residual
    return wants_input, wants_input or wants.lora_a or wants.lambda_ or wants.down_bias


def saved_for(settings: Settings, inputs: Inputs, wants: Inputs, t: Tensor, difference: Tensor | None) -> Saved:
    """What to keep for the gradients that are wanted."""
    wants_input, wants_u = _through_t(wants)
    reads_p = settings.activation is not None and wants_u
    return Saved(
        x=inputs.x if wants.lora_a or wants.weight else None,
        weight=inputs.weight if wants.x else None,
        lora_a=inputs.lora_a if wants_input else None,
        lora_b=inputs.lora_b if wants_u or wants.lora_b or wants.scaling else None,
        lora_bias=inputs.lora_bias if wants.scaling else None,
        initial_residual=inputs.initial_residual if wants.lora_a else None,
        lambda_=inputs.lambda_,
        scaling=inputs.scaling,
        seed=inputs.seed,
        t=t if wants.lora_b or wants.scaling or reads_p else None,
        difference=difference if wants.lambda_ else None,
    )


def backward(
    settings: Sequence[Settings],
    saved: Sequence[Saved],
    grads_y: Sequence[Tensor],
    wants: Sequence[Inputs],
    in_series: bool = False,
) -> list[Inputs]:
    """The gradients that are wanted of layers that share x and h0; None for the others.

    Args:
        settings, saved, wants: of each layer. They agree in x, h0 and their dtypes.
        grads_y: dY of each, ``[..., N]``.
        in_series: whether x is what the low-rank products are added to, so that its gradient has dY as a part.

    Returns:
        For each layer the gradients of what is its own, each in a dtype that autograd casts to its tensor's; those of x
        and h0 are sums, and the first layer's.
    """
    with without_autocast(grads_y[0].device.type):
        gs = [as_matrix(grad_y) for grad_y in grads_y]  # [M, N]
        ups, grads_a, dx, dh = _low_rank_backward(settings, saved, gs, wants, in_series)
        leading = grads_y[0].shape[:-1]
        if dx is not None:
            for i, (own, kept, g) in enumerate(zip(settings, saved, gs, strict=True)):
                if kept.weight is not None:
                    dx.addmm_(g, cast(kept.weight, own.dtype))
                elif in_series and i > 0:
                    dx.add_(g)
            dx = cast(dx, settings[0].x_dtype).view(*leading, dx.shape[1])
        dh = None if dh is None else dh.view(*leading, dh.shape[1])
        gradients = []
        for i, (own, kept, wanted, g, up) in enumerate(zip(settings, saved, wants, gs, ups, strict=True)):
            of_x, of_h = (dx, dh) if i == 0 else (None, None)
            gradients.append(
                Inputs(
                    base=grads_y[i] if wanted.base else None,
                    x=of_x,
                    weight=g.t() @ cast(as_matrix(kept.x), own.dtype) if wanted.weight else None,
                    bias=up.sum if wanted.bias else None,
                    lora_a=grads_a[i],
                    lora_b=up.grad_b,
                    lora_bias=up.sum * scaling_of(own, kept) if wanted.lora_bias else None,
                    down_bias=up.u.sum(0) if wanted.down_bias else None,
                    initial_residual=of_h,
                    lambda_=(up.u * kept.difference).sum().reshape(kept.lambda_.shape) if wanted.lambda_ else None,
                    scaling=up.scaling,
                    seed=None,
                )
            )
    return gradients


def _low_rank_backward(
    settings: Sequence[Settings], saved: Sequence[Saved], gs: list[Tensor], wants: Sequence[Inputs], in_series: bool
) -> tuple[list[_Up], Sequence[Any], Tensor | None, Tensor | None]:
    """What comes of each dY, ``[M, N]``, dA of each layer, and the low-rank parts of dx and dh0, ``[M, K]``."""
    skip = gs[0] if in_series and wants[0].x else None
    has_frozen = any(kept.weight is not None for kept in saved)
    key, tensors, matrices = asked_of_backward(settings, saved, gs, wants, in_series)
    x, h0 = tensors[len(gs) : len(gs) + 2]

    def compute() -> list[Tensor | None]:
        ups = _up_backward(settings, saved, gs, wants, matrices)
        shared = (None if x is None else as_matrix(x), None if h0 is None else as_matrix(h0), skip)
        grads_a, dx, dh = _down_backward(settings, saved, ups, wants, matrices, shared, has_frozen)
        found = [dx, dh, *grads_a]
        for up, wanted in zip(ups, wants, strict=True):
            u = up.u if wanted.lambda_ or wanted.down_bias else None
            found += (u, up.grad_b, up.sum, up.scaling)
        return found

    dx, dh, *rest = implementation(settings[0].backend).replayed(key, tensors, compute)
    count = len(gs)
    ups = [_Up(*rest[i : i + PER_LAYER]) for i in range(count, len(rest), PER_LAYER)]
    return ups, rest[:count], dx, dh


def asked_of_backward(
    settings: Sequence[Settings], saved: Sequence[Saved], gs: list[Tensor], wants: Sequence[Inputs], in_series: bool
) -> tuple[Hashable, list[Tensor | None], list[tuple[Tensor | None, Tensor | None]]]:
    """By what :func:`backward` has its launches repeated, the tensors that they read, and each layer's A and B."""
    x = next((kept.x for kept in saved if kept.x is not None), None)
    h0 = next((kept.initial_residual for kept in saved if kept.initial_residual is not None), None)
    tensors, matrices = [*gs, x, h0], []
    for own, kept in zip(settings, saved, strict=True):
        a = None if kept.lora_a is None else cast(kept.lora_a, own.adapter_dtype)
        b = None if kept.lora_b is None else cast(kept.lora_b, own.adapter_dtype)
        matrices.append((a, b))
        tensors += (a, b, kept.t, kept.lora_bias, kept.lambda_, kept.scaling, kept.seed)
    dtypes = tuple([None if kept.lora_b is None else kept.lora_b.dtype for kept in saved])
    has_frozen = any(kept.weight is not None for kept in saved)
    return (tuple(settings), tuple(wants), in_series, has_frozen, dtypes), tensors, matrices


class _Up(NamedTuple):
    """What comes of one layer's dY, where it is wanted."""

    u: Any = None
    grad_b: Any = None
    sum: Any = None  # of dY over its rows
    scaling: Any = None  # ds


def _up_backward(
    settings: Sequence[Settings],
    saved: Sequence[Saved],
    gs: list[Tensor],
    wants: Sequence[Inputs],
    matrices: Sequence[tuple[Any, Any]],  # A and B of each, in its adapter's dtype
) -> list[_Up]:
    ops, results, asked, places = implementation(settings[0].backend), [_Up()] * len(gs), [], []
    for i, (own, kept, g, wanted, (_, b)) in enumerate(zip(settings, saved, gs, wants, matrices, strict=True)):
        wants_u, wants_sum = _through_t(wanted)[1], wanted.bias or wanted.lora_bias
        if wanted.scaling:
            results[i] = _with_scaling(own, kept, g, wanted, b)
        elif wants_u or wanted.lora_b:
            grad_dtype = kept.lora_b.dtype if wanted.lora_b else None
            scaling = scaling_of(own, kept)
            asked.append(UpGradients(g, kept.t, b, scaling, wants_u, grad_dtype, wants_sum, own.activation))
            places.append(i)
        elif wants_sum:
            wide = torch.promote_types(torch.promote_types(own.adapter_dtype, torch.float32), g.dtype)
            results[i] = _Up(sum=g.sum(0, dtype=wide))
    if asked:
        for i, result in zip(places, ops.up_backward_siblings(asked), strict=True):
            results[i] = _Up(*result)
    return results


def _with_scaling(own: Settings, kept: Saved, g: Tensor, wanted: Inputs, b: Tensor) -> _Up:
    """With ``ds = <dY, t B^T + b_B>``, taken in the rank, from u without its s, which may be 0, and f'(p)."""
    wide = torch.promote_types(own.adapter_dtype, torch.float32)
    t = kept.t.to(wide)
    activated = t if own.activation is None else ACTIVATIONS[own.activation](t)
    grad_dtype = wide if wanted.lora_b else None
    wants_sum = wanted.bias or wanted.lora_bias or kept.lora_bias is not None
    asked = UpGradients(g, activated, b, 1.0, True, grad_dtype, wants_sum)
    ((u, grad_b, grad_sum),) = implementation(own.backend).up_backward_siblings([asked])
    grad_scaling = (u * activated).sum()
    if kept.lora_bias is not None:
        grad_scaling = grad_scaling + (grad_sum * kept.lora_bias).sum()
    scaling = kept.scaling.to(wide)
    u, grad_b = u * scaling, None if grad_b is None else grad_b * scaling
    if own.activation is not None:
        u = activation_gradient(own.activation, u, t, activated)
    return _Up(u, grad_b, grad_sum, grad_scaling.reshape(kept.scaling.shape))


def _down_backward(
    settings: Sequence[Settings],
    saved: Sequence[Saved],
    ups: Sequence[_Up],
    wants: Sequence[Inputs],
    matrices: Sequence[tuple[Any, Any]],
    shared: tuple[Tensor | None, Tensor | None, Tensor | None],  # x, h0 and what is added to dx
    has_frozen: bool,  # whether frozen products accumulate onto dx
) -> tuple[list[Any], Tensor | None, Tensor | None]:
    """dA of each layer, and the low-rank part of dx, plus the skip's, and of dh0, where wanted."""
    grads_a: list[Any] = [None] * len(ups)
    asked, places = [], []
    for i, (own, kept, up, wanted, (a, _)) in enumerate(zip(settings, saved, ups, wants, matrices, strict=True)):
        if wanted.lora_a or _through_t(wanted)[0]:
            lambda_ = own.lambda_ if kept.lambda_ is None else kept.lambda_
            mixing = (lambda_, own.dropout_p, kept.seed)
            grad_dtype = kept.lora_b.dtype if wanted.lora_a else None
            asked.append(DownGradients(up.u, a, own.adapter_dtype, *mixing, grad_dtype))
            places.append(i)
    if not asked:
        return grads_a, None, None
    own, (x, h0, skip) = settings[0], shared
    dx_dtype = None if not wants[0].x else own.dtype if has_frozen else own.x_dtype
    residual_dtype = next(
        (of.residual_dtype for of, w in zip(settings, wants, strict=True) if w.initial_residual), None
    )
    found, dx, dh = implementation(own.backend).down_backward_siblings(asked, x, h0, dx_dtype, residual_dtype, skip)
    for i, grad_a in zip(places, found, strict=True):
        grads_a[i] = grad_a
    return grads_a, dx, dh

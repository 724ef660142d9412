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
from sibo_triton.ops.arguments import Inputs, Saved, Settings, lambda_of, scaling_of
from sibo_triton.ops.dispatch import implementation
from sibo_triton.ops.tensors import as_matrix, cast, fresh_like, shaped_like, without_autocast
from sibo_triton.reference import ACTIVATIONS


class Down(NamedTuple):
    """The down-projection of one layer, ``[M, r]`` each."""

    t: Any  # a bottleneck adapter's pre-activation p
    difference: Any
    activated: Any  # f(p), or t without an activation


class Request(NamedTuple):
    """What identifies recorded launches (`kernels/replay.py`), and what they read."""

    key: Hashable  # all that the launches depend on beside the tensors
    tensors: list[Tensor | None]  # in the order in which they are recorded
    matrices: list[tuple[Any, Any]]  # A and B of each layer, in its adapter's dtype, which are among the tensors


def down(settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool]) -> list[Down]:
    """The down-projections of layers that share x and h0, and either all have an activation or none."""
    with without_autocast(inputs[0].x.device.type):
        x, h0, matrices = down_inputs(settings, inputs)
        return _down(settings, x, down_projections(settings, inputs, matrices, wants_differences), h0)


def _down(settings: Sequence[Settings], x: Tensor, siblings: Sequence[DownProjection], h0: Tensor | None) -> list[Down]:
    ops, h0 = implementation(settings[0].backend), None if h0 is None else as_matrix(h0)
    if settings[0].activation is None:
        return [Down(t, difference, t) for t, difference in ops.down_siblings(x, siblings, h0)]
    return [Down(*result) for result in ops.down_activated_siblings(x, siblings, h0)]


def down_inputs(
    settings: Sequence[Settings], inputs: Sequence[Inputs]
) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
    """x, ``[M, K]``, h0 as it is, and each layer's A and B in its adapter's dtype."""
    h0 = next((layer.initial_residual for layer in inputs if layer.initial_residual is not None), None)
    matrices = [
        (cast(layer.lora_a, setting.adapter_dtype), cast(layer.lora_b, setting.adapter_dtype))
        for setting, layer in zip(settings, inputs, strict=True)
    ]
    return as_matrix(inputs[0].x), h0, matrices


def down_projections(
    settings: Sequence[Settings],
    inputs: Sequence[Inputs],
    matrices: Sequence[tuple[Tensor, Tensor]],
    wants_differences: Sequence[bool],
) -> list[DownProjection]:
    """Each layer's down-projection, as the backends take it."""
    return [
        DownProjection(
            a,
            lambda_of(setting, layer),
            setting.dropout_p,
            layer.seed,
            wants_difference,
            layer.down_bias,
            setting.activation,
        )
        for setting, layer, (a, _), wants_difference in zip(settings, inputs, matrices, wants_differences, strict=True)
    ]


def forward(
    settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool]
) -> tuple[list[Tensor], list[Down]]:
    """y, ``[..., N]``, and the down-projection, of each of some layers that share x and h0."""
    with without_autocast(inputs[0].x.device.type):
        x, h0, matrices = down_inputs(settings, inputs)
        bases = [None if layer.base is None else as_matrix(layer.base) for layer in inputs]

        def compute() -> list[Tensor | None]:
            siblings = down_projections(settings, inputs, matrices, wants_differences)
            results: list[Tensor | None] = []
            for i, result in enumerate(_down(settings, x, siblings, h0)):
                f = None if settings[i].activation is None else result.activated
                y = _up(settings[i], inputs[i], x, bases[i], result.activated, matrices[i][1])
                results += (result.t, result.difference, f, y)
            return results

        key, tensors, _ = _forward_request(settings, inputs, wants_differences, (x, h0, matrices, bases))
        results = implementation(settings[0].backend).replayed(key, tensors, compute)
        ys, downs = [], []
        for i, layer in enumerate(inputs):
            t, difference, f, y = results[PER_LAYER * i : PER_LAYER * (i + 1)]
            downs.append(Down(t, difference, t if f is None else f))
            if layer.weight is None:
                ys.append(fresh_like(layer.x, y))
            else:
                ys.append(with_frozen(y, layer.x, x, layer.weight, settings[i].dtype))
        return ys, downs


#: Results of recorded launches for each layer. Forward: t, d, f(p) and the low-rank y. Backward, after dx, dh0 and the
#: dA of all layers: u, dB, the sum of dY and ds.
PER_LAYER = 4


def forward_request(
    settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool]
) -> Request:
    """What identifies the launches of :func:`forward`. Call it with autocast disabled."""
    bases = [None if layer.base is None else as_matrix(layer.base) for layer in inputs]
    return _forward_request(settings, inputs, wants_differences, (*down_inputs(settings, inputs), bases))


def _forward_request(
    settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool], read: tuple
) -> Request:
    x, h0, matrices, bases = read
    tensors = [x, h0]
    for layer, (a, b), base in zip(inputs, matrices, bases, strict=True):
        tensors += (base, a, b, layer.lora_bias, layer.down_bias, layer.bias, layer.lambda_, layer.scaling, layer.seed)
    return Request((tuple(settings), tuple(wants_differences), inputs[0].weight is None), tensors, matrices)


def output(settings: Settings, inputs: Inputs, x: Tensor, t: Tensor) -> Tensor:
    """y, ``[..., N]``, of x, ``[M, K]``, and t (or f(p)): the low-rank product and what it is added to."""
    with without_autocast(x.device.type):
        base = None if inputs.base is None else as_matrix(inputs.base)
        y = _up(settings, inputs, x, base, t, cast(inputs.lora_b, settings.adapter_dtype))
        if inputs.weight is None:
            return fresh_like(inputs.x, y)
        return with_frozen(y, inputs.x, x, inputs.weight, settings.dtype)


def _up(settings: Settings, inputs: Inputs, x: Tensor, base: Tensor | None, t: Tensor, b: Tensor) -> Tensor:
    """The low-rank product, ``[M, N]``, plus the frozen bias; without a frozen weight plus the base output, or x."""
    ops, scaling = implementation(settings.backend), scaling_of(settings, inputs)
    if inputs.weight is None:
        return ops.add_up(x if base is None else base, t, b, scaling, inputs.lora_bias)
    return ops.up(t, b, scaling, settings.dtype, inputs.lora_bias, inputs.bias)


def with_frozen(y: Tensor, x: Tensor, matrix: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``y + x W0^T``, ``[..., N]``, into the low-rank product y, ``[M, N]``. Call it with autocast disabled.

    Args:
        y: overwritten.
        x: ``[..., K]``, whose leading dimensions the result gets.
        matrix: x as ``[M, K]``.
        weight: W0, ``[N, K]``.
        dtype: of y and of the product.
    """
    matrix, weight = cast(matrix, dtype), cast(weight, dtype).t()
    if torch._C._len_torch_dispatch_stack() > 0:  # selective checkpointing keeps what an operator returned
        return shaped_like(x, torch.addmm(y, matrix, weight))
    y.addmm_(matrix, weight)
    return fresh_like(x, y)


def _wants_input(wants: Inputs) -> bool:
    """Whether dx~, the gradient of the mix, is needed."""
    return wants.x or wants.initial_residual


def _wants_u(wants: Inputs) -> bool:
    """Whether u, the gradient of t, is needed."""
    return _wants_input(wants) or wants.lora_a or wants.lambda_ or wants.down_bias


def saved_for(settings: Settings, inputs: Inputs, wants: Inputs, t: Tensor, difference: Tensor | None) -> Saved:
    """The tensors that the backward needs for the wanted gradients."""
    wants_input, wants_u = _wants_input(wants), _wants_u(wants)
    reads_p = settings.activation is not None and wants_u
    return Saved(
        x=inputs.x if wants.lora_a or wants.weight else None,
        initial_residual=inputs.initial_residual if wants.lora_a else None,
        weight=inputs.weight if wants.x else None,
        lora_a=inputs.lora_a if wants_input else None,
        lora_b=inputs.lora_b if wants_u or wants.lora_b or wants.scaling else None,
        lora_bias=inputs.lora_bias if wants.scaling else None,
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
    """The wanted gradients of layers that share x and h0; None for the others.

    Args:
        settings, saved, wants: of each layer. They agree in x, h0 and their dtypes.
        grads_y: dY of each, ``[..., N]``.
        in_series: whether the low-rank products are added to x itself, so that dx includes dY.

    Returns:
        Each layer's gradients, in dtypes that autograd casts to those of the tensors. Those of x and h0 are summed over
        the layers and stand with the first one.
    """
    with without_autocast(grads_y[0].device.type):
        gs = [as_matrix(grad_y) for grad_y in grads_y]  # [M, N]
        ups, grads_a, dx, dh = _low_rank_backward(settings, saved, gs, wants, in_series)
        leading = grads_y[0].shape[:-1]
        if dx is not None:
            for i, (setting, kept, g) in enumerate(zip(settings, saved, gs, strict=True)):
                if kept.weight is not None:
                    dx.addmm_(g, cast(kept.weight, setting.dtype))
                elif in_series and i > 0:
                    dx.add_(g)
            dx = cast(dx, settings[0].x_dtype).view(*leading, dx.shape[1])
        dh = None if dh is None else dh.view(*leading, dh.shape[1])
        gradients = []
        for i, (setting, kept, wanted, g, up) in enumerate(zip(settings, saved, wants, gs, ups, strict=True)):
            gradients.append(
                Inputs(
                    base=grads_y[i] if wanted.base else None,
                    x=dx if i == 0 else None,
                    weight=g.t() @ cast(as_matrix(kept.x), setting.dtype) if wanted.weight else None,
                    bias=up.sum if wanted.bias else None,
                    lora_a=grads_a[i],
                    lora_b=up.grad_b,
                    lora_bias=up.sum * scaling_of(setting, kept) if wanted.lora_bias else None,
                    down_bias=up.u.sum(0) if wanted.down_bias else None,
                    initial_residual=dh if i == 0 else None,
                    lambda_=(up.u * kept.difference).sum().reshape(kept.lambda_.shape) if wanted.lambda_ else None,
                    scaling=up.scaling,
                    seed=None,
                )
            )
    return gradients


def _low_rank_backward(
    settings: Sequence[Settings], saved: Sequence[Saved], gs: list[Tensor], wants: Sequence[Inputs], in_series: bool
) -> tuple[list[_Up], Sequence[Any], Tensor | None, Tensor | None]:
    """The up-projection's gradients and dA of each layer, and the low-rank parts of dx and dh0, ``[M, K]``."""
    skip = gs[0] if in_series and wants[0].x else None
    has_frozen = any(kept.weight is not None for kept in saved)
    key, tensors, matrices = backward_request(settings, saved, gs, wants, in_series)
    x, h0 = tensors[len(gs) : len(gs) + 2]

    def compute() -> list[Tensor | None]:
        ups = _up_backward(settings, saved, gs, wants, matrices)
        shared = (None if x is None else as_matrix(x), None if h0 is None else as_matrix(h0), skip)
        grads_a, dx, dh = _down_backward(settings, saved, ups, wants, matrices, shared, has_frozen)
        results = [dx, dh, *grads_a]
        for up, wanted in zip(ups, wants, strict=True):
            u = up.u if wanted.lambda_ or wanted.down_bias else None
            results += (u, up.grad_b, up.sum, up.scaling)
        return results

    dx, dh, *rest = implementation(settings[0].backend).replayed(key, tensors, compute)
    count = len(gs)
    ups = [_Up(*rest[i : i + PER_LAYER]) for i in range(count, len(rest), PER_LAYER)]
    return ups, rest[:count], dx, dh


def backward_request(
    settings: Sequence[Settings], saved: Sequence[Saved], gs: list[Tensor], wants: Sequence[Inputs], in_series: bool
) -> Request:
    """What identifies the launches of :func:`backward`."""
    x = next((kept.x for kept in saved if kept.x is not None), None)
    h0 = next((kept.initial_residual for kept in saved if kept.initial_residual is not None), None)
    tensors: list[Tensor | None] = [*gs, x, h0]
    matrices = []
    for setting, kept in zip(settings, saved, strict=True):
        a = None if kept.lora_a is None else cast(kept.lora_a, setting.adapter_dtype)
        b = None if kept.lora_b is None else cast(kept.lora_b, setting.adapter_dtype)
        matrices.append((a, b))
        tensors += (a, b, kept.t, kept.lora_bias, kept.lambda_, kept.scaling, kept.seed)
    dtypes = tuple([None if kept.lora_b is None else kept.lora_b.dtype for kept in saved])
    has_frozen = any(kept.weight is not None for kept in saved)
    return Request((tuple(settings), tuple(wants), in_series, has_frozen, dtypes), tensors, matrices)


class _Up(NamedTuple):
    """The up-projection's gradients of one layer; None where they are not wanted."""

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
    ops, results, requests, places = implementation(settings[0].backend), [_Up()] * len(gs), [], []
    for i, (setting, kept, g, wanted, (_, b)) in enumerate(zip(settings, saved, gs, wants, matrices, strict=True)):
        wants_u, wants_sum = _wants_u(wanted), wanted.bias or wanted.lora_bias
        if wanted.scaling:
            results[i] = _up_backward_with_scaling(setting, kept, g, wanted, b)
        elif wants_u or wanted.lora_b:
            grad_dtype = kept.lora_b.dtype if wanted.lora_b else None
            scaling = scaling_of(setting, kept)
            requests.append(UpGradients(g, kept.t, b, scaling, wants_u, grad_dtype, wants_sum, setting.activation))
            places.append(i)
        elif wants_sum:
            wide = torch.promote_types(torch.promote_types(setting.adapter_dtype, torch.float32), g.dtype)
            results[i] = _Up(sum=g.sum(0, dtype=wide))
    if requests:
        for i, result in zip(places, ops.up_backward_siblings(requests), strict=True):
            results[i] = _Up(*result)
    return results


def _up_backward_with_scaling(setting: Settings, kept: Saved, g: Tensor, wanted: Inputs, b: Tensor) -> _Up:
    """Also ``ds = <dY, t B^T + b_B> = <dY B, t> + <sum of dY, b_B>``, from u before it is scaled, as s may be 0."""
    wide = torch.promote_types(setting.adapter_dtype, torch.float32)
    t = kept.t.to(wide)
    activated = t if setting.activation is None else ACTIVATIONS[setting.activation](t)
    grad_dtype = wide if wanted.lora_b else None
    wants_sum = wanted.bias or wanted.lora_bias or kept.lora_bias is not None
    request = UpGradients(g, activated, b, 1.0, True, grad_dtype, wants_sum)
    ((u, grad_b, grad_sum),) = implementation(setting.backend).up_backward_siblings([request])
    grad_scaling = (u * activated).sum()
    if kept.lora_bias is not None:
        grad_scaling = grad_scaling + (grad_sum * kept.lora_bias).sum()
    scaling = kept.scaling.to(wide)
    u, grad_b = u * scaling, None if grad_b is None else grad_b * scaling
    if setting.activation is not None:
        u = activation_gradient(setting.activation, u, t, activated)
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
    requests, places = [], []
    for i, (setting, kept, up, wanted, (a, _)) in enumerate(zip(settings, saved, ups, wants, matrices, strict=True)):
        if wanted.lora_a or _wants_input(wanted):
            mixing = (lambda_of(setting, kept), setting.dropout_p, kept.seed)
            grad_dtype = kept.lora_b.dtype if wanted.lora_a else None
            requests.append(DownGradients(up.u, a, setting.adapter_dtype, *mixing, grad_dtype))
            places.append(i)
    if not requests:
        return grads_a, None, None
    first, (x, h0, skip) = settings[0], shared
    dx_dtype = None if not wants[0].x else first.dtype if has_frozen else first.x_dtype
    residual_dtype = next(
        (setting.residual_dtype for setting, wanted in zip(settings, wants, strict=True) if wanted.initial_residual),
        None,
    )
    ops = implementation(first.backend)
    grads, dx, dh = ops.down_backward_siblings(requests, x, h0, dx_dtype, residual_dtype, skip)
    for i, grad_a in zip(places, grads, strict=True):
        grads_a[i] = grad_a
    return grads_a, dx, dh

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

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sibo_triton.kernels.siblings import DownGradients, DownProjection, UpGradients
from sibo_triton.ops.activations import activation_gradient
from sibo_triton.ops.dispatch import implementation
from sibo_triton.reference import ACTIVATIONS


class Inputs(NamedTuple):
    """The tensors of one call, or what stands for each of them: its gradient, or whether it wants one.

    What the low-rank product is added to is the frozen product, if there is a weight, or else the base, or else x: the
    adapter in series.
    """

    base: Any  # [..., N], what the frozen layer returned; or None
    x: Any  # [..., K]
    weight: Any  # [N, K], of the frozen layer, or None
    bias: Any  # [N], or None
    lora_a: Any  # [r, K], or W_down
    lora_b: Any  # [N, r], or W_up
    lora_bias: Any  # [N], or None
    down_bias: Any  # [r], or None: with an activation
    initial_residual: Any  # like x, or None
    lambda_: Any  # one element, or None: a number, in Settings
    scaling: Any  # likewise
    seed: Any  # int64, [1], or None


class Settings(NamedTuple):
    """What is no tensor with a gradient.

    Attributes:
        backend: "triton" or "torch".
        scaling, lambda_: the numbers, where they are no tensors.
        dropout_p: the rate.
        dtype: of y and of the frozen product.
        x_dtype, residual_dtype: of x and of h0.
        adapter_dtype: of A and B, or autocast's.
        activation: f's name, or None.
    """

    backend: str
    scaling: float
    lambda_: float
    dropout_p: float
    dtype: torch.dtype
    x_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    adapter_dtype: torch.dtype
    activation: str | None = None


class Saved(NamedTuple):
    """What the backward reads; None where the wanted gradients do not need it."""

    x: Any
    weight: Any
    lora_a: Any
    lora_b: Any
    lora_bias: Any
    initial_residual: Any
    lambda_: Any
    scaling: Any
    seed: Any
    t: Any
    difference: Any


class Down(NamedTuple):
    """Of one layer, ``[M, r]`` each."""

    t: Tensor  # or p
    difference: Tensor | None
    activated: Tensor  # f(p), or t where there is no f


def down(settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool]) -> list[Down]:
    """The down-projections of layers that share x and h0, and either all have an activation or none."""
    ops = implementation(settings[0].backend)
    with without_autocast(inputs[0].x.device.type):
        x, siblings, h0 = down_arguments(settings, inputs, wants_differences)
        if settings[0].activation is None:
            return [Down(t, difference, t) for t, difference in ops.down_siblings(x, siblings, h0)]
        return [Down(*result) for result in ops.down_activated_siblings(x, siblings, h0)]


def down_arguments(
    settings: Sequence[Settings], inputs: Sequence[Inputs], wants_differences: Sequence[bool]
) -> tuple[Tensor, list[DownProjection], Tensor | None]:
    """x, each layer's part and h0, as the backends take them."""
    siblings = [
        DownProjection(
            of.lora_a.to(own.adapter_dtype),
            own.lambda_ if of.lambda_ is None else of.lambda_,
            own.dropout_p,
            of.seed,
            wants,
            of.down_bias,
            own.activation,
        )
        for own, of, wants in zip(settings, inputs, wants_differences, strict=True)
    ]
    h0 = next((as_matrix(of.initial_residual) for of in inputs if of.initial_residual is not None), None)
    return as_matrix(inputs[0].x), siblings, h0


def forward(settings: Settings, inputs: Inputs, wants_difference: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, ``[..., N]``, t (or p) and, if wanted, d, ``[M, r]``."""
    (own,) = down([settings], [inputs], [wants_difference])
    return output(settings, inputs, own.activated), own.t, own.difference


def output(settings: Settings, inputs: Inputs, t: Tensor) -> Tensor:
    """y, ``[..., N]``, of t (or f(p)): the low-rank product and what it is added to."""
    ops = implementation(settings.backend)
    with without_autocast(inputs.x.device.type):
        b, scaling = inputs.lora_b.to(settings.adapter_dtype), scaling_of(settings, inputs)
        if inputs.weight is None:
            base = as_matrix(inputs.x if inputs.base is None else inputs.base)
            return shaped_like(inputs.x, ops.add_up(base, t, b, scaling, inputs.lora_bias))
        y = ops.up(t, b, scaling, settings.dtype, inputs.lora_bias, inputs.bias)
        return with_frozen(settings, inputs, y)


def scaling_of(settings: Settings, tensors: Inputs | Saved) -> float | Tensor:
    """s, a number or a tensor with one element."""
    return settings.scaling if tensors.scaling is None else tensors.scaling


def with_frozen(settings: Settings, inputs: Inputs, y: Tensor) -> Tensor:
    """y, ``[..., N]``, of the low-rank product, ``[M, N]``, onto which the frozen layer's accumulates."""
    with without_autocast(inputs.x.device.type):
        x, weight = as_matrix(inputs.x).to(settings.dtype), inputs.weight.to(settings.dtype).t()
        if torch._C._len_torch_dispatch_stack() > 0:  # selective checkpointing keeps what an operator returned
            y = torch.addmm(y, x, weight)
        else:
            y.addmm_(x, weight)
    return shaped_like(inputs.x, y)


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
        ups = _up_backward(settings, saved, gs, wants)
        grads_a, dx, dh = _down_backward(settings, saved, ups, wants, gs[0] if in_series and wants[0].x else None)
        leading = grads_y[0].shape[:-1]
        if dx is not None:
            for i, (own, kept, g) in enumerate(zip(settings, saved, gs, strict=True)):
                if kept.weight is not None:
                    dx.addmm_(g, kept.weight.to(own.dtype))
                elif in_series and i > 0:
                    dx.add_(g)
            dx = dx.to(settings[0].x_dtype).view(*leading, dx.shape[1])
        dh = None if dh is None else dh.view(*leading, dh.shape[1])
        gradients = []
        for i, (own, kept, wanted, g, up) in enumerate(zip(settings, saved, wants, gs, ups, strict=True)):
            of_x, of_h = (dx, dh) if i == 0 else (None, None)
            gradients.append(
                Inputs(
                    base=grads_y[i] if wanted.base else None,
                    x=of_x,
                    weight=g.t() @ as_matrix(kept.x).to(own.dtype) if wanted.weight else None,
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


class _Up(NamedTuple):
    """What comes of one layer's dY, where it is wanted."""

    u: Any = None
    grad_b: Any = None
    sum: Any = None  # of dY over its rows
    scaling: Any = None  # ds


def _up_backward(
    settings: Sequence[Settings], saved: Sequence[Saved], gs: list[Tensor], wants: Sequence[Inputs]
) -> list[_Up]:
    ops, results, asked, places = implementation(settings[0].backend), [_Up()] * len(gs), [], []
    for i, (own, kept, g, wanted) in enumerate(zip(settings, saved, gs, wants, strict=True)):
        wants_u, wants_sum = _through_t(wanted)[1], wanted.bias or wanted.lora_bias
        if wanted.scaling:
            results[i] = _with_scaling(own, kept, g, wanted)
        elif wants_u or wanted.lora_b:
            grad_dtype = kept.lora_b.dtype if wanted.lora_b else None
            b = kept.lora_b.to(own.adapter_dtype)
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


def _with_scaling(own: Settings, kept: Saved, g: Tensor, wanted: Inputs) -> _Up:
    """With ``ds = <dY, t B^T + b_B>``, taken in the rank, from u without its s, which may be 0, and f'(p)."""
    wide = torch.promote_types(own.adapter_dtype, torch.float32)
    t = kept.t.to(wide)
    activated = t if own.activation is None else ACTIVATIONS[own.activation](t)
    b, grad_dtype = kept.lora_b.to(own.adapter_dtype), wide if wanted.lora_b else None
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
    skip: Tensor | None,
) -> tuple[list[Any], Tensor | None, Tensor | None]:
    """dA of each layer, and the low-rank part of dx, plus the skip's, and of dh0, where wanted."""
    grads_a: list[Any] = [None] * len(ups)
    asked, places = [], []
    for i, (own, kept, up, wanted) in enumerate(zip(settings, saved, ups, wants, strict=True)):
        wants_input = _through_t(wanted)[0]
        if wanted.lora_a or wants_input:
            a = kept.lora_a.to(own.adapter_dtype) if wants_input else None
            lambda_ = own.lambda_ if kept.lambda_ is None else kept.lambda_
            mixing = (lambda_, own.dropout_p, kept.seed)
            grad_dtype = kept.lora_b.dtype if wanted.lora_a else None
            asked.append(DownGradients(up.u, a, own.adapter_dtype, *mixing, grad_dtype))
            places.append(i)
    if not asked:
        return grads_a, None, None
    own = settings[0]
    x = next((as_matrix(kept.x) for kept, wanted in zip(saved, wants, strict=True) if wanted.lora_a), None)
    h0 = next((as_matrix(kept.initial_residual) for kept in saved if kept.initial_residual is not None), None)
    has_frozen = any(kept.weight is not None for kept in saved)
    dx_dtype = None if not wants[0].x else own.dtype if has_frozen else own.x_dtype
    residual_dtype = next(
        (of.residual_dtype for of, w in zip(settings, wants, strict=True) if w.initial_residual), None
    )
    found, dx, dh = implementation(own.backend).down_backward_siblings(asked, x, h0, dx_dtype, residual_dtype, skip)
    for i, grad_a in zip(places, found, strict=True):
        grads_a[i] = grad_a
    return grads_a, dx, dh


class LowRank(torch.autograd.Function):
    """The operation in eager mode: an `autograd.Function` takes half of the host time of a registered operator."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> Tensor:
        inputs, wants = Inputs(*tensors), Inputs(*ctx.needs_input_grad[1:])
        y, t, difference = forward(settings, inputs, wants_difference=wants.lambda_)
        ctx.settings, ctx.in_series = settings, inputs.base is None and inputs.weight is None
        ctx.save_for_backward(*saved_for(settings, inputs, wants, t, difference))
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wants, saved = Inputs(*ctx.needs_input_grad[1:]), Saved(*ctx.saved_tensors)
        rest = [ctx.settings], [saved], [grad_y], [wants], ctx.in_series
        if not torch.is_grad_enabled():
            return None, *backward(*rest)[0]
        with torch.no_grad():  # create_graph=True
            gradients = backward(*rest)[0]
        return None, *refuse_second_derivative(gradients, (grad_y, *saved), name_of(ctx.settings))


def name_of(settings: Settings) -> str:
    """For a message."""
    return "A SIBO-LoRA layer" if settings.activation is None else "A bottleneck adapter"


def refuse_second_derivative(
    gradients: Sequence[Tensor | None], depend_on: Sequence[Tensor | None], what: str
) -> tuple:
    """First derivatives, of which a second one says that there is none."""
    return _RefuseSecondDerivative.apply(what, len(gradients), *gradients, *depend_on)


class _RefuseSecondDerivative(torch.autograd.Function):
    """Hands on first derivatives, and says, if they are differentiated, that they cannot be."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.what = what
        # the others are what the gradients depend on: through them autograd comes here
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.what} was differentiated twice, but its fused operation has first derivatives only. Run the "
            "definition, which autograd differentiates any number of times: SIBO_TRITON_BACKEND=reference."
        )


def as_matrix(tensor: Tensor) -> Tensor:
    """``[M, K]``, a view where strides allow; also where a size is 0."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """A fresh y, ``[M, N]``, with the leading dimensions of x: ``[..., N]``.

    Not a view to autograd, which forbids writing into a view that a Function returned or that was made without
    gradients: q.mul_(...) is common.
    """
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Autocast's dtype where it is on."""
    if not torch._C._is_any_autocast_enabled():
        return None
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


_unsafe_view = torch.ops.aten._unsafe_view.default
_AS_IT_IS = contextlib.nullcontext()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    return _AS_IT_IS if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)

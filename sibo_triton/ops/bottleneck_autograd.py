"""The products of a bottleneck adapter and their gradients, written by hand: LoRA's passes, with f between them.

Forward: the pre-activation ``p = drop(x~) W_down^T + b_down`` and f(p) in one pass over x and h0, then
``y = base + s (f(p) W_up^T + b_up)`` in one over the base. Backward: ``du = s (dY W_up) f'(p)``, dW_up and db_up in the
passes over dY, dW_down from du and x, and the gradients of x and h0 from du.

Kept for the backward are x and h0 themselves, p and, if lambda learns, ``d = drop(h0 - x) W_down^T``, both
``[M, bottleneck]``, and the seed of the mask: nothing of the size of x that was not there before.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sibo_triton.kernels.siblings import DownGradients, DownProjection, UpGradients
from sibo_triton.ops.activations import activation_gradient
from sibo_triton.ops.autograd import as_matrix, refuse_second_derivative, shaped_like, without_autocast
from sibo_triton.ops.dispatch import implementation
from sibo_triton.reference import ACTIVATIONS


class Inputs(NamedTuple):
    """The tensors of one call, or what stands for each of them: its gradient, or whether it wants one."""

    base: Any  # [..., N]; or None, and then it is x
    x: Any  # [..., K]
    down_weight: Any  # [bottleneck, K]
    up_weight: Any  # [N, bottleneck]
    down_bias: Any  # [bottleneck], or None
    up_bias: Any  # [N], or None
    initial_residual: Any  # like x, or None
    lambda_: Any  # one element, or None: a number, in Settings
    scaling: Any  # one element, or None: a number, in Settings
    seed: Any  # int64, [1], or None


class Settings(NamedTuple):
    """What is no tensor with a gradient.

    Attributes:
        backend: "triton" or "torch".
        activation: f, by its name.
        scaling, lambda_: the numbers, where they are no tensors.
        dropout_p: the rate.
        x_dtype, residual_dtype: of x and of h0.
        adapter_dtype: of the weights, or autocast's.
    """

    backend: str
    activation: str
    scaling: float
    lambda_: float
    dropout_p: float
    x_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    adapter_dtype: torch.dtype


class Saved(NamedTuple):
    """What the backward reads; None where the wanted gradients do not need it."""

    x: Any
    down_weight: Any
    up_weight: Any
    up_bias: Any
    initial_residual: Any
    lambda_: Any
    scaling: Any
    seed: Any
    pre_activation: Any
    difference: Any


def forward(settings: Settings, inputs: Inputs, wants_difference: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, ``[..., N]``, p and, if wanted, d, ``[M, bottleneck]``."""
    ops = implementation(settings.backend)
    with without_autocast(inputs.x.device.type):
        x = as_matrix(inputs.x)
        base = x if inputs.base is None else as_matrix(inputs.base)
        h0 = None if inputs.initial_residual is None else as_matrix(inputs.initial_residual)
        down_weight, up_weight = (w.to(settings.adapter_dtype) for w in (inputs.down_weight, inputs.up_weight))
        lambda_ = settings.lambda_ if inputs.lambda_ is None else inputs.lambda_
        scaling = settings.scaling if inputs.scaling is None else inputs.scaling
        mixing = lambda_, settings.dropout_p, inputs.seed, wants_difference
        down = DownProjection(down_weight, *mixing, inputs.down_bias, settings.activation)
        ((p, difference, activated),) = ops.down_activated_siblings(x, [down], h0)
        y = ops.add_up(base, activated, up_weight, scaling, inputs.up_bias)
    return shaped_like(inputs.x, y), p, difference


def _through_p(wants: Inputs) -> tuple[bool, bool]:
    """Whether dx~ is wanted, and whether du, the gradient of p, is."""
    wants_input = wants.x or wants.initial_residual
    return wants_input, wants_input or wants.down_weight or wants.down_bias or wants.lambda_


def saved_for(inputs: Inputs, wants: Inputs, pre_activation: Tensor, difference: Tensor | None) -> Saved:
    """What to keep for the gradients that are wanted."""
    wants_input, wants_du = _through_p(wants)
    return Saved(
        x=inputs.x if wants.down_weight else None,
        down_weight=inputs.down_weight if wants_input else None,
        up_weight=inputs.up_weight if wants_du or wants.up_weight or wants.scaling else None,
        up_bias=inputs.up_bias if wants.scaling else None,
        initial_residual=inputs.initial_residual if wants.down_weight else None,
        lambda_=inputs.lambda_,
        scaling=inputs.scaling,
        seed=inputs.seed,
        pre_activation=pre_activation if wants_du or wants.up_weight or wants.scaling else None,
        difference=difference if wants.lambda_ else None,
    )


def backward(settings: Settings, saved: Saved, grad_y: Tensor, wants: Inputs, in_series: bool) -> Inputs:
    """The gradients that are wanted, each in a dtype that autograd casts to its tensor's; None for the others.

    Args:
        in_series: whether x is the base too, so that its gradient has a second part, dY.
    """
    g = as_matrix(grad_y)  # [M, N]
    with without_autocast(grad_y.device.type):
        du, grad_up, grad_sum, grad_scaling = _up_gradients(settings, saved, g, wants)
        down_weight = down_bias = up_bias = lambda_ = dx = dh0 = cast(Any, None)
        if du is not None:
            skip = g if in_series and wants.x else None
            down_weight, dx, dh0 = _down_gradients(settings, saved, du, grad_y.shape[:-1], wants, skip)
            down_bias = du.sum(0) if wants.down_bias else None
            lambda_ = (du * saved.difference).sum().reshape(saved.lambda_.shape) if wants.lambda_ else None
        if grad_sum is not None:
            up_bias = grad_sum * _scaling(settings, saved)
    base = grad_y if wants.base else None
    return Inputs(base, dx, down_weight, grad_up, down_bias, up_bias, dh0, lambda_, grad_scaling, None)


def _scaling(settings: Settings, saved: Saved) -> Any:
    return settings.scaling if saved.scaling is None else saved.scaling


def _up_gradients(
    settings: Settings, saved: Saved, g: Tensor, wants: Inputs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """du, dW_up, the sum of dY over its rows, if db_up is wanted, and ds."""
    _, wants_du = _through_p(wants)
    p, wide = saved.pre_activation, torch.promote_types(settings.adapter_dtype, torch.float32)
    if p is None:
        return None, None, g.sum(0, dtype=wide) if wants.up_bias else None, None
    ops = implementation(settings.backend)
    up_weight = saved.up_weight.to(settings.adapter_dtype)
    if not wants.scaling:
        grad_dtype = saved.up_weight.dtype if wants.up_weight else None
        asked = UpGradients(
            g, p, up_weight, _scaling(settings, saved), wants_du, grad_dtype, wants.up_bias, settings.activation
        )
        ((du, grad_up, grad_sum),) = ops.up_backward_siblings([asked])
        return du, grad_up, grad_sum, None
    # ds = <dY, f(p) W_up^T + b_up> is taken in the bottleneck, from u without its s, which may be 0, and f'(p)
    p = p.to(wide)
    activated = ACTIVATIONS[settings.activation](p)
    wants_sum = wants.up_bias or saved.up_bias is not None
    asked = UpGradients(g, activated, up_weight, 1.0, True, wide if wants.up_weight else None, wants_sum)
    ((u, grad_up, grad_sum),) = ops.up_backward_siblings([asked])
    grad_scaling = (u * activated).sum()
    if saved.up_bias is not None:
        grad_scaling = grad_scaling + (grad_sum * saved.up_bias).sum()
    scaling = saved.scaling.to(u.dtype)
    du = activation_gradient(settings.activation, u * scaling, p, activated) if wants_du else None
    grad_up = None if grad_up is None else grad_up * scaling
    return du, grad_up, grad_sum if wants.up_bias else None, grad_scaling.reshape(saved.scaling.shape)


def _down_gradients(
    settings: Settings, saved: Saved, du: Tensor, leading: torch.Size, wants: Inputs, skip: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dW_down, dx, in series with what came by the skip, and dh0."""
    wants_input, _ = _through_p(wants)
    if not (wants.down_weight or wants_input):
        return None, None, None
    lambda_ = settings.lambda_ if saved.lambda_ is None else saved.lambda_
    asked = DownGradients(
        du,
        saved.down_weight.to(settings.adapter_dtype) if wants_input else None,
        settings.adapter_dtype,
        lambda_,
        settings.dropout_p,
        saved.seed,
        saved.up_weight.dtype if wants.down_weight else None,
    )
    (grad_down,), dx, dh0 = implementation(settings.backend).down_backward_siblings(
        [asked],
        as_matrix(saved.x) if wants.down_weight else None,
        None if saved.initial_residual is None else as_matrix(saved.initial_residual),
        settings.x_dtype if wants.x else None,
        settings.residual_dtype if wants.initial_residual else None,
        skip,
    )
    dx, dh0 = (None if gradient is None else gradient.view(*leading, gradient.shape[1]) for gradient in (dx, dh0))
    return grad_down, dx, dh0


class Bottleneck(torch.autograd.Function):
    """The operation in eager mode."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> Tensor:
        inputs, wants = Inputs(*tensors), Inputs(*ctx.needs_input_grad[1:])
        y, pre_activation, difference = forward(settings, inputs, wants_difference=wants.lambda_)
        ctx.settings, ctx.in_series = settings, inputs.base is None
        ctx.save_for_backward(*saved_for(inputs, wants, pre_activation, difference))
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wants, saved = Inputs(*ctx.needs_input_grad[1:]), Saved(*ctx.saved_tensors)
        if not torch.is_grad_enabled():
            return None, *backward(ctx.settings, saved, grad_y, wants, ctx.in_series)
        with torch.no_grad():  # create_graph=True
            gradients = backward(ctx.settings, saved, grad_y, wants, ctx.in_series)
        return None, *refuse_second_derivative(gradients, (grad_y, *saved), "A bottleneck adapter")

"""The products of SIBO-LoRA in the order that moves the fewest bytes, and their gradients, written by hand.

Forward: t, then the low-rank product into a fresh y, then the frozen GEMM accumulates onto it (beta = 1). Backward:
``u = s dY B`` and dB, then dA, then the low-rank part of dx into a fresh dx, onto which the frozen GEMM accumulates.

Kept for the backward are x and h0 themselves, t and, if lambda learns, ``d = A drop(h0 - x)``, both ``[M, r]``, and the
seed of the mask: nothing of the size of x that was not there before, no cast of it, no mask.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sibo_triton.ops.dispatch import implementation


class Inputs(NamedTuple):
    """The tensors of one call, or what stands for each of them: its gradient, or whether it wants one."""

    base: Any  # [..., N], what the frozen layer returned; or None, and then
    x: Any  # [..., K]
    weight: Any  # [N, K], of the frozen layer
    bias: Any  # [N], or None
    lora_a: Any  # [r, K]
    lora_b: Any  # [N, r]
    lora_bias: Any  # [N], or None
    initial_residual: Any  # like x, or None
    lambda_: Any  # one element, or None: a number, in Settings
    seed: Any  # int64, [1], or None


class Settings(NamedTuple):
    """What is no tensor with a gradient.

    Attributes:
        backend: "triton" or "torch".
        scaling: s.
        lambda_: the number, where it is no tensor.
        dropout_p: the rate.
        dtype: of y and of the frozen product.
        x_dtype, residual_dtype: of x and of h0.
        adapter_dtype: of A and B, or autocast's.
    """

    backend: str
    scaling: float | Tensor
    lambda_: float
    dropout_p: float
    dtype: torch.dtype
    x_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    adapter_dtype: torch.dtype


class Saved(NamedTuple):
    """What the backward reads; None where the wanted gradients do not need it."""

    x: Any
    weight: Any
    lora_a: Any
    lora_b: Any
    initial_residual: Any
    lambda_: Any
    seed: Any
    t: Any
    difference: Any


def forward(settings: Settings, inputs: Inputs, wants_difference: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, ``[..., N]``, t and, if wanted, d, ``[M, r]``."""
    ops = implementation(settings.backend)
    with _without_autocast(inputs.x.device.type):
        x = as_matrix(inputs.x)
        a, b = inputs.lora_a.to(settings.adapter_dtype), inputs.lora_b.to(settings.adapter_dtype)
        lambda_ = settings.lambda_ if inputs.lambda_ is None else inputs.lambda_
        h0 = None if inputs.initial_residual is None else as_matrix(inputs.initial_residual)
        t, difference = ops.down(x, a, h0, lambda_, settings.dropout_p, inputs.seed, wants_difference)
        if inputs.weight is None:
            y = ops.add_up(as_matrix(inputs.base), t, b, settings.scaling, inputs.lora_bias)
        else:
            y = ops.up(t, b, settings.scaling, settings.dtype, inputs.lora_bias, inputs.bias)
            x_frozen, weight = x.to(settings.dtype), inputs.weight.to(settings.dtype).t()
            if torch._C._len_torch_dispatch_stack() > 0:  # selective checkpointing keeps what an operator returned
                y = torch.addmm(y, x_frozen, weight)
            else:
                y.addmm_(x_frozen, weight)
    return shaped_like(inputs.x, y), t, difference


def _through_t(wants: Inputs) -> tuple[bool, bool]:
    """Whether dx~ is wanted, and whether u, the gradient of t, is."""
    wants_input = wants.x or wants.initial_residual
    return wants_input, wants_input or wants.lora_a or wants.lambda_


def saved_for(inputs: Inputs, wants: Inputs, t: Tensor, difference: Tensor | None) -> Saved:
    """What to keep for the gradients that are wanted."""
    wants_input, wants_u = _through_t(wants)
    return Saved(
        x=inputs.x if wants.lora_a or wants.weight else None,
        weight=inputs.weight if wants.x else None,
        lora_a=inputs.lora_a if wants_input else None,
        lora_b=inputs.lora_b if wants_u or wants.lora_b else None,
        initial_residual=inputs.initial_residual if wants.lora_a else None,
        lambda_=inputs.lambda_,
        seed=inputs.seed,
        t=t if wants.lora_b else None,
        difference=difference if wants.lambda_ else None,
    )


def backward(settings: Settings, saved: Saved, grad_y: Tensor, wants: Inputs) -> Inputs:
    """The gradients that are wanted, each in a dtype that autograd casts to its tensor's; None for the others."""
    ops = implementation(settings.backend)
    s, p, seed = settings.scaling, settings.dropout_p, saved.seed
    lambda_ = settings.lambda_ if saved.lambda_ is None else saved.lambda_
    wants_input, wants_u = _through_t(wants)
    base = weight = bias = dx = dh = grad_a = grad_b = lora_bias = dlambda = u = cast(Any, None)
    with _without_autocast(grad_y.device.type):
        g = as_matrix(grad_y)  # [M, N]
        leading = grad_y.shape[:-1]
        if wants_u or wants.lora_b:
            b = saved.lora_b.to(settings.adapter_dtype)
            u, grad_b = ops.up_backward(g, saved.t, b, s, wants_u, wants.lora_b)
        if wants.lora_a or wants_input:
            x = as_matrix(saved.x) if wants.lora_a else None
            h0 = None if saved.initial_residual is None else as_matrix(saved.initial_residual)
            a = saved.lora_a.to(settings.adapter_dtype) if wants_input else None
            dx_dtype = None if not wants.x else settings.x_dtype if saved.weight is None else settings.dtype
            residual_dtype = settings.residual_dtype if wants.initial_residual else None
            outputs = (settings.adapter_dtype, dx_dtype, residual_dtype)
            grad_a, dx, dh = ops.down_backward(u, a, x, h0, lambda_, p, seed, *outputs)
        if wants.x:
            if saved.weight is not None:
                dx.addmm_(g, saved.weight.to(settings.dtype))
            dx = dx.to(settings.x_dtype).view(*leading, dx.shape[1])
        if wants.initial_residual:
            dh = dh.view(*leading, dh.shape[1])
        if wants.lambda_:
            dlambda = (u * saved.difference).sum().reshape(saved.lambda_.shape)
        if wants.base:
            base = grad_y
        if wants.weight:
            weight = g.t() @ as_matrix(saved.x).to(settings.dtype)
        if wants.bias:
            bias = g.sum(0)
        if wants.lora_bias:
            lora_bias = g.sum(0, dtype=torch.promote_types(settings.adapter_dtype, torch.float32)) * s
    return Inputs(base, dx, weight, bias, grad_a, grad_b, lora_bias, dh, dlambda, None)


class LowRank(torch.autograd.Function):
    """The operation in eager mode: an `autograd.Function` takes half of the host time of a registered operator."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None) -> Tensor:
        inputs, wants = Inputs(*tensors), Inputs(*ctx.needs_input_grad[1:])
        y, t, difference = forward(settings, inputs, wants_difference=wants.lambda_)
        scaling = settings.scaling if isinstance(settings.scaling, Tensor) else None  # PEFT changes it in place
        ctx.settings = settings if scaling is None else settings._replace(scaling=1.0)
        ctx.save_for_backward(*saved_for(inputs, wants, t, difference), scaling)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        wants = Inputs(*ctx.needs_input_grad[1:])
        *saved, scaling = ctx.saved_tensors
        settings = ctx.settings if scaling is None else ctx.settings._replace(scaling=scaling)
        if not torch.is_grad_enabled():
            return None, *backward(settings, Saved(*saved), grad_y, wants)
        with torch.no_grad():  # create_graph=True
            gradients = backward(settings, Saved(*saved), grad_y, wants)
        gradients = Inputs(*_RefuseSecondDerivative.apply(len(gradients), *gradients, grad_y, *saved))
        return None, *gradients


class _RefuseSecondDerivative(torch.autograd.Function):
    """Hands on first derivatives, and says, if they are differentiated, that they cannot be."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        # the others are what the gradients depend on: through them autograd comes here
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "A SIBO-LoRA layer was differentiated twice, but its fused operation has first derivatives only. Run the "
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


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    return _AS_IT_IS if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)

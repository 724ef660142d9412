"""The products of SIBO-LoRA in the order that moves the fewest bytes, and their gradients, written by hand.

Forward: t, then the low-rank product into a fresh y, then the frozen GEMM accumulates onto it (beta = 1). Backward:
``u = s dY B`` and dB, then dA, then the low-rank part of dx into a fresh dx, onto which the frozen GEMM accumulates.

Kept for the backward are x and h0 themselves, t and, if lambda learns, ``d = A drop(h0 - x)``, both ``[M, r]``, and the
seed of the mask: nothing of the size of x that was not there before, no cast of it, no mask.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sibo_triton.kernels.siblings import DownGradients, UpGradients
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
    with without_autocast(inputs.x.device.type):
        x = as_matrix(inputs.x)
        a = inputs.lora_a.to(settings.adapter_dtype)
        lambda_ = settings.lambda_ if inputs.lambda_ is None else inputs.lambda_
        h0 = None if inputs.initial_residual is None else as_matrix(inputs.initial_residual)
        t, difference = ops.down(x, a, h0, lambda_, settings.dropout_p, inputs.seed, wants_difference)
    return output(settings, inputs, t), t, difference


def output(settings: Settings, inputs: Inputs, t: Tensor) -> Tensor:
    """y, ``[..., N]``, of t: the low-rank product and the frozen layer's, or the base output."""
    ops = implementation(settings.backend)
    with without_autocast(inputs.x.device.type):
        b = inputs.lora_b.to(settings.adapter_dtype)
        if inputs.weight is None:
            y = ops.add_up(as_matrix(inputs.base), t, b, settings.scaling, inputs.lora_bias)
        else:
            y = ops.up(t, b, settings.scaling, settings.dtype, inputs.lora_bias, inputs.bias)
            return with_frozen(settings, inputs, y)
    return shaped_like(inputs.x, y)


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


def backward(
    settings: Sequence[Settings], saved: Sequence[Saved], grads_y: Sequence[Tensor], wants: Sequence[Inputs]
) -> list[Inputs]:
    """The gradients that are wanted of layers that share x and h0; None for the others.

    Args:
        settings, saved, wants: of each layer. They agree in x, h0 and their dtypes.
        grads_y: dY of each, ``[..., N]``.

    Returns:
        For each layer the gradients of what is its own; those of x and h0 are sums, and the first layer's.
    """
    with without_autocast(grads_y[0].device.type):
        gs = [as_matrix(grad_y) for grad_y in grads_y]  # [M, N]
        us, grads_b, sums = _up_backward(settings, saved, gs, wants)
        grads_a, dx, dh = _down_backward(settings, saved, us, wants)
        leading = grads_y[0].shape[:-1]
        if dx is not None:
            for own, kept, g in zip(settings, saved, gs, strict=True):
                if kept.weight is not None:
                    dx.addmm_(g, kept.weight.to(own.dtype))
            dx = dx.to(settings[0].x_dtype).view(*leading, dx.shape[1])
        dh = None if dh is None else dh.view(*leading, dh.shape[1])
        gradients = []
        for i, (own, kept, wanted, g) in enumerate(zip(settings, saved, wants, gs, strict=True)):
            weight = bias = lora_bias = dlambda = None
            if wanted.lambda_:
                dlambda = (us[i] * kept.difference).sum().reshape(kept.lambda_.shape)
            if wanted.weight:
                weight = g.t() @ as_matrix(kept.x).to(own.dtype)
            if wanted.bias:
                bias = sums[i]
            if wanted.lora_bias:
                lora_bias = sums[i] * own.scaling
            base = grads_y[i] if wanted.base else None
            of_x, of_h = (dx, dh) if i == 0 else (None, None)
            gradients.append(Inputs(base, of_x, weight, bias, grads_a[i], grads_b[i], lora_bias, of_h, dlambda, None))
    return gradients


def _up_backward(
    settings: Sequence[Settings], saved: Sequence[Saved], gs: list[Tensor], wants: Sequence[Inputs]
) -> tuple[list[Any], list[Any], list[Any]]:
    """u, dB and, for the biases, the sum of dY over its rows, of each layer, where wanted."""
    us: list[Any] = [None] * len(gs)
    grads_b: list[Any] = [None] * len(gs)
    sums: list[Any] = [None] * len(gs)
    asked, places = [], []
    for i, (own, kept, g, wanted) in enumerate(zip(settings, saved, gs, wants, strict=True)):
        wants_u, wants_sum = _through_t(wanted)[1], wanted.bias or wanted.lora_bias
        if wants_u or wanted.lora_b:
            grad_dtype = kept.lora_b.dtype if wanted.lora_b else None
            b = kept.lora_b.to(own.adapter_dtype)
            asked.append(UpGradients(g, kept.t, b, own.scaling, wants_u, grad_dtype, wants_sum))
            places.append(i)
        elif wants_sum:
            sums[i] = g.sum(0, dtype=torch.promote_types(own.adapter_dtype, torch.float32))
    if asked:
        results = implementation(settings[0].backend).up_backward_siblings(asked)
        for i, (u, grad_b, summed) in zip(places, results, strict=True):
            us[i], grads_b[i], sums[i] = u, grad_b, summed
    return us, grads_b, sums


def _down_backward(
    settings: Sequence[Settings], saved: Sequence[Saved], us: list[Any], wants: Sequence[Inputs]
) -> tuple[list[Any], Tensor | None, Tensor | None]:
    """dA of each layer, and the low-rank part of dx and dh0, where wanted."""
    grads_a: list[Any] = [None] * len(us)
    asked, places = [], []
    for i, (own, kept, u, wanted) in enumerate(zip(settings, saved, us, wants, strict=True)):
        wants_input = _through_t(wanted)[0]
        if wanted.lora_a or wants_input:
            a = kept.lora_a.to(own.adapter_dtype) if wants_input else None
            lambda_ = own.lambda_ if kept.lambda_ is None else kept.lambda_
            mixing = (lambda_, own.dropout_p, kept.seed)
            asked.append(DownGradients(u, a, own.adapter_dtype, *mixing, kept.lora_b.dtype if wanted.lora_a else None))
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
    found, dx, dh = implementation(own.backend).down_backward_siblings(asked, x, h0, dx_dtype, residual_dtype)
    for i, grad_a in zip(places, found, strict=True):
        grads_a[i] = grad_a
    return grads_a, dx, dh


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
            return None, *backward([settings], [Saved(*saved)], [grad_y], [wants])[0]
        with torch.no_grad():  # create_graph=True
            gradients = backward([settings], [Saved(*saved)], [grad_y], [wants])[0]
        return None, *refuse_second_derivative(gradients, (grad_y, *saved))


def refuse_second_derivative(
    gradients: Sequence[Tensor | None], depend_on: Sequence[Tensor | None], what: str = "A SIBO-LoRA layer"
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

"""The operation as registered torch operators, for `torch.compile`: opaque to the compiler, with shapes and gradients.

Eager code does not come here: `ops/autograd.py` says why.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sibo_triton.kernels.siblings import kept_dtype
from sibo_triton.ops import products
from sibo_triton.ops.arguments import Inputs, Saved, Settings
from sibo_triton.ops.autograd import refuse_second_derivative
from sibo_triton.ops.dispatch import backend_for, warn_of_fallback
from sibo_triton.ops.tensors import resolved


def low_rank(settings: Settings, inputs: Inputs) -> Tensor:
    """y, ``[..., N]``: what `ops/autograd.py` computes."""
    lambda_learns = inputs.lambda_ is not None and inputs.lambda_.requires_grad and torch.is_grad_enabled()
    if inputs.base is None and inputs.weight is None:  # in series: autograd adds the gradients of the two uses of x
        inputs = inputs._replace(base=inputs.x)
    return _forward(*inputs, *_pack(settings), lambda_learns)[0]


def _pack(settings: Settings) -> tuple:
    """Settings as an operator takes them: the arguments of :func:`_unpack`."""
    dtypes = (settings.dtype, settings.x_dtype, settings.residual_dtype or settings.x_dtype, settings.adapter_dtype)
    return [settings.scaling, settings.lambda_, settings.dropout_p], settings.activation, *dtypes


def _unpack(device: torch.device, numbers: list[float], activation: str | None, *dtypes: torch.dtype) -> Settings:
    choice = backend_for(device, dtypes)  # here, where it is no part of what is compiled
    if choice.is_fallback:
        warn_of_fallback(choice)
    scaling, lambda_, dropout_p = numbers
    dtype, x_dtype, residual_dtype, adapter_dtype = dtypes
    return Settings(choice.name, scaling, lambda_, dropout_p, dtype, x_dtype, residual_dtype, adapter_dtype, activation)


@torch.library.custom_op("sibo_triton::low_rank", mutates_args=())
def _forward(
    base: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_bias: Tensor | None,
    down_bias: Tensor | None,
    initial_residual: Tensor | None,
    lambda_: Tensor | None,
    scaling: Tensor | None,
    seed: Tensor | None,
    numbers: list[float],
    activation: str | None,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    lambda_learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    adapter = (lora_a, lora_b, lora_bias, down_bias)
    tensors = (base, x, weight, bias, *adapter, initial_residual, lambda_, scaling, seed)
    inputs = Inputs._make(map(resolved, tensors))
    settings = _unpack(x.device, numbers, activation, dtype, x_dtype, residual_dtype, adapter_dtype)
    (y,), ((t, difference, _),) = products.forward([settings], [inputs], [lambda_learns])
    # an operator returns a tensor, not None, and no two of one buffer
    return y, t, t.new_empty(0) if difference is None else difference.clone()


@_forward.register_fake
def _(
    base: Tensor | None, x: Tensor, weight: Any, bias: Any, lora_a: Tensor, lora_b: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, x_dtype, _, adapter_dtype, lambda_learns = rest[-5:]
    rows, rank = math.prod(x.shape[:-1]), lora_a.shape[0]  # torch.Size.numel() would make a number of a dynamic size
    y = x.new_empty((*x.shape[:-1], lora_b.shape[0]), dtype=dtype)
    t = x.new_empty((rows, rank), dtype=kept_dtype(x_dtype, adapter_dtype))
    return y, t, torch.empty_like(t) if lambda_learns else t.new_empty(0)


@torch.library.custom_op("sibo_triton::low_rank_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor | None,
    initial_residual: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_bias: Tensor | None,
    lambda_: Tensor | None,
    scaling: Tensor | None,
    seed: Tensor | None,
    t: Tensor | None,
    difference: Tensor | None,
    numbers: list[float],
    activation: str | None,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    wants: list[bool],
    in_features: int,
    rank: int,
) -> list[Tensor]:
    adapter = (lora_a, lora_b, lora_bias)
    saved = Saved(x, initial_residual, weight, *adapter, lambda_, scaling, seed, t, difference)
    settings = _unpack(grad_y.device, numbers, activation, dtype, x_dtype, residual_dtype, adapter_dtype)
    gradients = products.backward([settings], [saved], [grad_y], [Inputs(*wants)])[0]
    kinds = _kinds(grad_y, saved, settings, in_features, rank)
    return [
        grad_y.new_empty(0) if gradient is None else gradient.to(kind[1]).contiguous()
        for gradient, kind in zip(gradients, kinds, strict=True)
    ]


def _kinds(grad_y: Tensor, saved: Saved, settings: Settings, in_features: int, rank: int) -> Inputs:
    """The shape and dtype of each gradient."""
    (*leading, out_features), wide = grad_y.shape, torch.promote_types(settings.adapter_dtype, torch.float32)
    x_shape, own = (*leading, in_features), settings.adapter_dtype if saved.lora_b is None else saved.lora_b.dtype
    of_lambda, of_scaling = (() if of is None else of.shape for of in (saved.lambda_, saved.scaling))
    return Inputs(
        base=((0,), settings.dtype),
        x=(x_shape, settings.x_dtype),
        weight=((out_features, in_features), settings.dtype),
        bias=((out_features,), settings.dtype),
        lora_a=((rank, in_features), own),
        lora_b=((out_features, rank), own),
        lora_bias=((out_features,), wide),
        down_bias=((rank,), wide),
        initial_residual=(x_shape, settings.residual_dtype),
        lambda_=(of_lambda, wide),
        scaling=(of_scaling, wide),
        seed=((0,), settings.dtype),
    )


@_backward.register_fake
def _(grad_y: Tensor, *rest: Any) -> list[Tensor]:
    saved, packed, (wants, in_features, rank) = Saved(*rest[:_SAVED]), rest[_SAVED:-3], rest[-3:]
    kinds = _kinds(grad_y, saved, _unpack(grad_y.device, *packed), in_features, rank)
    return [
        grad_y.new_empty(shape, dtype=dtype) if wanted else grad_y.new_empty(0)
        for (shape, dtype), wanted in zip(kinds, wants, strict=True)
    ]


_INPUTS, _SAVED = len(Inputs._fields), len(Saved._fields)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, packed = Inputs(*inputs[:_INPUTS]), inputs[_INPUTS:-1]
    wants = Inputs(*ctx.needs_input_grad[:_INPUTS])
    _, t, difference = output
    ctx.mark_non_differentiable(t, difference)
    settings = _unpack(tensors.x.device, *packed)
    ctx.save_for_backward(*products.saved_for(settings, tensors, wants, t, difference))
    ctx.packed, ctx.sizes = packed, (tensors.x.shape[-1], tensors.lora_a.shape[0])


def _backward_of_forward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple:
    wants = Inputs(*ctx.needs_input_grad[:_INPUTS])
    asked = wants._replace(base=False)  # an operator must not return its argument
    gradients = _backward(grad_y, *ctx.saved_tensors, *ctx.packed, list(asked), *ctx.sizes)
    given = [gradient if wanted else None for gradient, wanted in zip(gradients, asked, strict=True)]
    return (grad_y if wants.base else None, *given[1:], *[None] * (len(ctx.packed) + 1))


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)


def _backward_of_backward(ctx: Any, *_: Any) -> Any:
    refuse_second_derivative("A SIBO-LoRA layer or bottleneck adapter")


_backward.register_autograd(_backward_of_backward)

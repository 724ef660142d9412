"""The operation as registered torch operators, for `torch.compile`: opaque to the compiler, with shapes and gradients.

Eager code does not come here: `ops/autograd.py` says why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sibo_triton.ops import autograd
from sibo_triton.ops.autograd import Inputs, Saved, Settings
from sibo_triton.ops.dispatch import backend_for


def low_rank(settings: Settings, inputs: Inputs) -> Tensor:
    """y, ``[..., N]``: what :class:`sibo_triton.ops.autograd.LowRank` computes."""
    lambda_learns = inputs.lambda_ is not None and inputs.lambda_.requires_grad and torch.is_grad_enabled()
    return _forward(*inputs, *_pack(settings), lambda_learns)[0]


def _pack(settings: Settings) -> tuple:
    """Settings as an operator takes them: the arguments of :func:`_unpack`."""
    s = settings.scaling
    number, tensor = (1.0, s) if isinstance(s, Tensor) else (float(s), None)
    dtypes = (settings.dtype, settings.x_dtype, settings.residual_dtype or settings.x_dtype, settings.adapter_dtype)
    return tensor, [number, settings.lambda_, settings.dropout_p], *dtypes


def _unpack(device: torch.device, scaling: Tensor | None, numbers: list[float], *dtypes: torch.dtype) -> Settings:
    backend = backend_for(device, dtypes).name  # here, where it is no part of what is compiled
    return Settings(backend, numbers[0] if scaling is None else scaling, numbers[1], numbers[2], *dtypes)


@torch.library.custom_op("sibo_triton::low_rank", mutates_args=())
def _forward(
    base: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_bias: Tensor | None,
    initial_residual: Tensor | None,
    lambda_: Tensor | None,
    seed: Tensor | None,
    scaling: Tensor | None,
    numbers: list[float],
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    lambda_learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(base, x, weight, bias, lora_a, lora_b, lora_bias, initial_residual, lambda_, seed)
    settings = _unpack(x.device, scaling, numbers, dtype, x_dtype, residual_dtype, adapter_dtype)
    y, t, difference = autograd.forward(settings, inputs, lambda_learns)
    # an operator returns a tensor, not None, and no two of one buffer
    return y, t, t.new_empty(0) if difference is None else difference.clone()


@_forward.register_fake
def _(
    base: Tensor | None, x: Tensor, weight: Any, bias: Any, lora_a: Tensor, lora_b: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, _, _, adapter_dtype, lambda_learns = rest[-5:]
    rows, rank = x.shape[:-1].numel(), lora_a.shape[0]
    y = x.new_empty((*x.shape[:-1], lora_b.shape[0]), dtype=dtype)
    t = x.new_empty((rows, rank), dtype=torch.promote_types(adapter_dtype, torch.float32))
    return y, t, torch.empty_like(t) if lambda_learns else t.new_empty(0)


@torch.library.custom_op("sibo_triton::low_rank_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    initial_residual: Tensor | None,
    lambda_: Tensor | None,
    seed: Tensor | None,
    t: Tensor | None,
    difference: Tensor | None,
    scaling: Tensor | None,
    numbers: list[float],
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    wants: list[bool],
    in_features: int,
    rank: int,
) -> list[Tensor]:
    saved = Saved(x, weight, lora_a, lora_b, initial_residual, lambda_, seed, t, difference)
    settings = _unpack(grad_y.device, scaling, numbers, dtype, x_dtype, residual_dtype, adapter_dtype)
    gradients = autograd.backward([settings], [saved], [grad_y], [Inputs(*wants)])[0]
    kinds = _kinds(grad_y, lora_b, lambda_, settings, in_features, rank)
    return [
        grad_y.new_empty(0) if gradient is None else gradient.to(kind[1]).contiguous()
        for gradient, kind in zip(gradients, kinds, strict=True)
    ]


def _kinds(
    grad_y: Tensor, lora_b: Tensor | None, lambda_: Tensor | None, settings: Settings, in_features: int, rank: int
) -> Inputs:
    """The shape and dtype of each gradient."""
    (*leading, out_features), wide = grad_y.shape, torch.promote_types(settings.adapter_dtype, torch.float32)
    x_shape, own = (*leading, in_features), settings.adapter_dtype if lora_b is None else lora_b.dtype
    return Inputs(
        base=((0,), settings.dtype),
        x=(x_shape, settings.x_dtype),
        weight=((out_features, in_features), settings.dtype),
        bias=((out_features,), settings.dtype),
        lora_a=((rank, in_features), own),
        lora_b=((out_features, rank), own),
        lora_bias=((out_features,), wide),
        initial_residual=(x_shape, settings.residual_dtype),
        lambda_=(() if lambda_ is None else lambda_.shape, wide),
        seed=((0,), settings.dtype),
    )


@_backward.register_fake
def _(grad_y: Tensor, *rest: Any) -> list[Tensor]:
    settings = _unpack(grad_y.device, *rest[9:15])
    wants, in_features, rank = rest[15:]
    kinds = _kinds(grad_y, rest[3], rest[5], settings, in_features, rank)
    return [
        grad_y.new_empty(shape, dtype=dtype) if wanted else grad_y.new_empty(0)
        for (shape, dtype), wanted in zip(kinds, wants, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, packed = Inputs(*inputs[:10]), inputs[10:16]
    wants = Inputs(*ctx.needs_input_grad[:10])
    _, t, difference = output
    ctx.mark_non_differentiable(t, difference)
    ctx.save_for_backward(*autograd.saved_for(tensors, wants, t, difference), packed[0])
    ctx.packed, ctx.sizes = packed, (tensors.x.shape[-1], tensors.lora_a.shape[0])


def _backward_of_forward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple:
    wants = Inputs(*ctx.needs_input_grad[:10])
    *saved, scaling = ctx.saved_tensors
    asked = wants._replace(base=False)  # an operator must not return its argument
    gradients = _backward(grad_y, *saved, scaling, *ctx.packed[1:], list(asked), *ctx.sizes)
    given = [gradient if wanted else None for gradient, wanted in zip(gradients, asked, strict=True)]
    return (grad_y if wants.base else None, *given[1:], *[None] * 7)


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)

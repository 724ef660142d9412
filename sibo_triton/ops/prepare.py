"""What LoRA and bottleneck adapters have in common between their arguments and `products.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sibo_triton.dropout import check_dropout
from sibo_triton.ops import small
from sibo_triton.ops.arguments import Inputs, Settings
from sibo_triton.ops.autograd import outputs_with_gradients
from sibo_triton.ops.dispatch import backend_for, warn_of_fallback
from sibo_triton.ops.group import Group, group, has_few_rows
from sibo_triton.ops.products import forward
from sibo_triton.ops.tensors import autocast_dtype, resolved
from sibo_triton.reference import checked_mixing


def _check_frozen(x: Tensor, weight: Tensor, bias: Tensor | None, lora_b: Tensor) -> None:
    """Raise a ValueError unless x, the frozen linear and B fit together."""
    if weight.dim() != 2 or weight.shape != (lora_b.shape[0], x.shape[-1]):
        raise ValueError(f"weight has shape {list(weight.shape)}, but [{lora_b.shape[0]}, {x.shape[-1]}] fits x and B")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}, but [{weight.shape[0]}] fits weight")
    if autocast_dtype(x.device.type) is not None:
        return
    if weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: the frozen linear needs one dtype (or autocast)")
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and bias {bias.dtype}: the frozen linear needs one dtype (or autocast)")


def _check_scaling_and_dropout(scaling: float | Tensor, dropout_p: float, dropout_seed: Tensor | None) -> None:
    """Raise a TypeError or ValueError for what is no scaling, no rate of dropout, or no seed of one that is not 0."""
    if isinstance(scaling, Tensor) and (scaling.numel() != 1 or not scaling.is_floating_point()):
        description = f"a {scaling.dtype} tensor of shape {list(scaling.shape)}"
        raise ValueError(f"scaling is {description}: pass a number, or one floating point value")
    check_dropout(dropout_p, dropout_seed)
    if dropout_p == 0:
        return
    if not isinstance(dropout_seed, Tensor):
        raise TypeError(f"dropout_seed is {dropout_seed!r}: pass a tensor, as draw_seed(x.device) returns it")
    if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
        description = f"a {dropout_seed.dtype} tensor of shape {list(dropout_seed.shape)}"
        raise ValueError(f"dropout_seed is {description}: pass one int64 value, as draw_seed(x.device) returns it")


def checked(
    frozen: tuple[Tensor | None, Tensor, Tensor | None, Tensor | None],  # base, x, weight and bias of `Inputs`
    adapter: tuple[Tensor, Tensor, Tensor | None, Tensor | None],  # lora_a, lora_b, lora_bias and down_bias
    scaling: float | Tensor,
    mixing: tuple[Tensor | None, float | Tensor, float, Tensor | None],  # h0, lambda, the rate of dropout and its seed
    activation: str | None = None,
) -> tuple[Settings, Inputs]:
    """The settings, with the chosen backend, and the tensors of an adapter of either kind, whose shapes were checked.

    Raises:
        TypeError, ValueError: the rest does not fit: the frozen linear, h0, lambda, the scaling, or dropout.
    """
    (base, x, weight, bias), (initial_residual, lambda_, dropout_p, seed) = frozen, mixing
    if weight is not None:
        _check_frozen(x, weight, bias, adapter[1])
    checked_mixing(x, initial_residual, lambda_)
    _check_scaling_and_dropout(scaling, dropout_p, seed)
    base, x = None if base is None else resolved(base), resolved(x)
    initial_residual = None if initial_residual is None else resolved(initial_residual)
    adapter_dtype = adapter[0].dtype
    autocast = None if torch.float64 in (x.dtype, adapter_dtype) else autocast_dtype(x.device.type)
    adapter_dtype = adapter_dtype if autocast is None else autocast
    added_to = x if weight is None and base is None else base if weight is None else weight
    assert added_to is not None
    dtype = added_to.dtype if weight is None or autocast is None else autocast
    residual_dtype = None if initial_residual is None else initial_residual.dtype
    choice = backend_for(x.device, (dtype, x.dtype, residual_dtype or x.dtype, adapter_dtype))
    if choice.is_fallback:
        warn_of_fallback(choice)
    number, lambda_tensor = (0.0, lambda_) if isinstance(lambda_, Tensor) else (float(lambda_), None)
    if lambda_tensor is None and number == 0:
        initial_residual = None
    s, scaling_tensor = (1.0, scaling) if isinstance(scaling, Tensor) else (float(scaling), None)
    dtypes = (dtype, x.dtype, residual_dtype, adapter_dtype)
    settings = Settings(choice.name, s, number, dropout_p, *dtypes, activation)
    inputs = Inputs(base, x, weight, bias, *adapter, initial_residual, lambda_tensor, scaling_tensor, seed)
    return settings, inputs


def fused(settings: Settings, inputs: Inputs) -> Tensor:
    """y, ``[..., N]``, of an adapter of either kind, by the backend that was chosen."""
    if torch.compiler.is_compiling():
        from sibo_triton.ops.registered import low_rank  # registering takes time, and only compiled code needs it

        return low_rank(settings, inputs)
    outputs = outputs_with_gradients([settings], [inputs])
    if outputs is not None:
        return outputs[0]
    if has_few_rows(settings, inputs):
        return group([settings], [inputs]).output(0)
    return forward([settings], [inputs], [False])[0][0]


def group_of(settings: Sequence[Settings], inputs: Sequence[Inputs]) -> Group | None:
    """Layers with adapters of either kind as a group; None where they differ in what a group has in common."""
    if len({(setting.backend, setting.dtype, setting.activation) for setting in settings}) > 1:
        return None
    if len({layer.weight is None for layer in inputs}) > 1:  # some in series
        return None
    if len({id(layer.initial_residual) for layer in inputs if layer.initial_residual is not None}) > 1:
        return None
    return group(settings, inputs)


def shares_passes(x: Tensor) -> bool:
    """Whether layers that get this x may be one operation. Asked before their seeds are drawn."""
    if torch.compiler.is_compiling():
        return False
    backend = backend_for(x.device, (x.dtype,)).name
    return backend != "reference" and not (backend == "torch" and x.numel() <= small.ELEMENTS)

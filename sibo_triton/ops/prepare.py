"""What LoRA and bottleneck adapters have in common between their arguments and `products.py`: checks, and the path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sibo_triton import reference
from sibo_triton.dropout import check_dropout, check_seed
from sibo_triton.ops import small
from sibo_triton.ops.arguments import Inputs, Settings, lambda_of, scaling_of
from sibo_triton.ops.autograd import outputs_with_gradients
from sibo_triton.ops.dispatch import backend_for, warn_of_fallback
from sibo_triton.ops.group import Group, group, has_few_rows
from sibo_triton.ops.products import forward
from sibo_triton.ops.tensors import autocast_dtype, resolved
from sibo_triton.reference import checked_mixing

#: base, x, weight and bias of `Inputs`.
Frozen = tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]
#: lora_a, lora_b, lora_bias and down_bias of `Inputs`.
Adapter = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Names(NamedTuple):
    """How the arguments of an adapter are called in errors."""

    down: str
    up: str
    up_bias: str
    down_bias: str
    rank: str


def _check_adapter(x: Tensor, adapter: Adapter, out_features: int | None, names: Names) -> None:
    """Raise a ValueError unless the weights and biases of an adapter fit x, each other, and what they are added to."""
    down, up, up_bias, down_bias = adapter
    if down.dim() != 2 or down.shape[1] != x.shape[-1]:
        raise ValueError(f"{names.down} has shape {list(down.shape)}, but [{names.rank}, {x.shape[-1]}] fits x")
    rank = down.shape[0]
    if up.dim() != 2 or up.shape[1] != rank or out_features not in (None, up.shape[0]):
        fitting = f"[N, {rank}] fits {names.down}" if out_features is None else f"[{out_features}, {rank}] fits base"
        raise ValueError(f"{names.up} has shape {list(up.shape)}, but {fitting}")
    for name, bias, size in ((names.down_bias, down_bias, rank), (names.up_bias, up_bias, up.shape[0])):
        if bias is not None and bias.shape != (size,):
            weight = names.down if bias is down_bias else names.up
            raise ValueError(f"{name} has shape {list(bias.shape)}, but [{size}] fits {weight}")
    for name, tensor in ((names.up, up), (names.up_bias, up_bias), (names.down_bias, down_bias)):
        if tensor is not None and tensor.dtype != down.dtype:
            raise ValueError(f"{names.down} is {down.dtype} and {name} {tensor.dtype}: they need one dtype")


def _check_frozen(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, up_name: str) -> None:
    """Raise a ValueError unless x, the frozen linear and the adapter fit together."""
    fitting = [out_features, x.shape[-1]]
    if list(weight.shape) != fitting:
        raise ValueError(f"weight has shape {list(weight.shape)}, but {fitting} fits x and {up_name}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}, but [{weight.shape[0]}] fits weight")
    if autocast_dtype(x.device.type) is not None:
        return
    if weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: the frozen linear needs one dtype (or autocast)")
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and bias {bias.dtype}: the frozen linear needs one dtype (or autocast)")


def _check_scaling(scaling: float | Tensor) -> None:
    if isinstance(scaling, Tensor) and (scaling.numel() != 1 or not scaling.is_floating_point()):
        description = f"a {scaling.dtype} tensor of shape {list(scaling.shape)}"
        raise ValueError(f"scaling is {description}: pass a number, or one floating point value")


def checked(
    frozen: Frozen,
    adapter: Adapter,
    names: Names,
    scaling: float | Tensor,
    mixing: tuple[Tensor | None, float | Tensor, float, Tensor | None],  # h0, lambda, the rate of dropout and its seed
    activation: str | None = None,
) -> tuple[Settings, Inputs]:
    """The arguments of an adapter of either kind, checked, and with the chosen backend.

    Raises:
        TypeError, ValueError: they do not fit together.
    """
    (base, x, weight, bias), (initial_residual, lambda_, dropout_p, seed) = frozen, mixing
    added_to = x if base is None else base
    _check_adapter(x, adapter, added_to.shape[-1] if weight is None else None, names)
    if weight is not None:
        _check_frozen(x, weight, bias, adapter[1].shape[0], names.up)
    elif added_to.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"base has shape {list(added_to.shape)} and x {list(x.shape)}: both must hold the same tokens")
    checked_mixing(x, initial_residual, lambda_)
    _check_scaling(scaling)
    check_dropout(dropout_p, seed)
    if dropout_p != 0:
        check_seed(seed)
    base, x, bias, initial_residual = resolved(base), resolved(x), resolved(bias), resolved(initial_residual)
    lambda_, scaling, seed = resolved(lambda_), resolved(scaling), resolved(seed)
    down, up, up_bias, down_bias = adapter
    adapter = resolved(down), resolved(up), resolved(up_bias), resolved(down_bias)
    adapter_dtype = down.dtype
    autocast = None if torch.float64 in (x.dtype, adapter_dtype) else autocast_dtype(x.device.type)
    adapter_dtype = adapter_dtype if autocast is None else autocast
    dtype = added_to.dtype if weight is None else weight.dtype if autocast is None else autocast
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


def run(settings: Settings, inputs: Inputs) -> Tensor:
    """y, ``[..., N]``, of an adapter of either kind, by the backend that was chosen."""
    if settings.backend == "reference":
        return _by_definition(settings, inputs)
    if torch.compiler.is_compiling() or lacks_memory(settings.backend, inputs.x):
        from sibo_triton.ops.registered import low_rank  # registering takes time, and only compiled code needs it

        return low_rank(settings, inputs)
    if settings.backend == "torch" and settings.activation is None and inputs.x.numel() <= small.ELEMENTS:
        return small.low_rank(settings, inputs)
    outputs = outputs_with_gradients([settings], [inputs])
    if outputs is not None:
        return outputs[0]
    if has_few_rows(settings, inputs):
        return group([settings], [inputs]).output(0)
    return forward([settings], [inputs], [False])[0][0]


def _by_definition(settings: Settings, inputs: Inputs) -> Tensor:
    base, x, weight, bias, down, up, up_bias, down_bias, initial_residual, _, _, seed = inputs
    adapter = down, up, scaling_of(settings, inputs)
    options: dict[str, Any] = {
        "initial_residual": initial_residual,
        "lambda_": lambda_of(settings, inputs),
        "dropout_p": settings.dropout_p,
        "dropout_seed": seed,
    }
    if settings.activation is None:
        options["lora_bias"] = up_bias
        if weight is None:
            return reference.add_lora(base, x, *adapter, **options)
        return reference.lora_linear(x, weight, bias, *adapter, **options)
    options |= {"activation": settings.activation, "down_bias": down_bias, "up_bias": up_bias}
    if weight is None:
        return reference.add_bottleneck(x if base is None else base, x, *adapter, **options)
    return reference.bottleneck_adapter(x, weight, bias, *adapter, placement="parallel", **options)


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
    if backend == "reference" or lacks_memory(backend, x):
        return False
    return backend != "torch" or x.numel() > small.ELEMENTS


def lacks_memory(backend: str, x: Tensor) -> bool:
    """Whether kernels would be launched on a tensor that has no memory: its address is 0, which they would read."""
    return backend == "triton" and isinstance(x, FakeTensor)

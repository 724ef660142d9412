"""Reasons why an adapter's modules must be called instead of its operation, for LoRA and bottleneck adapters alike."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from sibo_triton import reference
from sibo_triton.ops import autocast_dtype

#: How a layer runs: as one operation, its adapter as one on what the frozen layer returned, or module by module.
PathName = Literal["fused", "adapter", "modules"]

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, FakeTensor)
_PLAIN_PARAMETERS = {*_PLAIN_TENSORS, type(None)}
#: The dtypes in which the operations compute.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def obstacle_in(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Reason why calling the module does more than its parameters say, or None.

    It reads the module's dictionary, as every forward asks four times and attributes of modules are slow to look up.
    """
    state = module.__dict__
    if type(module) is not kind:
        return f"is a {type(module).__name__}"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "has hooks"
    if "forward" in state and has_own_forward(module):
        return "has a forward of its own (a device hook of Hugging Face's accelerate, or a patch)"
    parameters = state["_parameters"]
    if _PLAIN_PARAMETERS.issuperset(map(type, parameters.values())):
        return None
    name, tensor = next((name, of) for name, of in parameters.items() if type(of) not in _PLAIN_PARAMETERS)
    return f"has a {type(tensor).__name__} as its {name}"


def obstacle_in_frozen(base: nn.Module, x: torch.Tensor | None = None) -> str | None:
    """Reason why a frozen layer must run by its own forward (for an input x); None for a plain dense linear."""
    obstacle = obstacle_in(base, nn.Linear)
    if obstacle is not None:
        return f"its base layer {obstacle}"
    if x is None:
        return None
    weight = parameter(base, "weight")
    if weight.device != x.device:
        return f"its base layer is on {weight.device} and its input on {x.device}"
    if weight.dtype != x.dtype and autocast_dtype(x.device.type) is None:
        return f"its base layer is {weight.dtype} and its input {x.dtype}"
    return None


def obstacle_in_adapter(
    modules: tuple[nn.Module, nn.Module, nn.Module], names: tuple[str, str, str], x: torch.Tensor | None = None
) -> str | None:
    """Reason why an adapter must run by its modules (for an input x), or None.

    Args:
        modules, names: of the down-projection, the up-projection and the dropout.
    """
    if torch_module._has_any_global_hook():
        return "hooks are registered on all modules"
    down, up, dropout = modules
    obstacle = obstacle_in(down, nn.Linear)
    if obstacle is not None:
        return f"{names[0]} {obstacle}"
    obstacle = obstacle_in(up, nn.Linear)
    if obstacle is not None:
        return f"{names[1]} {obstacle}"
    obstacle = obstacle_in_dropout(dropout, names[2])
    if obstacle is not None:
        return obstacle
    of_down, of_up = parameter(down, "weight"), parameter(up, "weight")
    if of_down.dtype != of_up.dtype or of_down.dtype not in DTYPES:
        return f"{names[0]} is {of_down.dtype} and {names[1]} {of_up.dtype}"
    return None if x is None else obstacle_of_input(x, of_down)


def obstacle_in_dropout(dropout: nn.Module, name: str) -> str | None:
    """Reason why an adapter's dropout, the module `name`, must be called as a module, or None."""
    obstacle = obstacle_in(dropout, nn.Identity if type(dropout) is nn.Identity else nn.Dropout)
    if obstacle is not None:
        return f"{name} {obstacle}"
    if type(dropout) is nn.Dropout and dropout.p >= 1:
        return "its rate of dropout is 1"
    return None


def obstacle_of_input(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Reason why an operation cannot take x for an adapter with this weight, or None."""
    if type(x) not in _PLAIN_TENSORS or x.is_nested:
        return f"its input is a {'nested tensor' if x.is_nested else type(x).__name__}"
    if weight.device != x.device:
        return f"its adapter is on {weight.device} and its input on {x.device}"
    if x.dtype not in DTYPES:
        return f"its input is {x.dtype}"
    return None


def has_own_forward(module: nn.Module, attribute: str = "forward") -> bool:
    """Whether the object has a forward of its own, other than its class's bound to it."""
    forward: Any = module.__dict__.get(attribute)
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def apply_dropout(dropout: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply dropout with the operations' mask, as a checkpoint may recompute the layer by another path."""
    if type(dropout) is not nn.Dropout or not dropout.training or not 0 < dropout.p < 1:
        return dropout(x)
    if obstacle_in(dropout, nn.Dropout) is not None:
        return dropout(x)
    return reference.dropout(x, dropout.p, reference.draw_seed(x.device))


def parameter(module: nn.Module, name: str) -> Any:
    """A parameter, from torch's dictionary, or an attribute as in the replicas of DataParallel."""
    try:
        return module._parameters[name]
    except KeyError:
        return getattr(module, name)

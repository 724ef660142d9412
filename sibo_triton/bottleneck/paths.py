"""Whether a bottleneck adapter runs as one operation, or its modules are called one by one, and why."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from sibo_triton.lora.paths import _DTYPES, _PLAIN_TENSORS, obstacle_in


def obstacle_to_adapter(
    down: nn.Module, up: nn.Module, dropout: nn.Module, x: torch.Tensor | None = None
) -> str | None:
    """Why the projections and the dropout must be called as modules (for an input x), or None."""
    if torch_module._has_any_global_hook():
        return "hooks are registered on all modules"
    for name, module in (("sibo_adapter_down", down), ("sibo_adapter_up", up)):
        obstacle = obstacle_in(module, nn.Linear)
        if obstacle is not None:
            return f"{name} {obstacle}"
    obstacle = obstacle_in(dropout, nn.Identity if type(dropout) is nn.Identity else nn.Dropout)
    if obstacle is not None:
        return f"sibo_adapter_dropout {obstacle}"
    if type(dropout) is nn.Dropout and dropout.p >= 1:
        return "its rate of dropout is 1"
    weight = down.weight  # an attribute of the replicas of DataParallel too
    dtypes = {weight.dtype, up.weight.dtype}
    if len(dtypes) > 1 or not dtypes.issubset(_DTYPES):
        return f"its weights are {', '.join(sorted(map(str, dtypes)))}"
    if x is None:
        return None
    if type(x) not in _PLAIN_TENSORS or x.is_nested:
        return f"its input is a {'nested tensor' if x.is_nested else type(x).__name__}"
    if weight.device != x.device:
        return f"its adapter is on {weight.device} and its input on {x.device}"
    return None if x.dtype in _DTYPES else f"its input is {x.dtype}"

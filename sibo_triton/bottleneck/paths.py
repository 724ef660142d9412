"""By which path a bottleneck adapter runs, and why not by a faster one.

* fused: a parallel adapter and the frozen linear are one operation;
* adapter: the adapter is one operation on what it is added to;
* modules: its modules are called one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from sibo_triton.injection.obstacles import DTYPES, obstacle_in, obstacle_in_dropout, obstacle_of_input


def obstacle_to_bottleneck(
    down: nn.Module, up: nn.Module, dropout: nn.Module, x: torch.Tensor | None = None
) -> str | None:
    """Reason why the projections and the dropout must be called as modules (for an input x), or None."""
    if torch_module._has_any_global_hook():
        return "hooks are registered on all modules"
    for name, module in (("sibo_adapter_down", down), ("sibo_adapter_up", up)):
        obstacle = obstacle_in(module, nn.Linear)
        if obstacle is not None:
            return f"{name} {obstacle}"
    obstacle = obstacle_in_dropout(dropout, "sibo_adapter_dropout")
    if obstacle is not None:
        return obstacle
    weight: Any = down.weight  # an attribute of the replicas of DataParallel too
    dtypes = {weight.dtype, up.weight.dtype}
    if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
        return f"its weights are {', '.join(sorted(map(str, dtypes)))}"
    return None if x is None else obstacle_of_input(x, weight)

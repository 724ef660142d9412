"""By which path a LoRA layer of a SIBO adapter runs, and why not by a faster one.

* fused: the whole layer is one operation, the frozen linear included;
* adapter: the frozen layer runs by its own forward, and the adapter is one operation on what it returned;
* modules: `lora_dropout`, `lora_A` and `lora_B` are called, as PEFT does.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from sibo_triton.layers.obstacles import (
    PathName,
    has_own_forward,
    obstacle_in_adapter,
    obstacle_in_frozen,
    parameter,
)


def path_of(layer: LoraLayer, adapter_name: str) -> tuple[PathName, str | None]:
    """The path of a layer that runs one SIBO adapter, for an unknown input, and why it is not a faster one."""
    obstacle = obstacle_to_lora(layer, adapter_name)
    if obstacle is not None:
        return "modules", obstacle
    # accelerate's hook runs the forward that the object had when the hook came
    if has_own_forward(layer, "_old_forward" if "_old_forward" in layer.__dict__ else "forward"):
        return "adapter", "the layer has a forward of its own (a device hook of Hugging Face's accelerate, or a patch)"
    obstacle = obstacle_to_fusing(layer)
    return ("fused", None) if obstacle is None else ("adapter", obstacle)


def obstacle_to_fusing(layer: LoraLayer, x: torch.Tensor | None = None) -> str | None:
    """Reason why the frozen layer must run by its own forward (for an input x), or None."""
    if not isinstance(layer, LoraLinear):
        return f"the layer is PEFT's {type(layer).__name__}"
    base: Any = layer._modules["base_layer"]
    return obstacle_in_frozen(base, x)


def obstacle_to_lora(layer: LoraLayer, adapter_name: str, x: torch.Tensor | None = None) -> str | None:
    """Reason why `lora_dropout`, `lora_A` and `lora_B` must be called as modules (for an input x), or None."""
    modules = adapter_modules(layer, adapter_name)
    obstacle = obstacle_in_adapter(modules, ("lora_A", "lora_B", "lora_dropout"), x)
    if obstacle is None and parameter(modules[0], "bias") is not None:
        return "lora_A has a bias"
    return obstacle


def adapter_modules(layer: LoraLayer, adapter_name: str) -> tuple[nn.Linear, nn.Linear, nn.Module]:
    """`lora_A`, `lora_B` and `lora_dropout`; by torch's dictionaries, as attributes of modules are slow to look up."""
    modules: Any = layer._modules
    return (
        modules["lora_A"]._modules[adapter_name],
        modules["lora_B"]._modules[adapter_name],
        modules["lora_dropout"]._modules[adapter_name],
    )

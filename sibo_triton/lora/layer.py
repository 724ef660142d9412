"""A PEFT LoRA layer as a SIBO adapter sees it: its lambda, and which layers there are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from sibo_triton.injection.sites import LORA_LAMBDA_NAME as LAMBDA_NAME
from sibo_triton.injection.sites import MixingSite, initial_residual_for, mixed_batch, sibo_adapters, site_of

__all__ = [
    "LAMBDA_NAME",
    "MixingSite",
    "dispatches_variants",
    "initial_residual_for",
    "lambda_of",
    "lora_layers",
    "mixed_batch",
    "sibo_adapters",
    "site_of",
]


def lambda_of(module: LoraLayer, adapter_name: str) -> torch.Tensor:
    """lambda of a mixing layer: fp32, shape [1]; a gradient flows to it when it is learnable."""
    return getattr(module, LAMBDA_NAME)[adapter_name]()


def dispatches_variants(layer: LoraLayer, method: str = "forward") -> bool:
    """Whether the layer's forward (or another method) looks at `lora_variant`; some of PEFT's backends do not."""
    function = getattr(type(layer), method)
    if function.__module__.startswith("sibo_triton."):  # FusedLinear's, which hands to PEFT's what it does not do
        function = getattr(super(type(layer), layer), method)
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and "lora_variant" in code.co_names


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers of a base model, with their names from its root."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module

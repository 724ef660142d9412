"""PEFT's LoRA layers: which ones a model has, and whether one of them calls its variants."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from peft import PeftType
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn


def dispatches_variants(layer: LoraLayer, method: str = "forward") -> bool:
    """Whether the layer's forward (or another method) looks at `lora_variant`; some of PEFT's backends do not."""
    function = getattr(type(layer), method)
    if function.__module__.startswith("sibo_triton."):  # FusedLinear's, which passes the rest on to PEFT's
        function = getattr(super(type(layer), layer), method)
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and "lora_variant" in code.co_names


def belongs_to_x_lora(tuner: LoraModel) -> bool:
    """Whether an X-LoRA model uses this one's layers, whose modules it calls itself."""
    return any(config.peft_type == PeftType.XLORA for config in tuner.peft_config.values())


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers of a base model, with their names from its root."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module

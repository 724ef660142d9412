"""Which adapters a layer has, and by which names PEFT and saved weights know what SIBO adds to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# The bottleneck adapter's name in PEFT's registry and in adapter_config.json, and the prefix of its weights' names.
BOTTLENECK_TYPE = "SIBO_ADAPTER"
BOTTLENECK_PREFIX = "sibo_adapter_"

# Where layers keep their lambdas by adapter; each begins with the prefix by which PEFT tells a method's weights.
LORA_LAMBDA_NAME = "lora_sibo_lambda"
BOTTLENECK_LAMBDA_NAME = "sibo_adapter_lambda"

# By the name of a method's lambdas: a weight that each of its adapters has.
FIRST_WEIGHTS = {LORA_LAMBDA_NAME: "lora_A", BOTTLENECK_LAMBDA_NAME: "sibo_adapter_down"}


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a base model that carry adapters of any PEFT method, with their names from its root."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def adapters_on(layer: BaseTunerLayer) -> list[str]:
    """The adapters that have weights in a layer, of any PEFT method."""
    names = (adapter for name in layer.adapter_layer_names for adapter in getattr(layer, name, {}))
    return list(dict.fromkeys(names))


def lambda_name_of(layer: nn.Module) -> str:
    """The name under which a layer keeps its lambdas, or would."""
    return next((name for name in FIRST_WEIGHTS if name in layer._modules), LORA_LAMBDA_NAME)


def sibo_lambdas(layer: nn.Module) -> dict[str, Any]:
    """The lambdas of a layer, by adapter: of those that mix in it."""
    lambdas = layer._modules.get(lambda_name_of(layer))
    return dict(lambdas.items()) if isinstance(lambdas, nn.ModuleDict) else {}


def sibo_adapters(layer: nn.Module) -> list[str]:
    """The adapters that mix in this layer."""
    return list(sibo_lambdas(layer))

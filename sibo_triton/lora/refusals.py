"""What a model with SIBO adapters refuses to do, because the result would silently be another adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import nn

from sibo_triton.layers.adapters import sibo_adapters
from sibo_triton.lora.config import SiboLoraConfig
from sibo_triton.lora.peft_layers import dispatches_variants, lora_layers


def check_merge_allowed(model: nn.Module, adapter_names: Sequence[str] | None) -> None:
    """Raise a ValueError if any of the adapters (default: the active ones) mixes anywhere in the model."""
    for name, layer in lora_layers(model):
        for adapter_name in adapter_names or layer.active_adapters:
            if adapter_name in sibo_adapters(layer):
                refuse_merge(f"adapter {adapter_name!r} ({name} mixes)")


def check_weighted_adapter_allowed(model: nn.Module, adapters: Sequence[str]) -> None:
    """Raise a ValueError if any of the adapters to be combined mixes."""
    for name, layer in lora_layers(model):
        for adapter_name in sibo_adapters(layer):
            if adapter_name in adapters:
                raise ValueError(
                    f"Cannot combine adapter {adapter_name!r} ({name} mixes): adapters that read different mixes do "
                    "not add up to one. Activate several with base_model.set_adapter([...]) instead."
                )


def check_reducing_intruders_allowed(model: nn.Module, adapter_name: str) -> None:
    """Raise a ValueError if the adapter mixes: W0 + s B A, whose singular vectors are compared, is not what it adds."""
    for name, layer in lora_layers(model):
        if adapter_name in sibo_adapters(layer):
            raise ValueError(
                f"Cannot reduce the intruder dimensions of adapter {adapter_name!r} ({name} mixes): it reads a mix, so "
                "W0 + s B A is not the weight that it amounts to. Use a plain LoRA adapter (sibo_lambda=0)."
            )


def check_experts_allowed(configs: Mapping[str, Any]) -> None:
    """Raise a ValueError if a router among the adapters (Arrow, GenKnowSub) has a SIBO adapter for an expert."""
    for router, config in configs.items():
        arrow = getattr(config, "arrow_config", None)
        for name in [] if arrow is None else [*(arrow.task_adapter_names or ()), *(arrow.gks_adapter_names or ())]:
            expert = configs.get(name)
            if isinstance(expert, SiboLoraConfig) and expert.mixes:
                raise ValueError(
                    f"Adapter {name!r} is a SIBO adapter, which the router {router!r} (Arrow) would run as plain LoRA: "
                    "it multiplies by the experts' A and B itself. Give it plain LoRA experts (sibo_lambda=0, or "
                    "peft.LoraConfig)."
                )


def check_mixed_batch_allowed(model: nn.Module, adapter_names: Sequence[str]) -> None:
    """Raise a ValueError if a layer (HQQ's) would run one of the adapters of a mixed batch as plain LoRA."""
    for name, layer in lora_layers(model):
        for adapter_name in sibo_adapters(layer):
            if adapter_name in adapter_names and not dispatches_variants(layer, "_mixed_batch_forward"):
                raise ValueError(
                    f"{name} is a {type(layer).__name__}, which would run adapter {adapter_name!r} of a mixed batch as "
                    "plain LoRA. Run one adapter at a time: set_adapter, and no adapter_names."
                )


def refuse_merge(what: str) -> NoReturn:
    """Raise the ValueError that says why a SIBO adapter cannot be merged."""
    raise ValueError(
        f"Cannot merge {what}: a SIBO adapter reads the initial residual beside the layer's input, so no weight of the "
        "layer gives the same output (W0 + s (1 - lambda) B A is only a part of it). Keep the adapter unmerged: it can "
        "be saved, loaded and generated with as it is. Trainers that merge for a separate engine (TRL's GRPO with "
        "vLLM) need use_vllm=False, or a plain peft.LoraConfig."
    )

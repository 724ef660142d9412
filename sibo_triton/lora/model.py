"""SIBO on a `LoraModel`: what injection adds to its layers, and when that is taken off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from sibo_triton.initial_residual import find_block_stacks, trial_run
from sibo_triton.injection import mixing_modules
from sibo_triton.injection.mixing_modules import Method, bind, decide, requested_modules
from sibo_triton.injection.reversible import inject_reversibly, note_config
from sibo_triton.layers.adapters import adapters_on
from sibo_triton.layers.siblings import connect_siblings
from sibo_triton.lora.config import SiboLoraConfig
from sibo_triton.lora.install import forget, install, is_linear, match_class
from sibo_triton.lora.peft_layers import belongs_to_x_lora, dispatches_variants, lora_layers
from sibo_triton.lora.refusals import check_experts_allowed


class XLoraRefusal(ValueError):
    """X-LoRA was given a SIBO adapter."""


def inject_adapter(
    original: Callable[..., None], tuner: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """`LoraModel.inject_adapter`, and SIBO on top where the adapter's config asks for it.

    Raises:
        ValueError: the adapter cannot mix correctly; the model is then as it was.
    """
    config = tuner.peft_config[adapter_name]
    mixes = isinstance(config, SiboLoraConfig) and config.mixes

    def inject() -> None:
        check_experts_allowed(tuner.peft_config)
        for _, layer in lora_layers(model):
            forget(layer, adapter_name)  # an earlier adapter of this name
        if mixes:
            _inject_sibo(original, tuner, model, adapter_name, *args, **kwargs)
        else:
            original(tuner, model, adapter_name, *args, **kwargs)

    is_router = getattr(config, "arrow_config", None) is not None
    if mixes or is_router or any(adapter_name in getattr(layer, "sibo_sites", {}) for _, layer in lora_layers(model)):
        inject_reversibly(inject, tuner, model, adapter_name, remove_unused_hooks)
    else:
        original(tuner, model, adapter_name, *args, **kwargs)
    note_config(model, adapter_name, config)


def _inject_sibo(
    original: Callable[..., None], tuner: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    config = tuner.peft_config[adapter_name]
    config.check_options()
    if belongs_to_x_lora(tuner):
        raise XLoraRefusal(
            f"Adapter {adapter_name!r} is a SIBO adapter, which X-LoRA cannot use: its layers compute plain LoRA. "
            "Give X-LoRA plain LoRA adapters (sibo_lambda=0, or peft.LoraConfig)."
        )
    stacks = find_block_stacks(model, config.sibo_blocks)
    requested, known = requested_modules(config)
    trial = trial_run(model, stacks)  # also for a saved adapter: its file says what mixes, not which layers share x
    stacks = trial.owned(model, stacks)
    original(tuner, model, adapter_name, *args, **kwargs)

    layers = {name: layer for name, layer in lora_layers(model) if adapter_name in adapters_on(layer)}
    decisions = decide(layers, requested, stacks, None if known else trial, _LORA)
    sites = bind(model, config, layers, decisions, trial, _LORA)
    train = adapter_name in tuner.active_adapters and not config.inference_mode
    for name, layer in layers.items():
        install(layer, adapter_name, sites[name], config, train)
    connect_siblings(model, lora_layers(model), trial, warn=known)  # else `decide` has warned


def remove_unused_hooks(model: nn.Module) -> None:
    """Remove the hooks that no layer of `model` needs any more, and `FusedLinear` from layers without a site."""
    for _, layer in lora_layers(model):
        match_class(layer)
    mixing_modules.remove_unused_hooks(model)


def _obstacle(layer: LoraLayer) -> str | None:
    return None if is_linear(layer) else f"is a {type(layer.get_base_layer()).__name__}, not a linear layer"


def _refuse(name: str, layer: LoraLayer) -> None:
    if not dispatches_variants(layer):
        raise ValueError(
            f"{name} is a {type(layer).__name__}, a PEFT layer that computes plain LoRA whatever the adapter is, so "
            "SIBO would be left out silently. Use another quantisation (bitsandbytes, GPTQ, HQQ, torchao) or none, or "
            "peft.LoraConfig."
        )


_LORA = Method(
    name="LoRA",
    plain="plain LoRA",
    width=lambda layer: layer.in_features,
    obstacle=_obstacle,
    refuse=_refuse,
)

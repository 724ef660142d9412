"""Run plain LoRA adapters, of whatever origin, by the fused operations: `accelerate`, and back: `restore`.

The adapter stays what it is: the same parameters, the same files, PEFT's own code for saving, merging and everything
else. What changes is how its layers compute: their class, a `LoraVariant` that PEFT's forward calls, and the hooks by
which siblings meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.xlora import XLoraModel
from torch import nn

from sibo_triton.initial_residual import find_block_stacks, trial_run
from sibo_triton.injection.siblings import attach_siblings, detach_unused_siblings, find_siblings
from sibo_triton.injection.sites import MixingSite, Notices
from sibo_triton.lora.forward import AcceleratedLora, SiboLoraVariant
from sibo_triton.lora.install import add_site, forget, is_linear
from sibo_triton.lora.layer import dispatches_variants, lora_layers
from sibo_triton.lora.wrapping import wrap_layer_classes

_accelerates_all = False


def accelerate(model: nn.Module, adapter_names: Sequence[str] | None = None) -> nn.Module:
    """Run the plain LoRA adapters of a model by fused kernels: ``y = W0 x + s B A drop(x)``.

    The adapters stay plain LoRA: the same parameters, the same files, and outputs that differ by rounding (under
    dropout by the mask, which has the same distribution). Adapters that are more than LoRA (DoRA, aLoRA...) are left
    as they are, and so are layers of PEFT that compute without asking; `print(sibo_triton.explain(model))` says what
    runs how, and why. Where nothing at all could be accelerated, a warning says so. SIBO adapters are fused anyway.

    Args:
        model: a `PeftModel`, or a model with injected LoRA adapters. It is changed in place.
        adapter_names: the adapters; None: all.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: it has no LoRA layers, no adapter of a name that is asked for, or is an X-LoRA model.
    """
    root = _root_of(model)
    layers = dict(lora_layers(root))
    present = {name for layer in layers.values() for name in _adapters_of(layer)}
    if not present:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers: call accelerate after get_peft_model, add_adapter or "
            "PeftModel.from_pretrained."
        )
    unknown = sorted(set(adapter_names or ()) - present)
    if unknown:
        raise ValueError(f"No LoRA adapter is named {', '.join(unknown)}; there are {', '.join(sorted(present))}.")
    notices, changed = Notices(), False
    obstacles: dict[str, str] = {}  # each reason, and the first layer that has it
    for name, layer in layers.items():
        for adapter_name in present if adapter_names is None else adapter_names:
            if adapter_name not in _adapters_of(layer):
                continue
            obstacle = obstacle_to_acceleration(layer, adapter_name)
            if obstacle is None:
                add_site(layer, adapter_name, MixingSite(name, None, "plain LoRA, accelerated", notices))
                layer.lora_variant[adapter_name] = AcceleratedLora()
                changed = True
            elif not isinstance(layer.lora_variant.get(adapter_name), SiboLoraVariant):  # which is fused anyway
                obstacles.setdefault(obstacle, f"{name}, adapter {adapter_name!r}")
    if changed:
        wrap_layer_classes(root)
        _attach_siblings(root)
    elif obstacles:
        reasons = "; ".join(f"{where}: {obstacle}" for obstacle, where in obstacles.items())
        message = f"accelerate changed nothing: no adapter is plain LoRA on a linear layer ({reasons})."
        warnings.warn(message, stacklevel=2)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Take `accelerate` back: plain adapters run by PEFT's own forward again, bit for bit, and no trace is left.

    Args:
        model: as for `accelerate`; changed in place.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    root = _root_of(model)
    for _, layer in lora_layers(root):
        for adapter_name, variant in list(layer.lora_variant.items()):
            if isinstance(variant, AcceleratedLora):
                forget(layer, adapter_name)
    detach_unused_siblings(root)
    return model


def accelerate_all(enabled: bool = True) -> None:
    """Accelerate each plain LoRA adapter of this process as it is made or loaded, from now on; or no longer.

    For adapters that are made inside of another library (TRL's trainers). Models that have theirs already are left
    alone: `accelerate` and `restore` are for them.
    """
    global _accelerates_all
    _accelerates_all = bool(enabled)


def accelerate_if_all(root: nn.Module, adapter_name: str) -> None:
    """What `accelerate_all` asks for, for an adapter that was just made on a base model."""
    if _accelerates_all and any(adapter_name in _adapters_of(layer) for _, layer in lora_layers(root)):
        accelerate(root, [adapter_name])


def obstacle_to_acceleration(layer: LoraLayer, adapter_name: str) -> str | None:
    """Why an adapter of a LoRA layer stays PEFT's, or None."""
    if adapter_name not in layer.lora_A:
        return f"LoRA on a {type(layer.get_base_layer()).__name__}"
    variant = layer.lora_variant.get(adapter_name)
    if variant is not None:
        name = type(variant).__name__.removesuffix("Variant")
        return None if isinstance(variant, AcceleratedLora) else f"{name} is more than LoRA"
    if not is_linear(layer):
        return f"LoRA on a {type(layer.get_base_layer()).__name__}"
    if not dispatches_variants(layer):
        return f"PEFT's {type(layer).__name__} computes without asking"
    return None


def _attach_siblings(root: nn.Module) -> None:
    try:
        stacks = find_block_stacks(root)
    except ValueError:  # no transformer: every layer runs alone
        return
    attach_siblings(root, find_siblings(lora_layers(root), trial_run(root, stacks)))


def _root_of(model: nn.Module) -> nn.Module:
    """The base model, from which modules are named."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, got {type(model).__name__}")
    tuner: Any = model.base_model if isinstance(model, PeftModel) else model
    if isinstance(tuner, XLoraModel):
        raise ValueError("X-LoRA calls the modules of its adapters itself: it cannot be accelerated.")
    return tuner.model if isinstance(tuner, LoraModel) else tuner


def _adapters_of(layer: LoraLayer) -> Iterator[str]:
    yield from layer.lora_A
    yield from layer.lora_embedding_A

"""Run plain LoRA adapters, of whatever origin, by the fused operations: `accelerate`, and back: `restore`.

An adapter keeps its parameters, its files, and PEFT's own code for saving, merging and everything else. What changes is
how its layers compute: their class, a `LoraVariant` that PEFT's forward calls, and the hooks by which siblings (layers
with the same input) share passes over it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.xlora import XLoraModel
from torch import nn

from sibo_triton.initial_residual import find_block_stacks, trial_run
from sibo_triton.layers.adapters import adapters_on
from sibo_triton.layers.siblings import connect_siblings, detach_unused_siblings
from sibo_triton.layers.sites import MixingSite, Notices
from sibo_triton.lora.install import add_site, forget, is_linear
from sibo_triton.lora.layer import AcceleratedLora, SiboLoraVariant
from sibo_triton.lora.peft_layers import belongs_to_x_lora, dispatches_variants, lora_layers
from sibo_triton.lora.wrapping import wrap_layer_classes

_Model = TypeVar("_Model", bound=nn.Module)

_accelerates_all = False


def accelerate(model: _Model, adapter_names: str | Sequence[str] | None = None) -> _Model:
    """Run the plain LoRA adapters of a model by fused kernels: ``y = W0 x + b + s B A drop(x)``.

    That is SIBO's ``y = W0 x + b + s B A drop((1 - lambda) x + lambda h0)`` at lambda = 0, with x ``[..., K]``, W0
    ``[N, K]``, A ``[r, K]``, B ``[N, r]``, y ``[..., N]``; dtypes and devices stay as they are. On a GPU that the
    kernels support the layers run on Triton, elsewhere in plain PyTorch.

    The adapters stay plain LoRA: the same parameters, the same files, and outputs that differ by rounding (under
    dropout by the mask, which has the same distribution). Variants of LoRA (DoRA, aLoRA...) are left as they are, and
    so are PEFT layers whose forward ignores `lora_variant` (AWQ, EETQ...); `print(sibo_triton.explain(model))` says how
    each layer runs, and why. If nothing could be accelerated, a warning says so. SIBO adapters are always fused. To
    find the layers that share their input, the model runs once on a tiny input.

    Args:
        model: a `PeftModel`, or a model with injected LoRA adapters. It is changed in place.
        adapter_names: the adapter or adapters to accelerate. Default: all.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: `model` has no LoRA layers or no adapter of a name in `adapter_names`, or is an X-LoRA model;
            `adapter_names` is empty.
    """
    root = _root_of(model, "accelerate")
    layers = dict(lora_layers(root))
    chosen = _chosen(layers, adapter_names)
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers: call accelerate after get_peft_model, add_adapter or "
            "PeftModel.from_pretrained."
        )
    notices, changed = Notices(), False
    obstacles: dict[str, str] = {}  # each reason, and the first layer that has it
    for name, layer in layers.items():
        for adapter_name in filter(chosen.__contains__, adapters_on(layer)):
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


def restore(model: _Model, adapter_names: str | Sequence[str] | None = None) -> _Model:
    """Undo `accelerate`: plain adapters run by PEFT's own forward again, bit for bit, and no trace is left.

    Args:
        model: as for `accelerate`; changed in place. Adapters that were not accelerated are left as they are.
        adapter_names: the adapter or adapters to restore. Default: all.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: `model` has no adapter of a name in `adapter_names`, or is an X-LoRA model; `adapter_names` is
            empty.
    """
    root = _root_of(model, "restore")
    layers = dict(lora_layers(root))
    chosen = _chosen(layers, adapter_names)
    for layer in layers.values():
        for adapter_name, variant in list(layer.lora_variant.items()):
            if isinstance(variant, AcceleratedLora) and adapter_name in chosen:
                forget(layer, adapter_name)
    detach_unused_siblings(root)
    return model


def accelerate_all(enabled: bool = True) -> None:
    """Accelerate every plain LoRA adapter that is created or loaded from now on, as `accelerate` does.

    For adapters that another library creates (TRL's trainers). Adapters that exist already are left as they are: use
    `accelerate` and `restore` for them.

    Args:
        enabled: False stops it. The setting is process-wide.
    """
    global _accelerates_all
    _accelerates_all = bool(enabled)


def accelerate_if_all(tuner: LoraModel, root: nn.Module, adapter_name: str) -> None:
    """Accelerate an adapter that was just injected into a base model, if `accelerate_all` asks for it."""
    if not _accelerates_all or belongs_to_x_lora(tuner):
        return
    if any(adapter_name in adapters_on(layer) for _, layer in lora_layers(root)):
        accelerate(root, adapter_name)


def obstacle_to_acceleration(layer: LoraLayer, adapter_name: str) -> str | None:
    """Reason why an adapter of a LoRA layer keeps PEFT's forward, or None."""
    if adapter_name not in layer.lora_A:
        return f"LoRA on a {type(layer.get_base_layer()).__name__}"
    variant = layer.lora_variant.get(adapter_name)
    if variant is not None:
        name = type(variant).__name__.removesuffix("Variant")
        return None if isinstance(variant, AcceleratedLora) else f"{name} is more than LoRA"
    if not is_linear(layer):
        return f"LoRA on a {type(layer.get_base_layer()).__name__}"
    if not dispatches_variants(layer):
        return f"PEFT's {type(layer).__name__} ignores lora_variant"
    return None


def _chosen(layers: Mapping[str, LoraLayer], adapter_names: str | Sequence[str] | None) -> set[str]:
    """The names of the adapters that are meant; without names, of all that the layers have."""
    present = {name for layer in layers.values() for name in adapters_on(layer)}
    if adapter_names is None:
        return present
    chosen = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
    if not chosen:
        raise ValueError("adapter_names is empty: name adapters, or leave it out, which means all.")
    unknown = sorted(chosen - present)
    if unknown:
        there = f"there are {', '.join(sorted(present))}" if present else "the model has none"
        raise ValueError(f"No LoRA adapter is named {', '.join(unknown)}; {there}.")
    return chosen


def _attach_siblings(root: nn.Module) -> None:
    try:
        stacks = find_block_stacks(root)
    except ValueError:  # not a transformer: every layer runs alone
        return
    connect_siblings(root, lora_layers(root), trial_run(root, stacks), warn=True)


def _root_of(model: nn.Module, function: str) -> nn.Module:
    """The base model, relative to which modules are named; the errors name the `function` that asks."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, got {type(model).__name__}.")
    tuner: Any = model.base_model if isinstance(model, PeftModel) else model
    if isinstance(tuner, XLoraModel):
        raise ValueError("X-LoRA calls the modules of its adapters itself: it cannot be accelerated.")
    return tuner.model if isinstance(tuner, LoraModel) else tuner

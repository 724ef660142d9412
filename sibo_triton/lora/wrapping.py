"""What is changed of the methods of PEFT's LoRA layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from sibo_triton.layers.adapters import sibo_adapters
from sibo_triton.layers.sites import in_mixed_batch, mixed_batch, site_of
from sibo_triton.lora.layer import AcceleratedLora, SiboLoraVariant
from sibo_triton.lora.peft_layers import lora_layers
from sibo_triton.lora.refusals import refuse_merge
from sibo_triton.patching import wrap


def wrap_layer_classes(model: nn.Module) -> None:
    """Wrap the classes of the LoRA layers that have sites: PEFT may have imported them just now."""
    for _, layer in lora_layers(model):
        if layer.__dict__.get("sibo_sites"):
            wrap_layer_class(type(layer))


def wrap_layer_class(layer_class: type) -> None:
    """Wrap the methods that a class of LoRA layers defines or inherits. PEFT imports backends' classes late."""
    for name, wrapper in _LAYER_WRAPPERS.items():
        owner = next((base for base in layer_class.__mro__ if name in vars(base)), None)
        if owner is not None:
            wrap(owner, name, wrapper)


def _merge_layer(
    original: Callable, layer: LoraLayer, safe_merge: bool = False, adapter_names: Any = None, **kwargs: Any
) -> Any:
    for name in adapter_names or layer.active_adapters:  # before PEFT merges a plain one in front
        if name in sibo_adapters(layer):
            refuse_merge(f"{site_of(layer, name).name}, adapter {name!r}")
    with _as_peft_made_it(layer):
        return original(layer, safe_merge, adapter_names, **kwargs)


def _unmerge_layer(original: Callable, layer: LoraLayer, *args: Any, **kwargs: Any) -> Any:
    with _as_peft_made_it(layer):
        return original(layer, *args, **kwargs)


def _supports_lora_conversion(original: Callable, layer: LoraLayer, adapter_name: str = "default") -> bool:
    return adapter_name not in sibo_adapters(layer) and original(layer, adapter_name)  # PEFT 0.19 asks no variant


def _get_delta_weight(original: Callable, layer: LoraLayer, *args: Any, **kwargs: Any) -> Any:
    for name in {*args, *kwargs.values()}.intersection(sibo_adapters(layer)):  # scripts that merge by hand ask for it
        refuse_merge(f"{site_of(layer, name).name}, adapter {name!r}")
    return original(layer, *args, **kwargs)


def _mixed_batch_forward(original: Callable, layer: LoraLayer, x: Any, *args: Any, **kwargs: Any) -> Any:
    with mixed_batch(kwargs["adapter_names"]):
        return original(layer, x, *args, **kwargs)


def _cast_input_dtype(original: Callable, layer: Any, x: Any, dtype: Any) -> Any:
    """Our variants read x as it is: a copy in the adapter's dtype would be kept for the backward by each layer."""
    if x is None or x.dtype == dtype:
        return x
    sites = layer.__dict__.get("sibo_sites")
    if sites and isinstance(layer, LoraLayer) and in_mixed_batch() is None:
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if all(isinstance(layer.lora_variant.get(name), SiboLoraVariant) for name in active):
            return x
    return original(layer, x, dtype)


_LAYER_WRAPPERS: dict[str, Callable] = {
    "_cast_input_dtype": _cast_input_dtype,
    "merge": _merge_layer,
    "unmerge": _unmerge_layer,
    "supports_lora_conversion": _supports_lora_conversion,
    "get_delta_weight": _get_delta_weight,
    "_mixed_batch_forward": _mixed_batch_forward,
}


@contextmanager
def _as_peft_made_it(layer: LoraLayer) -> Iterator[None]:
    """Hide the variants of accelerated adapters while PEFT merges or unmerges: they are plain LoRA."""
    hidden = {name: variant for name, variant in layer.lora_variant.items() if isinstance(variant, AcceleratedLora)}
    for name in hidden:
        del layer.lora_variant[name]
    try:
        yield
    finally:
        layer.lora_variant.update(hidden)

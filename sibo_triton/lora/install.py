"""Put a SIBO adapter on PEFT's LoRA layers, and take it off."""

from __future__ import annotations

from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from sibo_triton.layers.adapters import LORA_LAMBDA_NAME, sibo_adapters
from sibo_triton.layers.sites import MixingSite
from sibo_triton.lora.config import SiboLoraConfig
from sibo_triton.lora.layer import FusedLinear, SiboLoraVariant
from sibo_triton.lora.peft_layers import dispatches_variants
from sibo_triton.sibo_lambda import SiboLambda

_NOT_LINEAR = (Embedding, Conv1d, Conv2d, Conv3d)


def install(layer: LoraLayer, adapter_name: str, site: MixingSite, config: SiboLoraConfig, train: bool) -> None:
    """Make `adapter_name` of a LoRA layer a SIBO adapter, or only record why it stays plain LoRA.

    Args:
        layer: PEFT's LoRA layer, which already has the adapter.
        adapter_name: the adapter.
        site: where the layer is and what it mixes in.
        config: the adapter's.
        train: whether the adapter is active and trainable now.
    """
    add_site(layer, adapter_name, site)
    if is_linear(layer) and dispatches_variants(layer):
        layer.lora_variant[adapter_name] = SiboLoraVariant()
    if site.residual is None:
        return
    if LORA_LAMBDA_NAME not in layer._modules:
        setattr(layer, LORA_LAMBDA_NAME, nn.ModuleDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, LORA_LAMBDA_NAME)
    lambda_ = SiboLambda(config.sibo_lambda, config.sibo_learnable, layer.lora_A[adapter_name].weight.device)
    getattr(layer, LORA_LAMBDA_NAME)[adapter_name] = lambda_.requires_grad_(train)


def add_site(layer: LoraLayer, adapter_name: str, site: MixingSite) -> None:
    """Record the site of an adapter on the layer, and give the layer the class that fits."""
    if "sibo_sites" not in layer.__dict__:
        layer.sibo_sites = {}
        # on the instance, not the class, so that plain LoRA layers stay stock; PEFT deletes an adapter by these names
        layer.other_param_names = (*layer.other_param_names, "sibo_sites", "lora_variant")
    layer.sibo_sites[adapter_name] = site
    match_class(layer)


def forget(layer: LoraLayer, adapter_name: str) -> None:
    """Remove from a LoRA layer what was installed for `adapter_name`, which is then plain LoRA."""
    if getattr(layer, "sibo_sites", {}).pop(adapter_name, None) is not None:
        layer.lora_variant.pop(adapter_name, None)
    if adapter_name in sibo_adapters(layer):
        del getattr(layer, LORA_LAMBDA_NAME)[adapter_name]
    match_class(layer)


def match_class(layer: LoraLayer) -> None:
    """Make a dense LoRA layer a `FusedLinear` while it has sites; without any, restore PEFT's class and attributes."""
    has_sibo = bool(getattr(layer, "sibo_sites", None))
    if not has_sibo and "sibo_sites" in layer.__dict__:
        for name in ("sibo_sites", "adapter_layer_names", "other_param_names"):
            layer.__dict__.pop(name, None)
        layer._modules.pop(LORA_LAMBDA_NAME, None)
    wrapped = "forward" in layer.__dict__ or "_old_forward" in layer.__dict__  # by accelerate, bound to the class
    if type(layer) is LoraLinear or (type(layer) is FusedLinear and not wrapped):
        fuses = has_sibo and type(layer.base_layer) is nn.Linear
        layer.__class__ = FusedLinear if fuses else LoraLinear


def is_linear(layer: LoraLayer) -> bool:
    """Whether a LoRA layer's A and B are linears, on a linear base layer."""
    down = next(iter(layer.lora_A.values()), None)
    # PEFT's wrapper of an nn.Parameter has them too
    return not isinstance(layer, _NOT_LINEAR) and isinstance(down, nn.Linear) and not hasattr(layer, "parameter_name")

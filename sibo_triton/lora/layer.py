"""What a PEFT LoRA layer does for a SIBO adapter: find h0, mix, and go on as LoRA."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn

from sibo_triton import reference
from sibo_triton.initial_residual import InitialResidual
from sibo_triton.mixing import SiboLambda

LAMBDA_NAME = "lora_sibo_lambda"  # the prefix is PEFT's: it tells an adapter's weights by it


@dataclass
class MixingSite:
    """One LoRA layer as one adapter sees it.

    Attributes:
        name: the layer's name from the base model's root.
        residual: the initial residual that it mixes in, or None for plain LoRA.
        reason: why it mixes or not, in words.
    """

    name: str
    residual: InitialResidual | None
    reason: str


class _MixedBatch(threading.local):
    adapter_names: Sequence[str] | None = None


_mixed_batch = _MixedBatch()


@contextmanager
def mixed_batch(adapter_names: Sequence[str]) -> Iterator[None]:
    """While PEFT splits a batch by `adapter_names`, let the variants know, so that they split h0 alike."""
    previous, _mixed_batch.adapter_names = _mixed_batch.adapter_names, adapter_names
    try:
        yield
    finally:
        _mixed_batch.adapter_names = previous


class SiboLoraVariant(LoraVariant):
    """LoRA that reads the mix: y = W0 x + b + s * B A drop((1 - lambda) * x + lambda * h0)."""

    def supports_lora_conversion(self) -> bool:
        return False  # an update of the weight that gives the same output does not exist

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Nothing: `install` puts on what is needed, after PEFT has made the layer."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Add the adapter's output to `result` = W0 x + b.

        Args:
            module: the LoRA layer.
            active_adapter: the adapter that runs.
            x: [..., K], which PEFT has cast to the adapter's dtype.
            result: [..., N].

        Raises:
            RuntimeError: no forward of the layer's stack runs in this thread.
            ValueError: h0 and x are not of the same tokens.
        """
        x_mixed = reference.mix(x, initial_residual_for(module, active_adapter, x), lambda_of(module, active_adapter))
        x_mixed = module.lora_dropout[active_adapter](x_mixed)
        down = module.lora_A[active_adapter](x_mixed)
        return result + module.lora_B[active_adapter](down) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        refuse_merge(f"{site_of(module, active_adapter).name}, adapter {active_adapter!r}")

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        refuse_merge(f"{site_of(module, active_adapter).name}, adapter {active_adapter!r}")

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        refuse_merge(f"{site_of(module, active_adapter).name}, adapter {active_adapter!r}")


def refuse_merge(what: str) -> NoReturn:
    """Raise the error that says why a SIBO adapter is never merged."""
    raise ValueError(
        f"Cannot merge {what}: a SIBO adapter reads the initial residual beside the layer's input, so no weight of the "
        "layer gives the same output (W0 + s (1 - lambda) B A is only a part of it). Keep the adapter unmerged: it can "
        "be saved, loaded and generated with as it is. Trainers that merge for a separate engine (TRL's GRPO with "
        "vLLM) need use_vllm=False, or a plain peft.LoraConfig."
    )


def site_of(module: nn.Module, adapter_name: str) -> MixingSite:
    """The mixing site of a LoRA layer for an adapter."""
    sites: dict[str, MixingSite] = module.__dict__["sibo_sites"]
    return sites[adapter_name]


def lambda_of(module: LoraLayer, adapter_name: str) -> torch.Tensor:
    """lambda of a mixing layer: fp32, shape [1]; a gradient flows to it when it is learnable."""
    return getattr(module, LAMBDA_NAME)[adapter_name]()


def initial_residual_for(module: LoraLayer, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
    """h0 for the tokens of `x`, on its device and of its shape.

    In a batch of several adapters x holds one adapter's rows: h0 is indexed alike. An x of [tokens, K] (routers and
    shared experts flatten batch and sequence) gets h0 flattened.
    """
    site = site_of(module, adapter_name)
    assert site.residual is not None
    initial_residual = site.residual.get(site.name, x.device)
    names = _mixed_batch.adapter_names
    if names is not None:
        if initial_residual.shape[0] != len(names):
            raise ValueError(
                f"{site.name}: adapter_names has {len(names)} entries, but the initial residual has a batch of "
                f"{initial_residual.shape[0]}."
            )
        initial_residual = initial_residual[[row for row, name in enumerate(names) if name == adapter_name]]
    if initial_residual.shape == x.shape:
        return initial_residual
    if x.dim() == 2 and initial_residual.shape[-1] == x.shape[-1] and initial_residual.numel() == x.numel():
        return initial_residual.reshape(x.shape)
    raise ValueError(
        f"{site.name} got an input of shape {list(x.shape)}, which is not that of the initial residual "
        f"{list(initial_residual.shape)} of {site.residual.stack_name!r}: the tokens cannot be told to be the same. "
        "Leave the module out with sibo_target_modules; it then gets plain LoRA."
    )


def dispatches_variants(layer: LoraLayer, method: str = "forward") -> bool:
    """Whether the layer's forward (or another method) looks at `lora_variant`; some of PEFT's backends do not."""
    code = getattr(inspect.unwrap(getattr(type(layer), method)), "__code__", None)
    return code is not None and "lora_variant" in code.co_names


def install(layer: LoraLayer, adapter_name: str, site: MixingSite, value: float, learnable: bool, train: bool) -> None:
    """Make `adapter_name` of a LoRA layer a SIBO adapter, or only note why it stays plain LoRA.

    Args:
        layer: PEFT's LoRA layer, which already has the adapter.
        adapter_name: the adapter.
        site: where the layer is and what it mixes in.
        value: lambda to start from.
        learnable: whether lambda is trained.
        train: whether the adapter is active and trainable now.
    """
    if "sibo_sites" not in layer.__dict__:
        layer.sibo_sites = {}
        # an instance's, not the class's, so that plain LoRA layers stay stock; PEFT deletes an adapter by these
        layer.other_param_names = (*layer.other_param_names, "sibo_sites")
    layer.sibo_sites[adapter_name] = site
    if site.residual is None:
        return
    if LAMBDA_NAME not in layer._modules:
        setattr(layer, LAMBDA_NAME, nn.ModuleDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, LAMBDA_NAME)
        layer.other_param_names = (*layer.other_param_names, "lora_variant")
    device = layer.lora_A[adapter_name].weight.device
    lambda_ = SiboLambda(value, learnable, None if device.type == "meta" else device)
    lambda_.requires_grad_(train)
    getattr(layer, LAMBDA_NAME)[adapter_name] = lambda_
    layer.lora_variant[adapter_name] = SiboLoraVariant()


def forget(layer: LoraLayer, adapter_name: str) -> None:
    """Make `adapter_name` of a LoRA layer plain LoRA, or nothing yet."""
    getattr(layer, "sibo_sites", {}).pop(adapter_name, None)
    if adapter_name in sibo_adapters(layer):
        del getattr(layer, LAMBDA_NAME)[adapter_name]
        layer.lora_variant.pop(adapter_name, None)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers of a base model, with their names from its root."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def sibo_adapters(layer: nn.Module) -> list[str]:
    """The adapters that mix in this layer."""
    lambdas = layer._modules.get(LAMBDA_NAME)
    return list(lambdas) if isinstance(lambdas, nn.ModuleDict) else []

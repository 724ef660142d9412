"""A PEFT LoRA layer as a SIBO adapter sees it: its h0, its lambda, and which layers there are."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from sibo_triton.initial_residual import InitialResidual
from sibo_triton.lora.paths import Notices

LAMBDA_NAME = "lora_sibo_lambda"  # the prefix is PEFT's: it tells an adapter's weights by it


@dataclass
class MixingSite:
    """One LoRA layer as one adapter sees it.

    Attributes:
        name: the layer's name from the base model's root.
        residual: the initial residual that it mixes in, or None for plain LoRA.
        reason: why it mixes or not, in words.
        notices: what was said about the adapter's speed.
    """

    name: str
    residual: InitialResidual | None
    reason: str
    notices: Notices


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


def sibo_adapters(layer: nn.Module) -> list[str]:
    """The adapters that mix in this layer."""
    lambdas = layer._modules.get(LAMBDA_NAME)
    return list(lambdas) if isinstance(lambdas, nn.ModuleDict) else []

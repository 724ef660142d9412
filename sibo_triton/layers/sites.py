"""A layer as one adapter sees it: what it mixes in, why, and which rows of h0 are its own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from sibo_triton import reference
from sibo_triton.initial_residual import InitialResidual, in_trial_run


@dataclass
class Notices:
    """The warnings about the speed of one adapter of one model: each reason is given once."""

    said: set[str] = field(default_factory=set)

    def warn_once(self, module_name: str, what: str, reason: str) -> None:
        """Warn that a module does not run by the fastest path, unless the reason has been given before."""
        if torch.compiler.is_compiling() or in_trial_run() or reason in self.said:
            return
        self.said.add(reason)
        warnings.warn(
            f"{module_name}: {what}, because {reason}. It computes the same, slower. Other modules for the same "
            "reason are not named: print(sibo_triton.explain(model)) lists them all.",
            stacklevel=2,
        )


@dataclass
class MixingSite:
    """One layer as one adapter sees it.

    Attributes:
        name: the layer's name from the base model's root.
        residual: the initial residual that it mixes in, or None for the plain method.
        reason: why it mixes or not.
        notices: the warnings about the adapter's speed.
        runs_once: whether it ran once in its block when the model was run on trial.
    """

    name: str
    residual: InitialResidual | None
    reason: str
    notices: Notices
    runs_once: bool = False


class _MixedBatch(threading.local):
    adapter_names: Sequence[str] | None = None


_mixed_batch = _MixedBatch()


@contextmanager
def mixed_batch(adapter_names: Sequence[str]) -> Iterator[None]:
    """Context in which a batch is split by `adapter_names`: the layers split h0 in the same way."""
    previous, _mixed_batch.adapter_names = _mixed_batch.adapter_names, adapter_names
    try:
        yield
    finally:
        _mixed_batch.adapter_names = previous


def in_mixed_batch() -> Sequence[str] | None:
    """The adapters' names in the batch that is split now in this thread, one for each row, or None."""
    return _mixed_batch.adapter_names


def site_of(module: nn.Module, adapter_name: str) -> MixingSite:
    """The mixing site of a layer for an adapter."""
    sites: dict[str, MixingSite] = module.__dict__["sibo_sites"]
    return sites[adapter_name]


def initial_residual_for(module: nn.Module, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
    """h0 for the tokens of `x`, on its device and of its shape.

    In a mixed batch x holds one adapter's rows, and h0 is indexed in the same way. For an x of [tokens, K] (routers and
    shared experts flatten batch and sequence) h0 is flattened too; for [batch, height, width, K] it is split.

    Raises:
        RuntimeError: no forward of the layer's stack runs in this thread.
        ValueError: h0 does not fit x, or `adapter_names`.
    """
    site = site_of(module, adapter_name)
    assert site.residual is not None
    initial_residual = site.residual.get(site.name, x.device)
    if site.runs_once:
        site.residual.note_input(site.name, adapter_name, x)
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
    if initial_residual.shape[-1] == x.shape[-1] and initial_residual.numel() == x.numel():
        if x.dim() == 2 or x.shape[0] == initial_residual.shape[0]:
            return initial_residual.reshape(x.shape)
    raise ValueError(
        f"{site.name} got an input of shape {list(x.shape)}, which is not that of the initial residual "
        f"{list(initial_residual.shape)} of {site.residual.stack_name!r}: the tokens cannot be told to be the same. "
        "Leave the module out with sibo_target_modules; it then gets the plain method."
    )


class Mixing(NamedTuple):
    """The operations' arguments for h0, lambda and dropout, in their order."""

    initial_residual: torch.Tensor | None
    lambda_: float | torch.Tensor
    dropout_p: float
    dropout_seed: torch.Tensor | None


def mixing_arguments(
    layers: Sequence[Any], adapter_name: str, x: torch.Tensor, dropouts: Sequence[nn.Module], lambdas: str
) -> list[Mixing]:
    """What one adapter of layers that get the same x mixes in and drops.

    Args:
        dropouts: the adapter's dropout module of each layer.
        lambdas: the name of the layers' dictionary of lambdas.
    """
    rates = [of.p if of.training and isinstance(of, nn.Dropout) and of.p > 0 else 0.0 for of in dropouts]
    seeds = iter(_seeds(len(rates) - rates.count(0.0), x.device)) if any(rates) else iter(())
    residuals: dict[int, torch.Tensor] = {}
    arguments = []
    for layer, rate in zip(layers, rates, strict=True):
        seed = next(seeds) if rate else None
        site = site_of(layer, adapter_name)
        residual = site.residual
        if residual is None:
            arguments.append(Mixing(None, 0.0, rate, seed) if rate else _NO_MIXING)
            continue
        if id(residual) not in residuals:  # siblings get the same tensor
            residuals[id(residual)] = initial_residual_for(layer, adapter_name, x)
        else:
            residual.note_read(site.name)
        lambda_module = layer._modules[lambdas]._modules[adapter_name]
        hooked = lambda_module._forward_hooks or lambda_module._forward_pre_hooks
        # calling the module would cost as much host time as a product
        lambda_ = lambda_module() if hooked else lambda_module.forward()
        arguments.append(Mixing(residuals[id(residual)], lambda_, rate, seed))
    return arguments


_NO_MIXING = Mixing(None, 0.0, 0.0, None)


def _seeds(count: int, device: torch.device) -> Sequence[torch.Tensor]:
    return [reference.draw_seed(device)] if count == 1 else reference.draw_seeds(count, device)

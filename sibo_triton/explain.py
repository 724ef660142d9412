"""`explain(model)`: what each LoRA layer and each bottleneck adapter computes, by which path, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from sibo_triton.bottleneck.layer import SiboAdapterLayer
from sibo_triton.bottleneck.model import adapter_layers
from sibo_triton.layers.adapters import adapters_on, sibo_lambdas
from sibo_triton.layers.siblings import siblings_below
from sibo_triton.layers.sites import MixingSite
from sibo_triton.lora.acceleration import obstacle_to_acceleration
from sibo_triton.lora.layer import SiboLoraVariant
from sibo_triton.lora.paths import path_of
from sibo_triton.lora.peft_layers import lora_layers
from sibo_triton.ops import backend_for

_PATHS = {
    "fused": "run fused",
    "adapter": "run the adapter fused, beside their frozen layer",
    "modules": "run module by module",
    "definition": "run the definition",
    "PEFT": "run PEFT's forward",
}
_BACKENDS = {"triton": "by Triton kernels", "torch": "in plain PyTorch"}


@dataclass(frozen=True)
class ModuleExplanation:
    """One LoRA layer, or one module with a bottleneck adapter, under one adapter.

    Attributes:
        module: the module's name from the root of the explained model.
        adapter: the adapter's name.
        mixes: whether its input is mixed with the initial residual.
        lambda_: the share of the initial residual; None where nothing mixes, or the tensor is sharded or on meta.
        learnable: whether lambda is trained.
        initial_residual: where h0 comes from ("block_input of model.layers"), None where nothing mixes.
        reason: why it mixes or not.
        runs: how it runs when this adapter alone is active, as the model is now (parameters that are sharded now may be
            whole during a forward). "fused": the frozen linear and the adapter are one operation; "adapter": the
            adapter is one, on what the frozen layer returned; "modules": the adapter's modules are called one by one;
            "definition": sibo_triton.reference runs; "PEFT": PEFT's own forward runs.
        backend: "triton", "torch" or "reference": what computes that operation; None where PEFT's forward runs.
        runs_reason: why it does not run by a faster path or backend; None where it runs by the fastest.
        siblings: names, below the same parent, of the other layers that get the same input. Where they and this layer
            run fused, they share passes over it.
        method: "LoRA", or "adapter" for a bottleneck adapter.
    """

    module: str
    adapter: str
    mixes: bool
    lambda_: float | None
    learnable: bool
    initial_residual: str | None
    reason: str
    runs: str
    backend: str | None
    runs_reason: str | None
    siblings: tuple[str, ...]
    method: str = "LoRA"


class Explanation(list[ModuleExplanation]):
    """A list of `ModuleExplanation` that prints as a table, with one row for what is alike in all blocks."""

    def __str__(self) -> str:
        if not self:
            return "No adapters."
        header = ("module", "n", "adapter", "computes", "lambda", "initial residual", "why", "runs")
        groups: dict[tuple, list[ModuleExplanation]] = {}
        for row in self:
            name = row.module.removeprefix("base_model.model.")  # PEFT's
            name = re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1)  # the block's number comes first
            key = (name, row.adapter, row.method, row.mixes, row.learnable, row.initial_residual, row.reason, row.runs)
            groups.setdefault(key, []).append(row)
        table = [header]
        for (name, adapter, method, mixes, _, residual, reason, runs), rows in groups.items():
            kind = f"SIBO-{method}" if mixes else method
            table.append((name, str(len(rows)), adapter, kind, _lambdas(rows), residual or "", reason, runs))
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in table)
        lines = ["  ".join(cells).rstrip() for cells in padded]
        mixing = sum(row.mixes for row in self)
        rule = "  ".join("-" * width for width in widths)
        methods = " and ".join(dict.fromkeys(row.method for row in self))
        summary = f"{mixing} of {len(self)} {methods} layers mix in the initial residual."
        return "\n".join([lines[0], rule, *lines[1:], summary, *self._speed()])

    def _speed(self) -> Iterator[str]:
        """A line for each way in which layers run."""
        ways = Counter((row.runs, row.backend, row.runs_reason) for row in self)
        for (runs, backend, reason), count in ways.items():
            means = _PATHS[runs] + (f", {_BACKENDS[backend]}" if backend in _BACKENDS and runs != "modules" else "")
            yield f"{count} {means}" + (f": {reason}." if reason else ".")
        shared = Counter(
            " + ".join(sorted((row.module.rpartition(".")[2], *row.siblings)))
            for row in self
            if row.siblings and (row.runs == "fused" or row.method == "adapter" and row.runs == "adapter")
        )
        if shared:
            yield f"{sum(shared.values())} share passes over their input: {', '.join(shared)}."

    __repr__ = __str__


def _lambdas(rows: list[ModuleExplanation]) -> str:
    values = [row.lambda_ for row in rows if row.lambda_ is not None]
    if not values:
        return ""
    ends = [f"{min(values):.4g}", f"{max(values):.4g}"]
    return " to ".join(dict.fromkeys(ends)) + (" (learnable)" if rows[0].learnable else "")


def explain(model: nn.Module) -> Explanation:
    """Say what each LoRA layer and each bottleneck adapter of `model` computes, with which lambda, and why.

    A SIBO-LoRA layer computes ``y = W0 x + b + s B A drop((1 - lambda) x + lambda h0)``; which layers mix in h0, from
    where they take it and on which backend they run depends on the model. Nothing is run or changed.

    Args:
        model: a `PeftModel`, or a model with injected adapters, on any device.

    Returns:
        A list with one `ModuleExplanation` for each module and adapter; printed, it is a table in which a star stands
        for the block's number.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
        ValueError: `SIBO_TRITON_BACKEND` is set to a backend that does not exist.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain takes a torch.nn.Module, got {type(model).__name__}.")
    return Explanation(_explanations(model))


def _explanations(model: nn.Module) -> Iterator[ModuleExplanation]:
    modules = dict(model.named_modules())
    for name, layer in lora_layers(model):
        siblings = _siblings_of(name, modules)
        for adapter in adapters_on(layer):
            yield _row(name, layer, adapter, _speed_of(layer, adapter), siblings, "LoRA")
    for name, bottleneck in adapter_layers(model):
        for adapter in bottleneck.sibo_sites:
            speed, options = _speed_of_bottleneck(bottleneck, adapter), bottleneck.sibo_adapter_options[adapter]
            shares = speed[0] == "fused" or (options.in_front and speed[0] == "adapter")
            siblings = _siblings_of(name, modules) if shares else ()
            yield _row(name, bottleneck, adapter, speed, siblings, "adapter")


def _row(
    name: str,
    layer: nn.Module,
    adapter: str,
    speed: tuple[str, str | None, str | None],
    siblings: tuple[str, ...],
    method: str,
) -> ModuleExplanation:
    """The row of one adapter of a layer; `speed` is its `runs`, `backend` and `runs_reason`."""
    site: MixingSite | None = getattr(layer, "sibo_sites", {}).get(adapter)
    lambda_ = sibo_lambdas(layer).get(adapter)
    residual = site.residual if site is not None and lambda_ is not None else None
    runs, backend, runs_reason = speed
    return ModuleExplanation(
        module=name,
        adapter=adapter,
        mixes=lambda_ is not None,
        lambda_=None if lambda_ is None else lambda_.value(),
        learnable=lambda_ is not None and lambda_.learnable,
        initial_residual=None if residual is None else f"{residual.source} of {residual.stack_name}",
        reason="plain LoRA adapter" if site is None else site.reason,
        runs=runs,
        backend=backend,
        runs_reason=runs_reason,
        siblings=siblings,
        method=method,
    )


def _siblings_of(name: str, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """The names, below the same parent, of those with which a layer shares passes."""
    parent, _, child = name.rpartition(".")
    group = next((names for names in siblings_below(modules[parent]) if child in names), ())
    return tuple(other for other in group if other != child)


def _speed_of(layer: LoraLayer, adapter: str) -> tuple[str, str | None, str | None]:
    """`runs`, `backend` and `runs_reason` of a LoRA layer."""
    if not isinstance(layer.lora_variant.get(adapter), SiboLoraVariant):
        return "PEFT", None, obstacle_to_acceleration(layer, adapter) or "sibo_triton.accelerate(model) would fuse it"
    return _with_backend(*path_of(layer, adapter), layer.lora_A[adapter].weight, layer.get_base_layer())


def _speed_of_bottleneck(layer: SiboAdapterLayer, adapter: str) -> tuple[str, str | None, str | None]:
    """`runs`, `backend` and `runs_reason` of a module with a bottleneck adapter."""
    down, _, _ = layer.modules_of(adapter)
    return _with_backend(*layer.path_of(adapter), down.weight, layer.get_base_layer())


def _with_backend(
    path: str, obstacle: str | None, weight: torch.Tensor, frozen: nn.Module
) -> tuple[str, str | None, str | None]:
    """`runs`, `backend` and `runs_reason` of a layer that runs by `path`, for an `obstacle` to a faster one.

    Args:
        weight: one of the adapter's.
        frozen: what it is on.
    """
    dtypes, of_frozen = {weight.dtype}, getattr(frozen, "weight", None)
    if of_frozen is not None and of_frozen.is_floating_point() and of_frozen.dtype.itemsize > 1:  # not a quantised one
        dtypes.add(of_frozen.dtype)
    try:
        choice = backend_for(weight.device, dtypes)
    except RuntimeError as error:  # SIBO_TRITON_BACKEND=triton where the kernels cannot run: so would the forward
        return path, "triton", str(error).rstrip(".")
    if choice.name == "reference":
        return "definition", choice.name, choice.reason
    reasons = [obstacle, None if choice.name == "triton" or path == "modules" else choice.reason]
    return path, choice.name, "; ".join(reason for reason in reasons if reason) or None

"""`explain(model)`: what each LoRA layer computes, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from sibo_triton.lora.layer import LAMBDA_NAME, MixingSite, lora_layers, sibo_adapters


@dataclass(frozen=True)
class ModuleExplanation:
    """One LoRA layer under one adapter.

    Attributes:
        module: its name.
        adapter: the adapter's name.
        mixes: whether its input is mixed with the initial residual.
        lambda_: the share of the initial residual; None for plain LoRA, and where the tensor is sharded or on meta.
        learnable: whether lambda is trained.
        initial_residual: where h0 comes from ("block_input of model.layers"), None for plain LoRA.
        reason: why it mixes or not.
    """

    module: str
    adapter: str
    mixes: bool
    lambda_: float | None
    learnable: bool
    initial_residual: str | None
    reason: str


class Explanation(list[ModuleExplanation]):
    """A list of `ModuleExplanation` that prints as a table, like modules of different blocks in one row."""

    def __str__(self) -> str:
        if not self:
            return "No LoRA layers."
        header = ("module", "n", "adapter", "computes", "lambda", "initial residual", "why")
        groups: dict[tuple, list[ModuleExplanation]] = {}
        for row in self:
            name = row.module.removeprefix("base_model.model.")  # PEFT's
            name = re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1)  # the block's number comes first
            key = (name, row.adapter, row.mixes, row.learnable, row.initial_residual, row.reason)
            groups.setdefault(key, []).append(row)
        table = [header]
        for (name, adapter, mixes, _, residual, reason), rows in groups.items():
            kind = "SIBO-LoRA" if mixes else "LoRA"
            table.append((name, str(len(rows)), adapter, kind, _lambdas(rows), residual or "", reason))
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in table)
        lines = ["  ".join(cells).rstrip() for cells in padded]
        mixing = sum(row.mixes for row in self)
        rule = "  ".join("-" * width for width in widths)
        summary = f"{mixing} of {len(self)} LoRA layers mix in the initial residual."
        return "\n".join([lines[0], rule, *lines[1:], summary])

    __repr__ = __str__


def _lambdas(rows: list[ModuleExplanation]) -> str:
    values = [row.lambda_ for row in rows if row.lambda_ is not None]
    if not values:
        return ""
    ends = [f"{min(values):.4g}", f"{max(values):.4g}"]
    return " to ".join(dict.fromkeys(ends)) + (" (learnable)" if rows[0].learnable else "")


def explain(model: nn.Module) -> Explanation:
    """Say, for each LoRA layer and adapter of `model`, whether it mixes, with which lambda, from where, and why.

    Args:
        model: a `PeftModel`, or a model with injected adapters.

    Returns:
        A list of `ModuleExplanation`; printed, it is a table in which a star stands for the block's number.

    Raises:
        TypeError: `model` is not a `torch.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain takes a torch.nn.Module, got {type(model).__name__}.")
    return Explanation(_explanations(model))


def _explanations(model: nn.Module) -> Iterator[ModuleExplanation]:
    for name, layer in lora_layers(model):
        for adapter in dict.fromkeys([*layer.lora_A, *layer.lora_embedding_A]):
            site: MixingSite | None = getattr(layer, "sibo_sites", {}).get(adapter)
            if adapter not in sibo_adapters(layer):
                reason = site.reason if site is not None else "plain LoRA adapter"
                yield ModuleExplanation(name, adapter, False, None, False, None, reason)
                continue
            assert site is not None and site.residual is not None
            lambda_ = getattr(layer, LAMBDA_NAME)[adapter]
            origin = f"{site.residual.source} of {site.residual.stack_name}"
            yield ModuleExplanation(name, adapter, True, lambda_.value(), lambda_.learnable, origin, site.reason)

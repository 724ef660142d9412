"""Forward and backward of one layer on a GPU, ours compared with every peer: `python -m benchmarks.layer`.

A row is a whole decoder layer of transformers (a model of one layer, on random tokens), the linears that share an
input, or one linear, with random weights in bfloat16; the most important rows come first. For each provider:

* milliseconds of forward, backward and both, percentage over the frozen layer, and for ours the ratio to each peer;
* what autograd keeps for the backward, and the peak of what is allocated, beyond weights and inputs;
* the share of the measured ceilings: of bfloat16 GEMMs for the products of all linears, and of a copy for the minimum
  that an adapter must move in the time that it adds (`settings.least_moved`).

Every provider's outputs and gradients are compared with the definition's before it is timed (`checks.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import checks
from benchmarks.checks import Values, Verdict
from benchmarks.harness import run_benchmark
from benchmarks.models import (
    ARCHITECTURES,
    EMBEDDINGS,
    LLAMA_3_8B,
    Architecture,
    Part,
    frozen_model,
    part_linears,
)
from benchmarks.peers import TIMED
from benchmarks.providers import Provider
from benchmarks.results_file import FLOOR, MIB, parser_of
from benchmarks.settings import ADAPTERS, BF16, DEFAULTS, AdapterSetting, least_moved
from benchmarks.timing import Effort, buffers_beyond_cache
from sibo_triton.saved_activations import saved_activation_bytes

TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class LayerRow:
    """A layer, or the linears of a part of it, on so many tokens.

    Attributes:
        names: of the part's linears; None is the whole layer.
        compiles: whether providers under torch.compile take part.
    """

    architecture: Architecture
    tokens: int
    setting: AdapterSetting
    names: tuple[str, ...] | None = None
    compiles: bool = False
    vocabulary: int = EMBEDDINGS

    @property
    def what(self) -> str:
        return "layer" if self.names is None else "+".join(self.names)

    @property
    def title(self) -> str:
        return f"{self.architecture.name} {self.what}, M={self.tokens}, {self.setting.size}, {self.setting}"

    @property
    def batch(self) -> tuple[int, int]:
        """Sequences, and tokens of each."""
        length = min(self.tokens, 2048)
        return self.tokens // length, length

    def shapes(self) -> dict[str, tuple[int, int]]:
        shapes = self.architecture.shapes()
        return shapes if self.names is None else {name: shapes[name] for name in self.names}

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.architecture.name,
            "part": self.what,
            "tokens": self.tokens,
            "batch": list(self.batch),
            **self.setting.describe(),
            "linears": {name: list(shape) for name, shape in self.shapes().items()},
        }

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The linears with adapters, grouped by the input that they share."""
        groups = self.architecture.linears.groups if self.names is None else (self.names,)
        targets = replace(self.setting, linears=self.architecture.linears).targets
        return [group for group in groups if set(group) & set(targets)]

    def takes(self, provider: Provider) -> bool:
        """Providers of the setting's kind; mixing ones if a linear mixes, compiled ones if the row compiles."""
        mixes = self.names is None or any(name in self.architecture.linears.mixing for name in self.names)
        of_kind = isinstance(self.setting, provider.takes)
        return of_kind and (mixes or not provider.mixes) and (self.compiles or not provider.compiles)

    def open(self, device: str) -> LayerComparison:
        linears = self.architecture.linears if self.names is None else part_linears(self.architecture, self.names)
        row = replace(self, setting=replace(self.setting, linears=linears))
        return (WholeLayer if self.names is None else PartOfLayer)(row, device)


class LayerStep:
    """A provider's model on the row's inputs."""

    phases = ("forward", "backward")

    def __init__(self, name: str, model: nn.Module, inputs: Sequence[tuple[Tensor, ...]], grads: Sequence) -> None:
        self.name, self.model, self.inputs, self.grads = name, model, inputs, grads

    def forward(self, i: int) -> tuple[Tensor, ...]:
        inputs = self.inputs[i % len(self.inputs)]
        if len(inputs) == 1:
            return (self.model(input_ids=inputs[0]).last_hidden_state,)
        return self.model(*inputs)

    def run(self, i: int, mark: Any) -> None:
        outputs = self.forward(i)
        mark()
        torch.autograd.backward(outputs, self.grads[i % len(self.grads)])
        mark()

    def reported(self, milliseconds: list[float]) -> list[float]:
        return milliseconds

    def reset(self) -> None:
        self.model.zero_grad(set_to_none=True)
        for inputs in self.inputs:
            for tensor in inputs:
                tensor.grad = None


class LayerComparison:
    """A row with its weights and inputs; subclasses are for a whole layer and for a part."""

    frozen: nn.Module
    inputs: list[tuple[Tensor, ...]]
    grads: list[tuple[Tensor, ...]]

    def __init__(self, row: LayerRow, device: str) -> None:
        self.row, self.device, self.setting = row, device, row.setting
        torch.manual_seed(0)
        self.make()
        self.weights = checks.SharedWeights(self.frozen, self.setting)

    def make(self) -> None:
        """Make the frozen model, inputs and gradients of outputs."""
        raise NotImplementedError

    def input_gradient(self, step: LayerStep) -> tuple[tuple[Tensor, ...], Callable[[], Tensor | None]]:
        """The outputs, and a function that returns dx after the backward."""
        raise NotImplementedError

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(DTYPE)

    def build(self, provider: Provider) -> LayerStep:
        return LayerStep(provider.name, self.weights.model(provider), self.inputs, self.grads)

    def values(self, step: LayerStep, with_dx: bool = True) -> Values:
        """What a step computes from the first inputs."""
        step.reset()
        outputs, dx = self.input_gradient(step) if with_dx else (step.forward(0), None)
        torch.autograd.backward(outputs, [g.to(y.dtype) for g, y in zip(self.grads[0], outputs, strict=True)])
        results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        if dx is not None:
            results["gradient of the input"] = dx()
        results |= checks.gradients_of(step.model)
        step.reset()
        return results

    def expected(self, provider: Provider) -> Values:
        def values(model: nn.Module) -> Values:
            # tokens, or h0 and x, where the last needs a gradient
            *others, last = (t.detach().float() if t.is_floating_point() else t for t in self.inputs[0])
            inputs = (*others, last.requires_grad_(last.is_floating_point()))
            return self.values(LayerStep("definition", model, [inputs], self.grads))

        return self.weights.expected(provider, values)

    def check(self, provider: Provider, step: LayerStep) -> Verdict:
        expected = self.expected(provider)
        with_dx = not provider.compiles  # its hook would cause a recompilation
        if not with_dx:
            expected = {name: value for name, value in expected.items() if name != "gradient of the input"}
        return self.weights.check(provider, step.model, lambda: self.values(step, with_dx), expected)

    def more(self, provider: Provider, step: LayerStep) -> dict[str, Any]:
        if provider.compiles:
            return {}  # the hooks that count would be compiled too
        return {"saved_MiB": round(saved_activation_bytes(step.model, lambda: step.forward(0)) / MIB, 1)}

    def derived(self, name: str, facts: dict[str, Any], floor: dict[str, Any], ceiling: dict[str, float]) -> None:
        milliseconds, row = facts["ms"]["both"]["p50"], self.row
        adds = name != FLOOR
        M, shapes = row.tokens, row.shapes()
        targets = replace(row.setting, linears=row.architecture.linears)
        flops = sum(4 * M * K * N for K, N in shapes.values())
        if adds:
            flops += sum(6 * M * targets.parameters(*shapes[linear]) for linear in shapes if linear in targets.targets)
        share = flops / milliseconds / 1e9 / ceiling["bf16_gemm_TFLOP_per_s"]
        facts["share_of_bf16_gemm"] = round(share, 4)
        if adds:
            added = milliseconds - floor["ms"]["both"]["p50"]
            mixes = any(provider.mixes for provider in TIMED if provider.name == name)
            least = sum(least_moved(targets, shapes, M, mixes))
            facts["least_bytes_added"] = least
            if added > 0:  # otherwise it cannot be distinguished from the frozen layer
                facts["share_of_copy_of_what_it_adds"] = round(least / added / 1e6 / ceiling["copy_GB_per_s"], 4)


class WholeLayer(LayerComparison):
    """A model of one layer on random tokens with a frozen embedding: its h0 is the layer's input before the norm."""

    def make(self) -> None:
        row, (batch, length) = self.row, self.row.batch
        self.frozen = frozen_model(row.architecture.with_layers(1), self.device, DTYPE, row.vocabulary, head=False)
        count = buffers_beyond_cache(self.device, 2 * 2 * row.tokens * row.architecture.hidden)
        ids = [torch.randint(1, row.vocabulary, (batch, length), device=self.device) for _ in range(count)]
        self.inputs = [(tokens,) for tokens in ids]
        self.grads = [(self.random(batch, length, row.architecture.hidden),) for _ in range(count)]

    def input_gradient(self, step: LayerStep) -> tuple[tuple[Tensor, ...], Callable[[], Tensor | None]]:
        seen: list[Tensor] = []

        def see(module: nn.Module, args: tuple, output: Tensor) -> None:
            output.requires_grad_() if output.is_leaf else output.retain_grad()
            seen.append(output)

        embedding = next(module for module in step.model.modules() if isinstance(module, nn.Embedding))
        hook = embedding.register_forward_hook(see)
        try:
            return step.forward(0), lambda: seen[0].grad
        finally:
            hook.remove()


class PartOfLayer(LayerComparison):
    """Linears that share x, with random x and h0."""

    @cached_property
    def K(self) -> int:
        return next(iter(self.row.shapes().values()))[0]

    def make(self) -> None:
        row, (batch, length) = self.row, self.row.batch
        assert row.names is not None
        self.frozen = Part(row.architecture, row.names, self.device, DTYPE)
        for parameter in self.frozen.parameters():
            parameter.data.normal_(0, 0.02)
        widths = [N for _, N in row.shapes().values()]
        count = buffers_beyond_cache(self.device, 2 * row.tokens * (row.architecture.hidden + self.K + sum(widths)))
        self.inputs = [
            (self.random(batch, length, row.architecture.hidden), self.random(batch, length, self.K).requires_grad_())
            for _ in range(count)
        ]
        self.grads = [tuple(self.random(batch, length, N) for N in widths) for _ in range(count)]

    def input_gradient(self, step: LayerStep) -> tuple[tuple[Tensor, ...], Callable[[], Tensor | None]]:
        return step.forward(0), lambda: step.inputs[0][1].grad


def plan(quick: bool) -> list[LayerRow]:
    """The rows, the most important first."""
    both = (BF16, DEFAULTS)
    # compiling takes as long as several rows
    rows = [LayerRow(LLAMA_3_8B, 8192, setting, compiles=not quick) for setting in both]
    sweep = (2048, 512, 32768) if quick else (2048, 512, 32768, 1024, 4096, 16384)
    rows += [LayerRow(LLAMA_3_8B, M, setting, compiles=not quick) for M in sweep for setting in both]
    rows += _parts(LLAMA_3_8B, LLAMA_3_8B.linears.groups, (8192,), both)
    rows += [LayerRow(LLAMA_3_8B, 8192, setting, compiles=not quick) for setting in ADAPTERS]
    others = ARCHITECTURES[1:]
    rows += [LayerRow(other, 8192, setting) for other in others for setting in both]
    rows += [LayerRow(LLAMA_3_8B, 8192, replace(setting, rank=rank)) for rank in (8, 64) for setting in both]
    if quick:
        return rows
    crossed = (replace(BF16, dropout=0.05), replace(DEFAULTS, dropout=0.0))
    rows += [LayerRow(LLAMA_3_8B, 8192, setting) for setting in crossed]
    rows += _parts(LLAMA_3_8B, [LLAMA_3_8B.linears.feed_forward], (8192,), ADAPTERS)
    rows += [LayerRow(LLAMA_3_8B, M, setting) for M in TOKENS if M != 8192 for setting in ADAPTERS[:2]]
    rows += _parts(LLAMA_3_8B, [(name,) for name in LLAMA_3_8B.shapes()], (8192,), both)
    rows += [LayerRow(other, M, setting) for other in others for M in TOKENS if M != 8192 for setting in both]
    for other in others:
        rows += _parts(other, other.linears.groups, (8192,), both)
    rows += _parts(LLAMA_3_8B, LLAMA_3_8B.linears.groups, [M for M in TOKENS if M != 8192], both)
    return list(dict.fromkeys(rows))


def _parts(
    architecture: Architecture,
    groups: Iterable[tuple[str, ...]],
    tokens: Iterable[int],
    settings: Sequence[AdapterSetting],
) -> list[LayerRow]:
    return [LayerRow(architecture, M, setting, group) for group in groups for M in tokens for setting in settings]


def main() -> int:
    options = parser_of(__doc__ or "").parse_args()
    effort = Effort(rounds=15, seconds=4.0) if options.quick else Effort(rounds=40, seconds=15.0)
    what = "one layer, forward and backward, bfloat16; milliseconds, medians of turns"
    return run_benchmark("layer", what, plan(options.quick), TIMED, options, effort)


if __name__ == "__main__":
    sys.exit(main())

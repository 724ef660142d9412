"""A whole training step on a GPU, ours compared with every peer: `python -m benchmarks.step`.

Forward, loss, backward and AdamW on the adapters, of transformers' causal language models with sdpa attention and
random weights in bfloat16: some layers of Llama-3-8B's width with its vocabulary, with and without gradient
checkpointing, and a whole model of 0.5B on one short sequence, where launches dominate. The frozen model, the floor,
runs forward, loss and backward.

Reported are tokens per second, and the peak memory of a step beyond weights and optimizer states. Before a provider is
timed, its loss and gradients are compared with the definition's: on a short sequence, or, where compiled models are
timed too, on a batch.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import checks
from benchmarks.checks import Values, Verdict
from benchmarks.harness import run_benchmark
from benchmarks.layer import DTYPE
from benchmarks.models import LLAMA_3_8B, QWEN2_5_0_5B, Architecture, frozen_model
from benchmarks.peers import TIMED
from benchmarks.providers import Provider
from benchmarks.results_file import parser_of
from benchmarks.settings import BF16, DEFAULTS, Setting
from benchmarks.timing import Effort

BATCHES = 4  # of random tokens, in turn
CHECKED_TOKENS = 128


@dataclass(frozen=True)
class StepRow:
    """A model, its batch, and its training settings."""

    architecture: Architecture
    batch: tuple[int, int]  # sequences, and tokens of each
    setting: Setting
    checkpointing: bool
    compiles: bool = False

    @property
    def title(self) -> str:
        sequences, length = self.batch
        how = ", checkpointing" if self.checkpointing else ""
        model = f"{self.architecture.name}, {self.architecture.layers} layers"
        return f"{model}, {sequences} x {length} tokens{how}, {self.setting}"

    @property
    def tokens(self) -> int:
        return self.batch[0] * self.batch[1]

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.architecture.name,
            "layers": self.architecture.layers,
            "vocabulary": self.architecture.vocabulary,
            "tokens": self.tokens,
            "batch": list(self.batch),
            "checkpointing": self.checkpointing,
            **self.setting.describe(),
        }

    def takes(self, provider: Provider) -> bool:
        return isinstance(self.setting, provider.takes) and (self.compiles or not provider.compiles)

    def open(self, device: str) -> StepComparison:
        return StepComparison(self, device)


class TrainingStep:
    """One step of a provider's model."""

    phases = ("step",)

    def __init__(self, name: str, model: nn.Module, batches: list[Tensor]) -> None:
        self.name, self.model, self.batches = name, model, batches
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None

    def run(self, i: int, mark: Any) -> None:
        ids = self.batches[i % len(self.batches)]
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        mark()

    def reset(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def reported(self, milliseconds: list[float]) -> list[float]:
        return milliseconds


class StepComparison:
    """A row with its weights and batches."""

    def __init__(self, row: StepRow, device: str) -> None:
        self.row = row
        torch.manual_seed(0)
        frozen = frozen_model(row.architecture, device, DTYPE, row.architecture.vocabulary, head=True)
        self.weights = checks.SharedWeights(frozen, replace(row.setting, linears=row.architecture.linears))
        vocabulary = row.architecture.vocabulary
        self.batches = [torch.randint(1, vocabulary, row.batch, device=device) for _ in range(BATCHES)]
        # compiled models are compiled for one shape, so that only a whole batch checks what is timed
        self.checked = self.batches[0] if row.compiles else self.batches[0][:1, :CHECKED_TOKENS]

    def build(self, provider: Provider) -> TrainingStep:
        model: Any = self.weights.model(provider)
        if self.row.checkpointing:
            with checks.without_known_warnings():
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return TrainingStep(provider.name, model, self.batches)

    def values(self, model: nn.Module) -> Values:
        """The loss of a batch, and its gradients."""
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=self.checked, labels=self.checked, use_cache=False).loss
        loss.backward()
        results = {"loss": loss.detach().reshape(1, 1), **checks.gradients_of(model)}
        model.zero_grad(set_to_none=True)
        return results

    def check(self, provider: Provider, step: TrainingStep) -> Verdict:
        expected = self.weights.expected(provider, self.values)
        return self.weights.check(provider, step.model, lambda: self.values(step.model), expected)

    def more(self, provider: Provider, step: TrainingStep) -> dict[str, Any]:
        return {}

    def derived(self, name: str, facts: dict[str, Any], floor: dict[str, Any], ceiling: dict[str, float]) -> None:
        facts["tokens_per_second"] = round(1e3 * self.row.tokens / facts["ms"]["step"]["p50"], 1)


def plan(quick: bool, layers: int | None = None) -> list[StepRow]:
    """The rows, the most important first."""
    wide = LLAMA_3_8B.with_layers(layers or (4 if quick else 8))
    both = (BF16, DEFAULTS)
    rows = [StepRow(wide, (4, 2048), setting, False, compiles=not quick) for setting in both]
    rows += [StepRow(QWEN2_5_0_5B, (1, 512), setting, False, compiles=not quick) for setting in both]
    return rows + [StepRow(wide, (4, 2048), setting, True) for setting in both]


def main() -> int:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--layers", type=int, help="of Llama-3-8B's width; default: 8, and 4 with --quick")
    options = parser.parse_args()
    effort = Effort(rounds=8, seconds=5.0) if options.quick else Effort(rounds=20, seconds=30.0)
    what = "a training step with AdamW, bfloat16; milliseconds, medians of turns"
    return run_benchmark("step", what, plan(options.quick, options.layers), TIMED, options, effort)


if __name__ == "__main__":
    sys.exit(main())

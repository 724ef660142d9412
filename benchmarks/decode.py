"""Generation on a GPU, ours compared with the frozen model and PEFT's LoRA: `python -m benchmarks.decode`.

`generate` of transformers on layers of Llama-3-8B's width with its vocabulary, greedy, with a cache, adapters unmerged:
milliseconds per token at batch 1 and 32. Each turn generates one token, and then many: the time per token comes from
the difference, which excludes the prompt. Before a provider is timed, its logits with the cache are compared with the
definition's without.
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
from benchmarks.models import LLAMA_3_8B, Architecture, frozen_model
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.results_file import parser_of
from benchmarks.settings import BF16, Setting
from benchmarks.timing import Effort

PROMPT = 64
#: The addmm_ scheme is for training.
TIMED = tuple(provider for provider in PROVIDERS if "addmm" not in provider.name)


@dataclass(frozen=True)
class DecodeRow:
    """A model, and the number of sequences in a batch."""

    architecture: Architecture
    batch: int
    setting: Setting
    new_tokens: int

    @property
    def title(self) -> str:
        adapters = "fp32" if self.setting.fp32_adapters else "bf16"
        return f"{self.architecture.name}, {self.architecture.layers} layers, batch {self.batch}, {adapters} adapters"

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.architecture.name,
            "layers": self.architecture.layers,
            "vocabulary": self.architecture.vocabulary,
            "batch": self.batch,
            "prompt": PROMPT,
            "new_tokens": self.new_tokens,
            "rank": self.setting.rank,
            "adapters": "float32" if self.setting.fp32_adapters else "bfloat16",
            "lambda": self.setting.lambda_,
        }

    def takes(self, provider: Provider) -> bool:
        return provider in TIMED

    def open(self, device: str) -> DecodeComparison:
        return DecodeComparison(self, device)


class Generation:
    """One token, and then many."""

    phases = ("prompt", "token")

    def __init__(self, name: str, model: nn.Module, prompts: list[Tensor], new_tokens: int) -> None:
        self.name, self.model, self.prompts, self.new_tokens = name, model, prompts, new_tokens

    def run(self, i: int, mark: Any) -> None:
        for count in (1, self.new_tokens):
            self.generate(self.prompts[i % len(self.prompts)], count)
            mark()

    def generate(self, ids: Tensor, count: int) -> Tensor:
        model: Any = self.model
        length = {"max_new_tokens": count, "min_new_tokens": count}
        return model.generate(input_ids=ids, do_sample=False, eos_token_id=None, pad_token_id=0, **length)

    def reset(self) -> None:
        pass

    def reported(self, milliseconds: list[float]) -> list[float]:
        prompt, whole = milliseconds
        return [prompt, (whole - prompt) / (self.new_tokens - 1)]


class DecodeComparison:
    """A row with its weights and prompts."""

    def __init__(self, row: DecodeRow, device: str) -> None:
        self.row = row
        torch.manual_seed(0)
        frozen = frozen_model(row.architecture, device, DTYPE, row.architecture.vocabulary, head=True)
        setting = replace(row.setting, linears=row.architecture.linears)
        self.weights = checks.SharedWeights(frozen, setting, evaluates=True)
        vocabulary, shape = row.architecture.vocabulary, (row.batch, PROMPT)
        self.prompts = [torch.randint(1, vocabulary, shape, device=device) for _ in range(2)]

    def build(self, provider: Provider) -> Generation:
        return Generation(provider.name, self.weights.model(provider), self.prompts, self.row.new_tokens)

    def check(self, provider: Provider, step: Generation) -> Verdict:
        ids = self.prompts[0]

        @torch.no_grad()
        def whole(model: nn.Module) -> Values:
            logits = model(input_ids=ids, use_cache=False).logits
            return {"logits of the prompt": logits[:, -2], "logits of the next token": logits[:, -1]}

        with torch.no_grad():
            model: Any = step.model
            prompt = model(input_ids=ids[:, :-1], use_cache=True)
            token = model(input_ids=ids[:, -1:], past_key_values=prompt.past_key_values, use_cache=True)
        logits = {"logits of the prompt": prompt.logits[:, -1], "logits of the next token": token.logits[:, -1]}
        return self.weights.verdict(provider, logits, self.weights.expected(provider, whole))

    def more(self, provider: Provider, step: Generation) -> dict[str, Any]:
        return {}

    def derived(self, name: str, facts: dict[str, Any], floor: dict[str, Any], ceiling: dict[str, float]) -> None:
        facts["tokens_per_second"] = round(1e3 * self.row.batch / facts["ms"]["token"]["p50"], 1)


def plan(quick: bool, layers: int | None = None) -> list[DecodeRow]:
    """The rows, the most important first."""
    architecture = LLAMA_3_8B.with_layers(layers or (8 if quick else LLAMA_3_8B.layers))
    adapters = (BF16, replace(BF16, fp32_adapters=True))
    return [DecodeRow(architecture, batch, setting, 32 if quick else 64) for setting in adapters for batch in (1, 32)]


def main() -> int:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--layers", type=int, help="default: 32, and 8 with --quick")
    options = parser.parse_args()
    effort = Effort(rounds=5, seconds=5.0) if options.quick else Effort(rounds=10, seconds=60.0)
    what = "generate, greedy, bfloat16; milliseconds per token, medians of turns"
    return run_benchmark("decode", what, plan(options.quick, options.layers), TIMED, options, effort)


if __name__ == "__main__":
    sys.exit(main())

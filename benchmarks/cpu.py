"""Training steps on the CPU, ours compared with PEFT's: `python -m benchmarks.cpu`.

Forward + backward of a small Llama, float32, with adapters of rank 16 on all linears, by every provider that needs no
GPU. pytest-benchmark takes the times; because machines drift, the providers take turns, and the result is the median
over the turns of the ratio to PEFT's LoRA in the same turn. Writes `benchmarks/results/cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from benchmarks.providers import PROVIDERS, Provider
from benchmarks.results_file import FLOOR, RESULTS, command_line
from benchmarks.settings import Setting
from sibo_triton.environment import provenance
from sibo_triton.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
TURNS, TOKENS = 9, 512
SETTINGS = (Setting(fp32_adapters=True, dropout=0.0), Setting(fp32_adapters=True, dropout=0.05))
YARDSTICK = "PEFT LoRA"
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


@cache
def model_with(provider: Provider, setting: Setting) -> nn.Module:
    """The small Llama with a provider's adapters; the same weights for all."""
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**SHAPE, attn_implementation="sdpa"))
    model.requires_grad_(False)
    model.enable_input_require_grads()  # the first layer's x needs a gradient, as in all other layers
    torch.manual_seed(1)
    return provider.wrap(model, setting)


def step(model: nn.Module, input_ids: torch.Tensor, grad: torch.Tensor) -> None:
    """Forward and backward, starting without gradients."""
    model.zero_grad(set_to_none=True)
    model(input_ids=input_ids, use_cache=False).last_hidden_state.backward(grad)


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("turn", range(TURNS))
def test_step(benchmark: Any, turn: int, setting: Setting, provider: Provider) -> None:
    reason = provider.unavailable(setting)
    if reason is not None:
        pytest.skip(reason)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(turn)
    input_ids = torch.randint(SHAPE["vocab_size"], (1, TOKENS), generator=generator)
    grad = torch.randn(1, TOKENS, SHAPE["hidden_size"], generator=generator)
    benchmark.extra_info.update(turn=turn, setting=str(setting), provider=provider.name)
    benchmark.pedantic(step, (model_with(provider, setting), input_ids, grad), rounds=3, warmup_rounds=1)


def medians(results: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    """Seconds of each turn, by setting and provider, from pytest-benchmark's file."""
    seconds: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for run in results["benchmarks"]:
        info = run["extra_info"]
        seconds.setdefault((info["setting"], info["provider"]), []).append((info["turn"], run["stats"]["median"]))
    return {key: [median for _, median in sorted(turns)] for key, turns in seconds.items()}


def table(seconds: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    """A row for each setting and provider."""
    rows = []
    for (setting, provider), turns in seconds.items():
        over = [turn / floor - 1 for turn, floor in zip(turns, seconds[setting, FLOOR], strict=True)]
        ratio = [turn / peft for turn, peft in zip(turns, seconds[setting, YARDSTICK], strict=True)]
        rows.append(
            {
                "setting": setting,
                "provider": provider,
                "milliseconds": round(1e3 * statistics.median(turns), 2),
                "percent_over_frozen": round(100 * statistics.median(over), 1),
                "ratio_to_peft_lora": round(statistics.median(ratio), 3),
                "ratio_lowest_and_highest": [round(min(ratio), 3), round(max(ratio), 3)],
            }
        )
    return rows


def markdown_of(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        low, high = row["ratio_lowest_and_highest"]
        ratio = f"{row['ratio_to_peft_lora']:.3f} ({low:.3f}, {high:.3f})"
        over = f"{row['percent_over_frozen']:+.1f} %"
        cells.append((row["setting"], row["provider"], f"{row['milliseconds']:.1f}", over, ratio))
    heads = ("adapters", "model", "ms", "over the frozen model", "ratio to PEFT LoRA (lowest, highest)")
    return markdown_table(heads, cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json", help="default: %(default)s")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        pytest_options = ["-p", "no:cacheprovider", "-q", "--benchmark-quiet", f"--benchmark-json={times}"]
        command = [sys.executable, "-m", "pytest", *pytest_options, str(Path(__file__))]
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode:
            return done.returncode
        rows = table(medians(json.loads(times.read_text(encoding="utf-8"))))
    print(markdown_of(rows))
    head = {
        "command": command_line("cpu"),
        **provenance(with_devices=False),
        "what": f"forward + backward, float32, 1 x {TOKENS} tokens, rank {SETTINGS[0].rank}, one thread, {TURNS} turns",
        "model": SHAPE,
    }
    output.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

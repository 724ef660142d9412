"""What LoRA adds to a Llama-3-8B decoder layer, by count: `python -m benchmarks.traffic`.

One forward and backward of each provider runs on tensors without data (see `benchmarks/counting.py`), so that the
counts are the same on every machine and need no GPU. What is reported of a provider is its model minus the frozen one:

* launches; MiB read and written, each input and output of a launch once; MiB that our kernels load again, tile by tile;
* MiB that autograd keeps for the backward;
* the time that the roofline makes of it on an H200: modelled, not measured. It knows no host time and no latency, and
  takes the bytes of a launch to move wholly under its products: what a frozen GEMM reads more costs nothing there.

A model of one layer and one of two are run; each further layer counts as the second. The table shows a layer of 32, the
results a layer of 1 too: what is kept once per network, as h0 is, makes the difference.

Where the count leans: torch's GEMMs count without re-reads, workspace and split sums, which are not known here, and
every flop as fast as bfloat16's, which PEFT's float32 products are not. Ours count with all of it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaModel

from benchmarks.counting import H200, Counts, count_step, summed, to_fake
from benchmarks.launch_traffic import Traffic
from benchmarks.providers import ALL_LINEARS, APART, MIXING, PROVIDERS, Provider, Setting
from sibo_triton.environment import provenance

COMMAND = "python -m benchmarks.traffic"
RESULTS = Path(__file__).parent / "results/traffic.json"
LAYERS = 32
MIB = 2**20
SETTINGS = (Setting(fp32_adapters=False, dropout=0.0), Setting(fp32_adapters=True, dropout=0.05))

#: Ours, and the peer that it is divided by.
RATIOS = (
    ("ours, lambda = 0", "PEFT LoRA"),
    ("ours, lambda = 0", "addmm_ scheme"),
    ("ours, lambda = 0", "addmm_ scheme, siblings grouped"),
    ("ours, SIBO", "PEFT LoRA + eager mix"),
    ("ours, SIBO", "PEFT LoRA"),
    ("ours, SIBO", "ours, lambda = 0"),
    ("ours, lambda = 0", "ours, lambda = 0, layers apart"),
    ("ours, SIBO", "ours, SIBO, layers apart"),
)


@dataclass(frozen=True)
class Shape:
    """A Llama decoder layer in bfloat16, and its batch."""

    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8
    batch: int = 4
    length: int = 2048

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def linears(self) -> dict[str, tuple[int, int]]:
        """(K, N) of each."""
        kv = self.hidden // self.heads * self.kv_heads
        widths = (self.hidden, kv, kv, self.hidden, self.ffn, self.ffn, self.hidden)
        inputs = (self.hidden,) * 6 + (self.ffn,)
        return dict(zip(ALL_LINEARS, zip(inputs, widths, strict=True), strict=True))


LLAMA_3_8B = Shape()


def frozen_model(shape: Shape, layers: int) -> LlamaModel:
    """On the CPU, not initialised: memory is given to what is written only. Its input asks for a gradient."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=128,  # the embeddings are frozen, and no head is on top
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaModel(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    model.enable_input_require_grads()
    return model


def operations_of(provider: Provider, setting: Setting, shape: Shape, layers: int) -> tuple[list[Traffic], int]:
    """Of one step of the whole model, and the bytes that it keeps for the backward."""
    model: nn.Module = provider.wrap(frozen_model(shape, layers), setting)
    with FakeTensorMode() as mode:
        to_fake(model, mode)
        tokens = torch.zeros(shape.batch, shape.length, dtype=torch.int64)
        return count_step(model, lambda: model(input_ids=tokens).last_hidden_state)


@dataclass(frozen=True)
class Step:
    """A step of models of any depth."""

    one_layer: Counts  # of a model with one layer, with what is once per network
    further_layer: Counts
    kernels: dict[str, dict[str, int]]  # of a model with one layer, by name

    def per_layer(self, layers: int) -> Counts:
        """Of a model with so many layers, divided by them."""
        return (self.one_layer + self.further_layer * (layers - 1)) * (1 / layers)

    def __sub__(self, other: Step) -> Step:
        return Step(self.one_layer - other.one_layer, self.further_layer - other.further_layer, self.kernels)


def step_of(provider: Provider, setting: Setting, shape: Shape) -> Step:
    one, two = (operations_of(provider, setting, shape, layers) for layers in (1, 2))
    return Step(summed(*one), summed(*two) - summed(*one), kernels_of(one[0]))


def minimum(provider: Provider, setting: Setting, shape: Shape) -> tuple[int, int]:
    """Bytes that the adapters of a layer must read and write beyond the frozen linears: every input and output once.

    Each linear by itself, as one operation forward and one backward: A, B and h0 in both; x in the backward, where the
    frozen linear does not read it; dA and dB. What the frozen linear moves anyway (x, y, dY, dX) is merged with it.
    """
    itemsize = 4 if setting.fp32_adapters else 2
    read = written = 0
    for name, (K, N) in shape.linears().items():
        adapter = setting.rank * (K + N) * itemsize
        h0 = 2 * shape.tokens * K if provider.mixes and name in MIXING else 0
        read += 2 * (adapter + h0) + 2 * shape.tokens * K
        written += adapter
    return read, written


def kernels_of(operations: list[Traffic]) -> dict[str, dict[str, int]]:
    """Sums over the launches of each kernel of ours."""
    names = dict.fromkeys(of.name for of in operations if of.grid is not None)
    table = {}
    for name in names:
        own = [of for of in operations if of.name == name]
        sums = {f: sum(getattr(of, f) for of in own) for f in ("read", "written", "reread", "flops")}
        table[name] = {"launches": len(own), **sums}
    return table


def rounded(counts: Counts) -> dict[str, float]:
    """As they are written: a mean over layers has a fraction."""
    return {f.name: round(getattr(counts, f.name), 4) for f in fields(counts)}


def results_of(setting: Setting, shape: Shape, report: Any = lambda line: None) -> dict[str, Any]:
    """Everything about a setting; `report` gets each line of the table once it is there."""
    floor = step_of(PROVIDERS[0], setting, shape)
    report(f"\n{setting}, {shape.tokens} tokens, r = {setting.rank}; added to the frozen layer, of {LAYERS} layers:")
    heads = (
        *("", "launches", "MiB read", "written", "over minimum", "loaded again", "kept", "kept, 1 layer"),
        *("modelled ms", "of frozen"),
    )
    report("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    frozen = floor.per_layer(LAYERS)
    report(_line(PROVIDERS[0].name, floor, None, frozen))
    results: dict[str, Any] = {
        PROVIDERS[0].name: {f"per_layer_of_{n}": rounded(floor.per_layer(n)) for n in (1, LAYERS)}
    }
    for provider in (*PROVIDERS[1:], *APART):
        reason = provider.unavailable(setting)
        if reason is not None:
            results[provider.name] = {"unavailable": reason}
            report(f"| {provider.name} | {reason} |" + " |" * (len(heads) - 2))
            continue
        added = step_of(provider, setting, shape) - floor
        least = minimum(provider, setting, shape)
        results[provider.name] = {
            **{f"added_per_layer_of_{n}": rounded(added.per_layer(n)) for n in (1, LAYERS)},
            "minimum": {"read": least[0], "written": least[1]},
            **({"kernels_of_one_layer": added.kernels} if added.kernels else {}),
        }
        report(_line(provider.name, added, least, frozen))
    results["ratios"] = ratios(results)
    for pair, ratio in results["ratios"].items():
        report(f"{pair}: " + ", ".join(f"{name} {value:.2f}" for name, value in ratio.items()))
    return results


def _line(name: str, step: Step, least: tuple[int, int] | None, frozen: Counts) -> str:
    counts = step.per_layer(LAYERS)
    cells = (
        name,
        f"{counts.launches:.1f}",
        f"{counts.read / MIB:,.0f}",
        f"{counts.written / MIB:,.0f}",
        "" if least is None else f"{counts.moved / sum(least):.2f}",
        f"{counts.reread / MIB:,.0f}",
        f"{counts.saved / MIB:,.0f}",
        f"{step.one_layer.saved / MIB:,.0f}",
        f"{counts.modelled_ms:.2f}",
        "" if least is None else f"{100 * counts.modelled_ms / frozen.modelled_ms:+.1f} %",
    )
    return "| " + " | ".join(cells) + " |"


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What ours adds to a layer of many, over what a peer adds; above 1 ours loses."""
    table = {}
    key = f"added_per_layer_of_{LAYERS}"
    for ours, peer in RATIOS:
        if key in results[ours] and key in results[peer]:
            a, b = results[ours][key], results[peer][key]
            table[f"{ours} / {peer}"] = {
                "launches": round(a["launches"] / b["launches"], 3),
                "moved": round((a["read"] + a["written"]) / (b["read"] + b["written"]), 3),
                "moved, every re-read from memory": round(
                    (a["read"] + a["written"] + a["reread"]) / (b["read"] + b["written"] + b["reread"]), 3
                ),
                "kept": round(a["saved"] / b["saved"], 3),
                "modelled time": round(a["modelled_ms"] / b["modelled_ms"], 3),
            }
    return table


def document(shape: Shape = LLAMA_3_8B, report: Any = lambda line: None) -> dict[str, Any]:
    """The results of all settings, without where they come from."""
    return {
        "what": "counted on tensors without data; times are modelled by a roofline, not measured",
        "modelled_gpu": {**asdict(H200), "flops": "all as fast as bfloat16's"},
        "shape": asdict(shape),
        "settings": {str(setting): results_of(setting, shape, report) for setting in SETTINGS},
    }


def main() -> None:
    """Print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    head = {"command": COMMAND, **{key: value for key, value in provenance().items() if key != "devices"}}
    text = json.dumps(head | document(report=lambda line: print(line, flush=True)), indent=1)
    output.write_text(text + "\n", encoding="utf-8")
    print(f"\nModelled, not measured. Written: {output}")


if __name__ == "__main__":
    main()

"""Counts what adapters add to a decoder layer: `python -m benchmarks.traffic`.

One forward and backward of each provider runs on tensors without data (see `benchmarks/counting.py`), so that the
counts are the same on every machine and need no GPU. Reported is the difference between a provider's model and the
frozen one:

* launches; MiB read and written, each input and output of a launch once; MiB that our kernels' tiles load repeatedly;
* MiB that autograd keeps for the backward;
* the roofline's time on an H200: modelled, not measured. The model has no host time and no latency, and assumes that
  moving a launch's bytes overlaps fully with its products: additional reads of a frozen GEMM are free.

Models of one and of two layers are run; each further layer counts as the second. The table shows a layer of 32, the
results also a layer of 1: they differ by what is kept once per network, such as h0.

LoRA and bottleneck adapters are counted on Llama-3-8B's layer, and LoRA's ratios to its peers on those of other models.
For peers under `torch.compile` only the kept bytes are counted (see `benchmarks/compiled_kept.py`).

The counts favour torch: its GEMMs count without re-reads, workspace and split sums, which are unknown here, and all
flops as fast as bfloat16's, which PEFT's float32 products are not. Ours count with all of these.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.bottleneck_providers import BOTTLENECK_PROVIDERS, EagerAdapter, EagerMixedAdapter
from benchmarks.compiled_kept import added_kept_bytes
from benchmarks.counting import H200, Counts
from benchmarks.model_counts import StepCounts, Workload, floor_of, step_of
from benchmarks.models import ARCHITECTURES, Architecture
from benchmarks.providers import APART, PROVIDERS, Peft, PeftMixed, Provider
from benchmarks.results_file import ADDED_PER_LAYER, FLOOR, LAYERS, MIB, RESULTS
from benchmarks.settings import ADAPTERS, BF16, DEFAULTS, AdapterSetting, least_moved
from sibo_triton.environment import provenance
from sibo_triton.markdown import markdown_row, markdown_table

COMMAND = "python -m benchmarks.traffic"
OUTPUT = RESULTS / "traffic.json"


@dataclass(frozen=True)
class CountedAdapters:
    """What is counted for one kind of adapters.

    Attributes:
        settings: one table for each.
        providers: in the order of the tables, without the frozen model.
        ratios: pairs of ours and the peer by which it is divided.
    """

    settings: tuple[AdapterSetting, ...]
    providers: tuple[Provider, ...]
    ratios: tuple[tuple[str, str], ...]


OF_SIBLINGS = (
    ("ours, lambda = 0", "ours, lambda = 0, layers apart"),
    ("ours, SIBO", "ours, SIBO, layers apart"),
)
OF_PEERS = (
    ("ours, lambda = 0", "PEFT LoRA"),
    ("ours, lambda = 0", "addmm_ scheme"),
    ("ours, lambda = 0", "addmm_ scheme, siblings grouped"),
    ("ours, SIBO", "PEFT LoRA + eager mix"),
    ("ours, SIBO", "PEFT LoRA"),
    ("ours, SIBO", "ours, lambda = 0"),
)
SETTINGS = (BF16, DEFAULTS)
LORA = CountedAdapters(SETTINGS, (*PROVIDERS[1:], *APART), OF_PEERS + OF_SIBLINGS)
LORA_OF_OTHERS = CountedAdapters(SETTINGS, PROVIDERS[1:], OF_PEERS)
BOTTLENECK = CountedAdapters(
    ADAPTERS,
    BOTTLENECK_PROVIDERS,
    (
        ("ours, adapter, lambda = 0", "eager adapter"),
        ("ours, SIBO adapter", "eager adapter + eager mix"),
        ("ours, SIBO adapter", "eager adapter"),
        ("ours, SIBO adapter", "ours, adapter, lambda = 0"),
    ),
)
#: Peers under `torch.compile`, for which only the kept bytes are counted.
COMPILED: dict[AdapterSetting, tuple[Provider, ...]] = {
    **{setting: (Peft(), PeftMixed()) for setting in SETTINGS},
    **{setting: (EagerAdapter(), EagerMixedAdapter()) for setting in BOTTLENECK.settings[:2]},
}


def rounded(counts: Counts) -> dict[str, float]:
    """Rounded for the file: a mean over layers has a fraction."""
    return {f.name: round(getattr(counts, f.name), 4) for f in fields(counts)}


def results_of(
    adapters: CountedAdapters, setting: AdapterSetting, work: Workload, report: Any = lambda line: None
) -> dict[str, Any]:
    """All results of a setting; `report` gets each line of the table as soon as it is available."""
    setting, floor = replace(setting, linears=work.architecture.linears), floor_of(work)
    report(f"\n{setting}, {work.tokens} tokens, {setting.size}; added to the frozen layer, of {LAYERS} layers:")
    heads = (
        *("", "launches", "MiB read", "written", "over minimum", "loaded again", "kept", "kept, 1 layer"),
        *("modelled ms", "of frozen"),
    )
    report(markdown_table(heads, ()))
    frozen = floor.per_layer(LAYERS)
    report(markdown_row(_cells(FLOOR, floor, None, frozen)))
    results: dict[str, Any] = {FLOOR: {f"per_layer_of_{n}": rounded(floor.per_layer(n)) for n in (1, LAYERS)}}
    for provider in adapters.providers:
        reason = provider.unavailable(setting)
        if reason is not None:
            results[provider.name] = {"unavailable": reason}
            report(markdown_row((provider.name, reason, *[""] * (len(heads) - 2))))
            continue
        added = step_of(provider, setting, work) - floor
        least = least_moved(setting, work.architecture.shapes(), work.tokens, provider.mixes)
        results[provider.name] = {
            **{f"added_per_layer_of_{n}": rounded(added.per_layer(n)) for n in (1, LAYERS)},
            "minimum": {"read": least[0], "written": least[1]},
            **({"kernels_of_one_layer": added.kernels} if added.kernels else {}),
        }
        report(markdown_row(_cells(provider.name, added, least, frozen)))
    results["ratios"] = ratios(adapters.ratios, results)
    for pair, ratio in results["ratios"].items():
        report(f"{pair}: " + ", ".join(f"{name} {value:.2f}" for name, value in ratio.items()))
    return results


def _cells(name: str, step: StepCounts, least: tuple[int, int] | None, frozen: Counts) -> tuple[str, ...]:
    counts = step.per_layer(LAYERS)
    return (
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


def ratios(pairs: Sequence[tuple[str, str]], results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What ours adds to a layer of many, divided by what a peer adds; above 1 ours is worse."""
    table = {}
    for ours, peer in pairs:
        if ADDED_PER_LAYER in results[ours] and ADDED_PER_LAYER in results[peer]:
            a, b = results[ours][ADDED_PER_LAYER], results[peer][ADDED_PER_LAYER]
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


def ratios_of_others(
    report: Any = lambda line: None, others: Sequence[Architecture] = ARCHITECTURES[1:]
) -> dict[str, Any]:
    """LoRA's ratios for the layers of other models, by model, setting and pair."""
    table: dict[str, Any] = {}
    report(f"\nOther models, LoRA, ratios of what is added to the frozen layer, of {LAYERS} layers:")
    heads = ("model", "adapters", "", "launches", "moved", "kept")
    report(markdown_table(heads, ()))
    for architecture in others:
        table[architecture.name] = {}
        for setting in LORA_OF_OTHERS.settings:
            pairs = results_of(LORA_OF_OTHERS, setting, Workload(architecture))["ratios"]
            table[architecture.name][str(setting)] = pairs
            for pair, ratio in pairs.items():
                report(markdown_row((architecture.name, setting, pair, *(f"{ratio[name]:.2f}" for name in heads[3:]))))
    return table


def document(report: Any = lambda line: None) -> dict[str, Any]:
    """The results of Llama-3-8B for all settings, without provenance."""
    work = Workload()

    def settings(adapters: CountedAdapters) -> dict[str, Any]:
        return {str(setting): results_of(adapters, setting, work, report) for setting in adapters.settings}

    return {
        "what": "counted on tensors without data; times are modelled by a roofline, not measured",
        "modelled_gpu": {**asdict(H200), "flops": "all as fast as bfloat16's"},
        "model": work.architecture.name,
        "batch": [work.batch, work.length],
        "settings": settings(LORA),
        "bottleneck_adapters": settings(BOTTLENECK),
    }


def kept_when_compiled(report: Any = lambda line: None) -> dict[str, dict[str, int]]:
    """Bytes that the peers' adapters keep in a Llama-3-8B layer under `torch.compile`, by setting and provider."""
    table: dict[str, dict[str, int]] = {}
    report("\nKept under torch.compile, added to the compiled frozen layer, MiB:")
    for setting, providers in COMPILED.items():
        table[str(setting)] = {provider.name: added_kept_bytes(provider, setting, Workload()) for provider in providers}
        report(f"{setting}: " + ", ".join(f"{name} {kept / MIB:,.0f}" for name, kept in table[str(setting)].items()))
    return table


def main() -> None:
    """Print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    head = {"command": COMMAND, **provenance(with_devices=False)}

    def report(line: str) -> None:
        print(line, flush=True)

    others = {"other_models": ratios_of_others(report)}
    content = head | document(report) | others | {"kept_when_compiled": kept_when_compiled(report)}
    text = json.dumps(content, indent=1)
    output.write_text(text + "\n", encoding="utf-8")
    print(f"\nModelled, not measured. Written: {output}")


if __name__ == "__main__":
    main()

"""Write the tables of the README from the files of results that it names: `python -m benchmarks.readme_table`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sibo_triton.finetune.demo_report import demo_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
MIB = 2**20


def traffic_table(results: dict[str, Any]) -> str:
    """What each provider adds to one of 32 decoder layers: launches, bytes moved and bytes kept."""
    lines = ["| adapters | | launches | MiB moved | MiB kept |", "|---|---|---|---|---|"]
    for setting, providers in results["settings"].items():
        for provider, counts in providers.items():
            added = counts.get("added_per_layer_of_32")
            if added is None or "apart" in provider:  # the frozen model, what cannot do the setting, what was before
                continue
            moved, kept = (added["read"] + added["written"]) / MIB, added["saved"] / MIB
            lines.append(f"| {setting} | {provider} | {added['launches']:.0f} | {moved:,.0f} | {kept:,.0f} |")
    return "\n".join(lines)


#: What the table of a GPU shows: how much longer than the frozen layer.
SHOWN = ("PEFT LoRA", "addmm_ scheme, siblings grouped", "ours, lambda = 0", "PEFT LoRA + eager mix", "ours, SIBO")
NOT_MEASURED = "Speed on a GPU: not measured yet."


def layer_table(results: dict[str, Any]) -> str:
    """Time over the frozen layer of each whole layer at rank 16 and 8,192 tokens, forward and backward."""
    rows = [row for row in results["rows"] if (row["part"], row["rank"], row["tokens"]) == ("layer", 16, 8192)]
    lines = [f"| layer | adapters | {' | '.join(SHOWN)} |", "|---|---|" + "---|" * len(SHOWN)]
    for row in rows:
        cells = [_over_frozen(row["providers"].get(name, {})) for name in SHOWN]
        adapters = f"{row['adapters']}, dropout {row['dropout']:g}"
        lines.append(f"| {row['model']} | {adapters} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _over_frozen(facts: dict[str, Any]) -> str:
    if "percent_over_frozen" in facts:
        return f"{facts['percent_over_frozen']['both']['p50']:+.1f} %"
    for why in ("wrong", "error", "unavailable"):
        if why in facts:
            return facts[why].partition(":")[0] if why == "unavailable" else why
    return "not run"


def gpu_tables(results: Path) -> str:
    """A table for each GPU whose layers were timed, or that there is none."""
    parts = []
    for file in sorted(results.glob("layer-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if any(row["part"] == "layer" and row["tokens"] == 8192 for row in content["rows"]):
            link = f"[benchmarks/results/{file.name}](benchmarks/results/{file.name})"
            head = f"Time over the frozen layer, measured on {content['gpu']}, 8,192 tokens, r = 16 ({link}):"
            parts.append(f"{head}\n\n{layer_table(content)}")
    return "\n\n".join(parts) or NOT_MEASURED


TABLES = {"demo": ("demo-cpu.json", demo_table), "traffic": ("traffic.json", traffic_table)}


def with_tables(text: str) -> str:
    """The README's text with the tables between their markers made anew."""
    for name, (file, table) in TABLES.items():
        text = _between_markers(text, name, table(json.loads((RESULTS / file).read_text(encoding="utf-8"))))
    return _between_markers(text, "gpu", gpu_tables(RESULTS))


def _between_markers(text: str, name: str, made: str) -> str:
    start, end = f"<!-- {name}-results -->", f"<!-- /{name}-results -->"
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{made}\n{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")

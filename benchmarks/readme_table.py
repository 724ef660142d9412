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
            if added is None:  # the frozen model, or what cannot do the setting
                continue
            moved, kept = (added["read"] + added["written"]) / MIB, added["saved"] / MIB
            lines.append(f"| {setting} | {provider} | {added['launches']:.0f} | {moved:,.0f} | {kept:,.0f} |")
    return "\n".join(lines)


TABLES = {"demo": ("demo-cpu.json", demo_table), "traffic": ("traffic.json", traffic_table)}


def with_tables(text: str) -> str:
    """The README's text with the tables between their markers made anew."""
    for name, (file, table) in TABLES.items():
        start, end = f"<!-- {name}-results -->", f"<!-- /{name}-results -->"
        before, _, rest = text.partition(start)
        made = table(json.loads((RESULTS / file).read_text(encoding="utf-8")))
        text = f"{before}{start}\n{made}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")

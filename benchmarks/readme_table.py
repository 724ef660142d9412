"""Write the table of the README from the file of results that it names: `python benchmarks/readme_table.py`."""

from __future__ import annotations

import json
from pathlib import Path

from sibo_triton.finetune.demo_report import demo_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo-cpu.json"
README = ROOT / "README.md"
START, END = "<!-- demo-results -->", "<!-- /demo-results -->"


def with_table(text: str) -> str:
    """The README's text with the table between its markers made anew."""
    table = demo_table(json.loads(RESULTS.read_text(encoding="utf-8")))
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")

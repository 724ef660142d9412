"""What the README shows is what happens."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import torch
from tiny_models import llama

from sibo_triton import explain

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_one_line_change_works_as_pasted() -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    lines = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    names = {"model": llama()}
    exec("\n".join(lines), names)
    assert type(names["config"]).__name__ == "SiboLoraConfig"
    assert sum(row.mixes for row in explain(names["model"])) == 15
    names["model"](input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    # and what it replaces was a working script
    before = [line[1:] for line in diff.splitlines() if not line.startswith("+")]
    exec("\n".join(before), {"model": llama()})


def test_the_bottleneck_adapter_works_as_pasted() -> None:
    (block,) = re.findall(r"```python\n([^`]*SiboAdapterConfig[^`]*)```", README)
    names = {"model": llama()}
    exec(block, names)
    rows = explain(names["model"])
    assert len(rows) == 6 and all(row.mixes and row.method == "adapter" for row in rows)
    (table,) = re.findall(r"(?m)^\| `bottleneck_size`.*?\n\n", README, re.DOTALL)
    named = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines() if line)))
    assert named <= vars(names["config"]).keys() and len(named) == 9


def test_the_tables_come_from_the_files_that_are_named() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.with_tables(README) == README, "run: python -m benchmarks.readme_table"
    assert "| SIBO-LoRA |" in README and "| ours, SIBO |" in README
    documents = [document.read_text(encoding="utf-8") for document in script.DOCUMENTS]
    for name, (file, _) in script.TABLES.items():
        path = script.RESULTS / file
        with_table = [text for text in documents if f"<!-- {name}-results -->" in text]
        assert with_table and all(str(path.relative_to(ROOT)) in text for text in with_table)
        results = json.loads(path.read_text(encoding="utf-8"))
        results = results.get("provenance", results)
        assert {"command", "torch", "transformers", "peft", "commit", "machine"} <= results.keys()
        assert results["command"].startswith(("python -m benchmarks.", "sibo-triton "))


def test_the_table_of_explain_is_what_explain_prints() -> None:
    (shown,) = re.findall(r"(?m)^    module .*?(?=\n\n)", README, re.DOTALL)
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from sibo_triton import SiboLoraConfig

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), SiboLoraConfig(target_modules="all-linear"))
    assert str(explain(model)).splitlines() == [line[4:] for line in shown.splitlines()]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"(?m)^#+ (.*)", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
    assert len(documents) > 8
    for document in documents:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", document.read_text(encoding="utf-8")):
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name}: {target}"
            if anchor:
                assert anchor in anchors(path.read_text(encoding="utf-8")), f"{document.name}: {target}#{anchor}"

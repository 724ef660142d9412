"""The demonstration's output: a table in the terminal, and report.md with plots in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sibo_triton.finetune.plots import NO_PLOTS, Curve, can_plot, plot
from sibo_triton.finetune.report import LOSS_PLOT, REPORT, SIMILARITY_PLOT, format_bytes, versions
from sibo_triton.finetune.result import FinetuneResult
from sibo_triton.markdown import markdown_table

METHOD_NAMES = {
    "base": "base",
    "lora": "LoRA",
    "sibo-lora": "SIBO-LoRA",
    "adapter": "adapter",
    "sibo-adapter": "SIBO adapter",
}

_HEADER = (
    "model",
    "trainable parameters",
    "loss",
    "exact match",
    "seconds per step",
    "saved for backward",
    "last-layer similarity",
)


def print_outcome(
    console: Console, output: Path, results: Mapping[str, Any], answers: Sequence[Mapping[str, str]]
) -> None:
    """Print the table, a few answers, and where the files are."""
    console.print()
    console.print(_rich_table("Unseen subtractions", _HEADER, _rows(results)))
    console.print(_rich_table("Answers of the reloaded adapters", *_examples(results, answers)))
    for line in _reading(results):
        console.print(f"- {line}", highlight=False)
    console.print(f"\nEverything is in {output}/; start with {output / REPORT}", highlight=False)


def write_demo_report(
    output: Path, results: Mapping[str, Any], runs: Mapping[str, FinetuneResult], answers: Sequence[Mapping[str, str]]
) -> None:
    """Write report.md and, with matplotlib, its plots."""
    plots = NO_PLOTS
    if can_plot():
        _plots(output, results, runs)
        plots = f"![Loss]({LOSS_PLOT})\n\n![Token similarity by layer]({SIMILARITY_PLOT})"
    scale = results["scale"]
    method = next(iter(runs.values())).options
    where = (
        f"rank {scale['rank']} on every linear layer"
        if method.is_lora
        else f"bottleneck {scale['bottleneck']} in front of the feed-forward networks' gate and up projections"
    )
    problems = (
        "\n".join(f"- **{problem}**" for problem in results["problems"])
        or f"All passed: the base model adds and does not subtract, {METHOD_NAMES[method.method]} learned to, and "
        "reloading changed no answer."
    )
    header, rows = _examples(results, answers)
    reading = "\n".join(f"- {line}" for line in _reading(results))
    text = f"""# Demonstration: from adding to subtracting

A decoder with {scale["layers"]} layers and {results["base_parameters"]:,} parameters was trained to add for
{scale["base_steps"]} steps and answers {results["base_own_accuracy"]:.1%} of {results["test_problems"]} unseen
additions. Frozen, it was fine-tuned on subtraction with each method: {scale["adapter_steps"]} steps, batch
{scale["batch"]}, {where}, rate {method.learning_rate:g}, seed {results["seed"]}.

{demo_table(results)}

{reading}

## Checks

{problems}

## Answers of the reloaded adapters

{markdown_table(header, rows)}

## Plots

{plots}

{_similarity_table(results)}

## Run

{results["seconds"]["wall"]:.0f} s ({results["seconds"]["cpu"]:.0f} s of CPU time), {results["threads"]} torch thread;
{versions()}. Numbers: results.json. Each method's own report: {", ".join(f"[{m}]({m}/{REPORT})" for m in runs)}.
"""
    (output / REPORT).write_text(text, encoding="utf-8")


def demo_table(results: Mapping[str, Any]) -> str:
    """The demonstration's outcome, from the content of results.json, as a Markdown table."""
    return markdown_table(_HEADER, _rows(results))


def _rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            METHOD_NAMES[name],
            f"{results['trainable_parameters'][name]:,}",
            f"{results['loss'][name]:.4f}",
            f"{accuracy:.1%}",
            f"{results['seconds_per_step'][name]:.3f}",
            format_bytes(results["saved_activation_bytes"][name]),
            f"{results['similarity_by_layer'][name][-1]:.3f}",
        )
        for name, accuracy in results["accuracy"].items()
    ]


def _examples(
    results: Mapping[str, Any], answers: Sequence[Mapping[str, str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table of a few answers: its header and its rows."""
    names = list(results["accuracy"])
    rows = [(row["problem"], row["right"], *(row[name] for name in names)) for row in answers]
    return ("problem", "right", *(METHOD_NAMES[name] for name in names)), rows


def _reading(results: Mapping[str, Any]) -> list[str]:
    """Caveats for readers of the table."""
    count = results["test_problems"]
    return [
        f"Loss and exact match are on {count} subtractions that no adapter was trained on, with the adapters reloaded "
        "from their folders for exact match.",
        f"One seed: a difference of a few problems in {count} between the methods is chance.",
        "Seconds per step are medians with the models taking turns. The base model's time and bytes are those of a "
        "forward and backward pass through it frozen: what an adapter adds to.",
    ]


def _rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)  # 80 columns are enough
    for index, name in enumerate(header):
        widest = max(map(len, name.split()))  # rich would cut words to make room
        table.add_column(name, justify="left" if index == 0 else "right", min_width=widest)
    for row in rows:
        table.add_row(*row)
    return table


def _similarity_table(results: Mapping[str, Any]) -> str:
    by_layer = results["similarity_by_layer"]
    rows = [
        ("input" if layer == 0 else layer, *(f"{value:.3f}" for value in values))
        for layer, values in enumerate(zip(*by_layer.values(), strict=True))
    ]
    return "Token similarity:\n\n" + markdown_table(("layer", *(METHOD_NAMES[name] for name in by_layer)), rows)


def _plots(output: Path, results: Mapping[str, Any], runs: Mapping[str, FinetuneResult]) -> None:
    losses = []
    for method, run in runs.items():
        steps, values = zip(*run.losses("eval_loss"), strict=True)
        losses.append(Curve(METHOD_NAMES[method], steps, values, marked=True))
    plot(output / LOSS_PLOT, losses, "step", "loss on unseen subtractions")
    curves = [
        Curve(METHOD_NAMES[name], range(len(values)), values, marked=True)
        for name, values in results["similarity_by_layer"].items()
    ]
    plot(output / SIMILARITY_PLOT, curves, "layer (0: what enters the first block)", "token similarity")

"""Draws the results: `python -m benchmarks.plots`, from the files in `benchmarks/results/` only.

* `traffic.png`: launches, bytes moved and bytes kept that LoRA adds to a layer, counted;
* `layer-*.png`, `step-*.png`, `decode-*.png`, for each GPU with results: time over the frozen model, measured.

Without results there is no plot; without matplotlib there are none, and a message says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results_file import ADDED_PER_LAYER, FLOOR, MIB, RESULTS, is_ours
from sibo_triton.finetune.plots import NO_PLOTS, can_plot

PLOTS = Path(__file__).resolve().parent / "plots"

#: Colours and line markers, the same in every plot: ours in two strong colours, peers in muted ones.
STYLES = {
    "ours, SIBO": ("#c2410c", "o"),
    "ours, lambda = 0": ("#1d4ed8", "o"),
    "PEFT LoRA": ("#4b5563", "s"),
    "PEFT LoRA, compiled": ("#4b5563", "x"),
    "PEFT LoRA + eager mix": ("#b8860b", "s"),
    "PEFT LoRA + eager mix, compiled": ("#b8860b", "x"),
    "addmm_ scheme": ("#8fbfa8", "^"),
    "addmm_ scheme, siblings grouped": ("#4f8a6b", "v"),
    "LoRAFusion": ("#8b6bb1", "D"),
    "Unsloth": ("#c77d9b", "P"),
}
OTHER = ("#9ca3af", ".")
LABELS = {
    "addmm_ scheme, siblings grouped": "addmm_, grouped",
    "addmm_ scheme": "addmm_",
    "PEFT LoRA + eager mix": "PEFT + eager mix",
    "PEFT LoRA + eager mix, compiled": "PEFT + eager mix, compiled",
    "ours, lambda = 0": "ours, lambda = 0",
}
#: First those that compute plain LoRA, then those that mix.
ORDER = (
    "PEFT LoRA",
    "PEFT LoRA, compiled",
    "addmm_ scheme",
    "addmm_ scheme, siblings grouped",
    "LoRAFusion",
    "Unsloth",
    "ours, lambda = 0",
    "PEFT LoRA + eager mix",
    "PEFT LoRA + eager mix, compiled",
    "ours, SIBO",
)


def label(provider: str) -> str:
    return LABELS.get(provider, provider)


def ordered(providers: Sequence[str]) -> list[str]:
    """In the order of every plot and legend; unknown ones last."""
    return sorted(providers, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def figure_of(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure as wide as a README shows it, and its axes as an array of `rows` and `columns`."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(8.6, height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8, length=2)
    return figure, axes


def bars(axes: Any, names: Sequence[str], values: Sequence[float], form: str, longest: float) -> None:
    """Horizontal bars with their numbers, the first on top; `longest` sets the scale."""
    places = range(len(names))
    axes.barh(places, values, color=[STYLES.get(name, OTHER)[0] for name in names], height=0.72)
    for place, value in zip(places, values, strict=True):
        axes.text(max(0.0, value) + 0.02 * longest, place, form.format(value), va="center", fontsize=8)
    axes.set_yticks(places, [label(name) for name in names])
    axes.set_xlim(min(0.0, *values), 1.22 * longest)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def traffic_plot(results: dict[str, Any]) -> Any:
    """What each provider adds to one of 32 decoder layers: a row for each setting."""
    settings = results["settings"]
    counts = {
        setting: {name: facts[ADDED_PER_LAYER] for name, facts in providers.items()
                  if ADDED_PER_LAYER in facts}
        for setting, providers in settings.items()
    }  # fmt: skip
    measures = (
        ("MiB moved", lambda added: (added["read"] + added["written"]) / MIB),
        ("MiB kept for the backward", lambda added: added["saved"] / MIB),
        ("launches", lambda added: added["launches"]),
    )
    heights = [len(of_setting) for of_setting in counts.values()]
    figure, axes = figure_of(len(counts), 3, 0.9 + 0.27 * sum(heights), height_ratios=heights, sharey="row")
    for row, (setting, of_setting) in enumerate(counts.items()):
        names = ordered(list(of_setting))
        for column, (what, measure) in enumerate(measures):
            longest = max(measure(added) for providers in counts.values() for added in providers.values())
            bars(axes[row][column], names, [measure(of_setting[name]) for name in names], "{:,.0f}", longest)
            if row == 0:
                axes[row][column].set_title(what, fontsize=10)
        axes[row][0].set_ylabel(setting.replace(", ", "\n"), fontsize=9)
    tokens, model = math.prod(results["batch"]), results["model"]
    figure.suptitle(
        f"What LoRA (r = 16, all linears) adds to a {model} layer, {tokens:,} tokens, forward + backward. Counted.",
        fontsize=10,
    )
    return figure


def where(results: dict[str, Any]) -> str:
    """The device and versions of the measurement."""
    return f"{results.get('gpu', results['device'])}, torch {results['torch']}, commit {results['commit']}"


def _percent(facts: dict[str, Any], phase: str) -> dict[str, float] | None:
    return facts.get("percent_over_frozen", {}).get(phase)


def layer_plot(results: dict[str, Any], model: str) -> Any | None:
    """Percent over the frozen layer by the number of tokens, a panel for each setting; None if there is one point."""
    rows = [row for row in results["rows"] if (row["model"], row["part"], row.get("rank")) == (model, "layer", 16)]
    panels: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["adapters"], row["dropout"]), []).append(row)
    panels = {key: sorted(rows, key=lambda row: row["tokens"]) for key, rows in panels.items() if len(rows) > 1}
    if not panels:
        return None
    figure, axes = figure_of(1, len(panels), 3.9)
    shown: dict[str, Any] = {}
    for each, ((adapters, dropout), of_panel) in zip(axes[0], panels.items(), strict=True):
        names = ordered(list(dict.fromkeys(name for row in of_panel for name in row["providers"] if name != FLOOR)))
        for name in names:
            percents = [(row["tokens"], _percent(row["providers"].get(name, {}), "both")) for row in of_panel]
            points = [(tokens, percent) for tokens, percent in percents if percent is not None]
            if not points:
                continue
            x = [tokens for tokens, _ in points]
            strong, (colour, marker) = is_ours(name), STYLES.get(name, OTHER)
            (line,) = each.plot(
                x, [p["p50"] for _, p in points], color=colour, linestyle="--" if "compiled" in name else "-",
                label=label(name), marker=marker, markersize=5, linewidth=2.2 if strong else 1.2,
                zorder=3 if strong else 2,
            )  # fmt: skip
            if strong:  # only for ours: the spreads of all would hide the lines
                each.fill_between(
                    x, [p["p20"] for _, p in points], [p["p80"] for _, p in points], color=colour, alpha=0.12, lw=0
                )
            shown.setdefault(label(name), line)
        each.axhline(0, color="black", linewidth=0.8)
        each.set_xscale("log", base=2)
        ticks = sorted({row["tokens"] for row in of_panel})
        each.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        each.minorticks_off()
        each.grid(axis="y", alpha=0.25)
        each.set_title(f"{adapters} adapters, dropout {dropout:g}", fontsize=10)
        each.set_xlabel("tokens", fontsize=9)
    axes[0][0].set_ylabel("time over the frozen layer, %", fontsize=9)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(f"One {model} layer, forward + backward, r = 16. {where(results)}", fontsize=10)
    return figure


def rows_plot(results: dict[str, Any], phase: str, measure: str, title: str) -> Any | None:
    """Bars of each row's percentage over the frozen model, whose own number is in the row's title."""
    rows = [row for row in results["rows"] if any(_percent(facts, phase) for facts in row["providers"].values())]
    if not rows:
        return None
    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    tallest = max(sum(_percent(facts, phase) is not None for facts in row["providers"].values()) for row in rows)
    figure, axes = figure_of(lines, columns, 0.6 + lines * (0.7 + 0.22 * tallest))
    for each, row in zip(axes.flat, rows, strict=False):
        percents = {name: _percent(facts, phase) for name, facts in row["providers"].items()}
        names = ordered([name for name, percent in percents.items() if percent is not None])
        values = [percents[name]["p50"] for name in names]
        bars(each, names, values, "{:+.1f} %", max(1.0, *values))
        floor = row["providers"][FLOOR]
        amount = floor["ms"][phase]["p50"] if measure == "ms" else floor[measure]
        unit = "ms" if measure == "ms" else "tokens/s"
        each.set_ylim(tallest - 0.5, -0.5)  # bars equally thick in all panels
        amount_text = f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"
        wrapped = "\n".join(textwrap.wrap(row["title"], 50))
        each.set_title(f"{wrapped}\nfrozen: {amount_text} {unit}", fontsize=8)
    for each in axes.flat[len(rows) :]:
        each.remove()
    figure.suptitle(f"{title}, time over the frozen model. {where(results)}", fontsize=10)
    return figure


def figures_of(file: Path) -> dict[str, Any]:
    """The plots of a file of results, by file name."""
    results, name = json.loads(file.read_text(encoding="utf-8")), file.stem
    if name == "traffic":
        return {name: traffic_plot(results)}
    kind, _, device = name.partition("-")
    if kind == "layer":
        models = dict.fromkeys(row["model"] for row in results["rows"])
        drawn = {f"layer-{model.lower()}-{device}": layer_plot(results, model) for model in models}
    elif kind == "step":
        drawn = {name: rows_plot(results, "step", "tokens_per_second", "A training step")}
    elif kind == "decode":
        drawn = {name: rows_plot(results, "token", "ms", "A generated token")}
    else:
        drawn = {}
    return {file_name: figure for file_name, figure in drawn.items() if figure is not None}


def digest(file: Path) -> str:
    """The digest of a file of results, which its plots contain, so that an outdated plot can be recognised."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def draw(results: Path, plots: Path) -> list[Path]:
    """Draw all results of a folder; returns the files that were written."""
    written = []
    for file in sorted(results.glob("*.json")):
        for name, figure in figures_of(file).items():
            plots.mkdir(parents=True, exist_ok=True)
            path = plots / f"{name}.png"
            figure.savefig(path, metadata={"Software": None, "Source": f"{file.name} {digest(file)}"})
            written.append(path)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--plots", type=Path, default=PLOTS, help="default: %(default)s")
    options = parser.parse_args()
    if not can_plot():
        print(NO_PLOTS)
        return 0
    for path in draw(options.results, options.plots):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The plots of the reports. matplotlib is optional: without it there are none, and the tables hold the numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NO_PLOTS = "No plots: matplotlib is not installed (`pip install 'sibo-triton[viz]'`). The tables hold the numbers."


@dataclass(frozen=True)
class Curve:
    """One line of a plot: its name in the legend, its points, and whether they are marked."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marked: bool = False


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(path: Path, curves: Sequence[Curve], xlabel: str, ylabel: str) -> None:
    """Write a line plot as a PNG file. Needs matplotlib."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(6.4, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot(
            curve.x, curve.y, label=curve.label, linewidth=1.5, marker="o" if curve.marked else None, markersize=4
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)

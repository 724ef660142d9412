"""Measures time and memory: on a GPU by CUDA events and torch's allocator, on a CPU by the clock.

* Providers take turns, round by round, so that a GPU that warms up or slows down affects all of them. Ratios are
  medians of the ratios within one round; times are medians with the 20th and 80th percentile.
* A turn repeats its step so often that it takes some milliseconds. It begins with one additional untimed step: as in
  training, the host is then ahead of the GPU if the GPU has enough work, and the GPU waits for it otherwise.
* Each repetition reads other inputs, which together are larger than the cache; the data are random.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.results_file import MIB

MIN_ROUNDS = 5


class Step(Protocol):
    """A step that is timed."""

    name: str
    phases: tuple[str, ...]

    def run(self, i: int, mark: Callable[[], None]) -> None:
        """Run on the i-th inputs (modulo their number), and call `mark` at the end of each phase."""

    def reset(self) -> None:
        """Drop what a run leaves behind; not timed."""

    def reported(self, milliseconds: list[float]) -> list[float]:
        """The milliseconds of each phase, from the times between the marks."""


class Clock:
    """Marks on the device's time line."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between neighbouring marks. Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False)]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_turn(step: Step, device: str, first: int, repeats: int) -> list[float]:
    """Milliseconds of each phase, mean of the repetitions; on a GPU one untimed step runs first."""
    synchronize(device)
    clocks = []
    if device == "cuda":
        step.run(first + repeats, lambda: None)
    for i in range(first, first + repeats):
        step.reset()
        clocks.append(Clock(device))
        clocks[-1].mark()
        step.run(i, clocks[-1].mark)
    phases = [clock.milliseconds() for clock in clocks]
    step.reset()
    return step.reported([float(sum(times)) / repeats for times in zip(*phases, strict=True)])


@dataclass
class Effort:
    """How long to measure.

    Attributes:
        rounds: at most; fewer, but at least `MIN_ROUNDS`, once the seconds are used up.
        seconds: for all rounds.
        turn: minimal milliseconds of a turn.
        repeats: at most, per turn.
    """

    rounds: int = 30
    seconds: float = 10.0
    turn: float = 10.0
    repeats: int = 50


@dataclass
class Times:
    """Milliseconds by step, phase and round; and the errors of steps that failed."""

    rounds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    repeats: int = 1


def interleaved(
    steps: Sequence[Step], device: str, effort: Effort, begin: Callable[[str | None], None] = lambda name: None
) -> Times:
    """Time the steps in turn, round by round. A step that raises is dropped, and the others continue.

    Args:
        steps: of different names.
        device: "cuda" or "cpu".
        effort: how long.
        begin: called with the name of each step that warms up, and with None once all run in turn.
    """
    result = Times()
    left = list(steps)

    def turn(step: Step, first: int, repeats: int) -> list[float] | None:
        try:
            return time_turn(step, device, first, repeats)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # which hold memory
            result.errors[step.name] = error
            result.rounds.pop(step.name, None)
            left.remove(step)
            return None

    for step in list(left):  # warm up; the second run determines the number of repetitions
        begin(step.name)
        turn(step, 0, 1)
    begin(None)
    warm = {step.name: turn(step, 1, 1) for step in list(left)}
    if not left:
        return result
    slowest = max(sum(times) for times in warm.values() if times is not None)
    result.repeats = max(1, min(effort.repeats, math.ceil(effort.turn / max(slowest, 1e-3))))
    started, count = time.perf_counter(), 0
    while count < effort.rounds and (count < MIN_ROUNDS or time.perf_counter() - started < effort.seconds):
        for step in list(left):
            times = turn(step, 2 + count * result.repeats, result.repeats)
            if times is not None:
                of_step = result.rounds.setdefault(step.name, {phase: [] for phase in step.phases})
                for phase, value in zip(step.phases, times, strict=True):
                    of_step[phase].append(value)
        count += 1
    return result


def spread(values: Iterable[float], digits: int = 4) -> dict[str, float]:
    """The median, and the 20th and 80th percentile."""
    p20, p50, p80 = np.percentile(list(values), [20, 50, 80])
    return {"p20": round(float(p20), digits), "p50": round(float(p50), digits), "p80": round(float(p80), digits)}


def total(phases: Mapping[str, Sequence[float]]) -> list[float]:
    """The sum of all phases, for each round."""
    return [sum(times) for times in zip(*phases.values(), strict=True)]


def with_total(phases: dict[str, list[float]]) -> dict[str, list[float]]:
    """Adds "both" if the phases are forward and backward."""
    return {**phases, "both": total(phases)} if set(phases) == {"forward", "backward"} else phases


def compared(times: Times, floor: str, ours: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each step its times, percentages over the floor, and for ours the ratio to each of the others.

    Percentages and ratios are computed within each round; reported are medians (with percentiles) over the rounds.
    """
    rounds = {name: with_total(phases) for name, phases in times.rounds.items()}
    table: dict[str, dict[str, Any]] = {}
    for name, phases in rounds.items():
        row: dict[str, Any] = {"ms": {phase: spread(values) for phase, values in phases.items()}}
        if floor in rounds and name != floor:
            row["percent_over_frozen"] = {
                phase: spread(
                    (100 * (a / b - 1) for a, b in zip(values, rounds[floor][phase], strict=True)),
                    2,
                )
                for phase, values in phases.items()
            }
        if name in ours:
            row["ratio_to"] = {
                peer: {
                    phase: spread(a / b for a, b in zip(values, rounds[peer][phase], strict=True))
                    for phase, values in phases.items()
                }
                for peer in rounds
                if peer not in (name, floor)
            }
        table[name] = row
    return table


def peak_bytes(step: Step, device: str) -> int | None:
    """The peak of what a run allocates in addition to what was allocated before; None on a CPU."""
    if device != "cuda":
        return None
    step.run(0, lambda: None)  # allocates what stays, such as optimizer states
    step.reset()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.run(0, lambda: None)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    step.reset()
    return peak


def buffers_beyond_cache(device: str, bytes_of_one: int) -> int:
    """How many inputs of this size fill the cache twice; at least 2."""
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * MIB) if device == "cuda" else 0
    return max(2, min(64, math.ceil(2 * cache / max(1, bytes_of_one))))


def ceilings(device: str, rounds: int = 20) -> dict[str, float]:
    """The bandwidth of a copy, read and written, in GB/s, and bfloat16 products in TFLOP/s: medians."""
    numel, n = (2**28, 8192) if device == "cuda" else (2**20, 128)
    source, target = (torch.randn(numel, device=device).to(torch.bfloat16) for _ in range(2))
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    copies = _median_seconds(device, rounds, lambda: target.copy_(source))
    products = _median_seconds(device, rounds, lambda: torch.mm(a, b, out=product))
    return {
        "copy_GB_per_s": float(f"{2 * source.nbytes / copies / 1e9:.4g}"),
        "bf16_gemm_TFLOP_per_s": float(f"{2 * n**3 / products / 1e12:.4g}"),
    }


def _median_seconds(device: str, rounds: int, run: Callable[[], Any]) -> float:
    run()
    clock = Clock(device)
    clock.mark()
    for _ in range(rounds):
        run()
        clock.mark()
    return float(np.median(clock.milliseconds())) / 1e3

"""Runs the rows of a timed benchmark: build and check each provider, time them in turn, write the row.

A provider that computes something wrong is printed as WRONG and is not timed; one that raises is printed with its
error. In both cases the others continue.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

from benchmarks.checks import Verdict
from benchmarks.providers import Provider
from benchmarks.results_file import FLOOR, MIB, Budget, ResultsFile, command_line, is_ours, output_of
from benchmarks.settings import AdapterSetting
from benchmarks.supervised import BROKEN_DEVICE, supervise
from benchmarks.timing import Effort, Step, ceilings, compared, interleaved, peak_bytes
from sibo_triton.environment import provenance

IN_TURN = "all, in turn"


class Row(Protocol):
    """A comparison on one shape."""

    title: str
    setting: AdapterSetting

    def takes(self, provider: Provider) -> bool:
        """Whether the provider takes part."""

    def describe(self) -> dict[str, Any]:
        """The row's settings, for the file."""

    def open(self, device: str) -> Comparison:
        """Allocate the row's weights and inputs."""


class Comparison(Protocol):
    """A row with its weights and inputs."""

    def build(self, provider: Provider) -> Step:
        """The provider's model, with the weights that all share."""

    def check(self, provider: Provider, step: Step) -> Verdict:
        """Compare its outputs and gradients with the definition's."""

    def more(self, provider: Provider, step: Step) -> dict[str, Any]:
        """Further facts, collected before it is timed."""

    def derived(self, name: str, facts: dict[str, Any], floor: dict[str, Any], ceiling: dict[str, float]) -> None:
        """Add what follows from its times to a provider's facts."""


class Session:
    """A run of a benchmark, with its file of results and its time budget; prints progress."""

    def __init__(self, results: ResultsFile, device: str, budget: Budget, effort: Effort) -> None:
        self.results, self.device, self.budget, self.effort = results, device, budget, effort
        self.ceilings = ceilings(device)
        results.note(ceilings=self.ceilings)
        print(
            f"ceilings, measured: {', '.join(f'{name} {value}' for name, value in self.ceilings.items())}", flush=True
        )

    def run(self, rows: Sequence[Row], providers: Sequence[Provider]) -> None:
        """Time the rows in order, as many as fit the budget."""
        left = [row for row in rows if not self.results.has(row.title)]
        while left and self.budget.begin_row():
            row = left.pop(0)
            print(f"\n{row.title}  ({self.budget.spent:.0f} s)", flush=True)
            self.run_row(row, [provider for provider in providers if row.takes(provider)])
            self.budget.end_row()
        self.results.note(not_run_for_lack_of_time=[row.title for row in left])
        if left:
            print(f"\nno time for {len(left)} rows, of which the first is: {left[0].title}", flush=True)

    def run_row(self, row: Row, providers: Sequence[Provider]) -> None:
        facts: dict[str, dict[str, Any]] = {}
        steps: list[Step] = []
        crash = self.results.crash_of(row.title, IN_TURN)
        if crash is not None:
            print(f"  CRASHED an earlier process: {crash}", flush=True)
            self.results.add({"title": row.title, **row.describe(), "providers": {}, "error": crash})
            return
        try:
            comparison = row.open(self.device)
        except Exception as error:
            self._stop_if_broken(row, "all", error)
            self.results.add({"title": row.title, **row.describe(), "providers": {}, "error": _say("all", error)})
            return
        for provider in providers:
            step, facts[provider.name] = self._prepared(row, comparison, provider)
            steps += [step] if step is not None else []
        facts |= self._timed(row, comparison, steps, facts)
        del comparison
        steps.clear()
        _free(self.device)
        self.results.add({"title": row.title, **row.describe(), "providers": facts})

    def _prepared(self, row: Row, comparison: Comparison, provider: Provider) -> tuple[Step | None, dict[str, Any]]:
        """A provider's step if it was built and is correct, or None; and its facts."""
        reason = provider.unavailable(row.setting)
        if reason is not None:
            return None, {"unavailable": reason}
        crash = self.results.crash_of(row.title, provider.name)
        if crash is not None:
            print(f"  {provider.name}: CRASHED an earlier process: {crash}", flush=True)
            return None, {"error": crash}
        self.results.begin(row.title, provider.name)
        try:
            step = comparison.build(provider)
            verdict = comparison.check(provider, step)
            if verdict.problem is not None:
                print(f"  {provider.name}: WRONG, {verdict.problem}; not timed", flush=True)
                return None, {"wrong": verdict.problem}
            peak = peak_bytes(step, self.device)
            facts = {
                "worst_error": {"of_tolerance": round(verdict.worst, 4), "what": verdict.what},
                **({} if peak is None else {"peak_MiB": round(peak / MIB, 1)}),
                **comparison.more(provider, step),
            }
        except Exception as error:
            self._stop_if_broken(row, provider.name, error)
            return None, {"error": _say(provider.name, error)}
        return step, facts

    def _timed(
        self, row: Row, comparison: Comparison, steps: list[Step], facts: dict[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """The facts of the providers that were timed, or that failed during timing."""
        times = interleaved(
            steps, self.device, self.effort, lambda name: self.results.begin(row.title, name or IN_TURN)
        )
        for name, error in times.errors.items():
            self._stop_if_broken(row, name, error)
        outcomes = {name: {"error": _say(name, error)} for name, error in times.errors.items()}
        table = compared(times, FLOOR, [name for name in times.rounds if is_ours(name)])
        for name, more in table.items():
            outcomes[name] = {**facts[name], **more}
            if FLOOR in table:
                comparison.derived(name, outcomes[name], {**facts[FLOOR], **table[FLOOR]}, self.ceilings)
            print(f"  {name}: {_line(outcomes[name])}", flush=True)
        return outcomes

    def _stop_if_broken(self, row: Row, name: str, error: Exception) -> None:
        """End the process if the device can no longer be used; the supervisor starts another."""
        traceback.clear_frames(error.__traceback__)  # which hold memory
        _free(self.device)
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.ones(1, device="cuda").add_(1)
            torch.cuda.synchronize()
        except Exception:
            self.results.begin(row.title, name, _one_line(error))
            print(f"  {name}: {_one_line(error)}", flush=True)
            sys.exit(BROKEN_DEVICE)


def _free(device: str) -> None:
    with suppress(Exception):  # a broken device is detected elsewhere
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _one_line(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:300]


def _say(name: str, error: Exception) -> str:
    """Print an error, with its traceback for debugging, and return it as a line."""
    line = _one_line(error)
    print(f"  {name}: FAILED, {line}", flush=True)
    if not isinstance(error, torch.OutOfMemoryError):
        print("".join(traceback.format_exception(error)[-4:]), file=sys.stderr, flush=True)
    return line


def _line(facts: dict[str, Any]) -> str:
    words = [f"{phase} {ms['p50']:.3f} ms" for phase, ms in facts["ms"].items()]
    if "percent_over_frozen" in facts:
        last = list(facts["percent_over_frozen"])[-1]
        words.append(f"{facts['percent_over_frozen'][last]['p50']:+.1f} % over frozen")
    if "peak_MiB" in facts:
        words.append(f"peak {facts['peak_MiB']:,.0f} MiB")
    if "tokens_per_second" in facts:
        words.append(f"{facts['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(words)


def run_benchmark(
    name: str,
    what: str,
    rows: Sequence[Row],
    providers: Sequence[Provider],
    options: argparse.Namespace,
    effort: Effort,
) -> int:
    """The common part of the timed benchmarks' `main`, after parsing the options; returns the exit status."""
    rows = [row for row in rows if all(word in row.title for word in options.only)]
    if not rows:
        sys.exit(f"benchmarks.{name}: no row's title holds {' and '.join(map(repr, options.only))}; --list shows them")
    if options.list:
        print("\n".join(row.title for row in rows))
        return 0
    if options.providers:
        known = [provider.name for provider in providers]
        unknown = [name for name in options.providers if name not in known]
        if unknown:
            sys.exit(f"benchmarks.{name}: {unknown[0]!r} is no provider: choose among {', '.join(known)}")
        providers = [provider for provider in providers if provider.name in (FLOOR, *options.providers)]
    output = output_of(name, options)
    if not options.unsupervised:
        command = [sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:], "--unsupervised"]
        return supervise(command, output, options.budget)
    head = {"command": command_line(name), "what": what, **provenance(), "device": options.device}
    if options.device == "cuda":
        head["gpu"] = torch.cuda.get_device_name(0)
    results = ResultsFile(output, head, options.resume)
    Session(results, options.device, Budget(options.budget), effort).run(rows, providers)
    print(f"\nwritten: {output}", flush=True)
    return 0

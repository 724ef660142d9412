"""Compiles the kernels of the timed benchmarks in parallel, into Triton's cache: `python -m benchmarks.precompile`.

`make gpu` runs it first, so that no benchmark spends its time compiling. Our providers run the linears of each row,
grouped by the input that they share, on tensors without memory, for the present device: this compiles what a launch
would compile (`ahead_of_time/without_gpu.py`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import decode, layer, step
from benchmarks.ahead_of_time.without_gpu import Compiled, compiling_for, target_of_device
from benchmarks.checks import without_known_warnings
from benchmarks.counting import as_on_a_gpu
from benchmarks.in_parallel import in_parallel
from benchmarks.models import Architecture, Part, part_linears
from benchmarks.peers import TIMED
from benchmarks.providers import Provider
from benchmarks.results_file import gpu_name, is_ours
from benchmarks.settings import AdapterSetting


@dataclass(frozen=True)
class Job:
    """One provider on linears that share an input."""

    architecture: Architecture
    names: tuple[str, ...]
    tokens: int
    setting: AdapterSetting
    provider: str
    trains: bool = True

    def __str__(self) -> str:
        return f"{self.provider}, {self.architecture.name} {'+'.join(self.names)}, M={self.tokens}, {self.setting}"


def ours() -> list[Provider]:
    return [provider for provider in TIMED if is_ours(provider.name)]


def jobs_of(quick: bool) -> list[Job]:
    """The jobs of all rows of the benchmarks, without duplicates, the most important first."""
    jobs: list[Job] = []
    for row in layer.plan(quick):
        jobs += _jobs(row.architecture, row.groups, [row.tokens], row.setting)
    for training in step.plan(quick):
        tokens = [training.tokens, step.CHECKED_TOKENS]
        jobs += _jobs(training.architecture, training.architecture.linears.groups, tokens, training.setting)
    for decoding in decode.plan(quick):
        tokens = [decoding.batch * length for length in (1, decode.PROMPT - 1, decode.PROMPT)]
        groups = decoding.architecture.linears.groups
        jobs += _jobs(decoding.architecture, groups, tokens, decoding.setting, trains=False)
    return list(dict.fromkeys(jobs))


def _jobs(
    architecture: Architecture,
    groups: Iterable[tuple[str, ...]],
    tokens: Iterable[int],
    setting: AdapterSetting,
    trains: bool = True,
) -> list[Job]:
    # with dropout, a check also runs without it
    settings = [setting, replace(setting, dropout=0.0)] if setting.dropout else [setting]
    return [
        Job(architecture, names, M, each, provider.name, trains)
        for M in tokens
        for names in groups
        for each in settings
        for provider in ours()
        if isinstance(setting, provider.takes)
        and (not provider.mixes or any(name in architecture.linears.mixing for name in names))
    ]


def compiled_of(job: Job, gpu: Any, target: Any) -> list[Compiled]:
    """The kernels of a job, compiled for a GPU, with the launchers planning for the target."""
    with compiling_for(gpu, target) as compiled, as_on_a_gpu(target):
        run(job)
    return compiled


def compile_job(arguments: tuple[Job, Any, Any]) -> tuple[str, int, str | None]:
    """The job, how many of its kernels were compiled, and the error if there was one."""
    what = str(arguments[0])
    try:
        return what, len(compiled_of(*arguments)), None
    except Exception as raised:  # the benchmark will compile it, or show the error
        return what, 0, f"{type(raised).__name__}: {raised}".splitlines()[0]


def run(job: Job) -> None:
    """Forward, and backward if it trains, on the device "meta"."""
    provider = next(provider for provider in ours() if provider.name == job.provider)
    setting = replace(job.setting, linears=part_linears(job.architecture, job.names))
    with without_known_warnings():
        part = Part(job.architecture, job.names, "meta", layer.DTYPE)
        model = provider.wrap(part, setting).to("meta").train(job.trains)
    widths = job.architecture.hidden, job.architecture.shapes()[job.names[0]][0]
    h0, x = (torch.empty(1, job.tokens, width, dtype=layer.DTYPE, device="meta") for width in widths)
    with torch.set_grad_enabled(job.trains):
        outputs = model(h0, x.requires_grad_(job.trains))
    if job.trains:
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="of the rows that the benchmarks run with --quick")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name holds all of these")
    options = parser.parse_args()
    gpu_name("precompile", without=", so there is nothing to compile for")
    from triton.runtime.driver import driver

    gpu, target = driver.active.get_current_target(), target_of_device()
    jobs = [(job, gpu, target) for job in jobs_of(options.quick) if all(word in str(job) for word in options.only)]
    for what, _, error in in_parallel("compiling the kernels of rows' linears", compile_job, jobs, options.workers):
        if error is not None:
            print(f"not compiled: {what}: {error}", flush=True)


if __name__ == "__main__":
    main()

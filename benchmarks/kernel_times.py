"""Where a layer's time goes, kernel by kernel, on a GPU: `python -m benchmarks.kernel_times`.

Profiles forward and backward of a layer with torch's profiler, for some providers: every kernel that the device ran,
how often and for how long; and for each of our launches the bytes that it moves (counted by `launch_traffic.py`) and
the resulting bandwidth. Shares above 1 of the copy's bandwidth, measured in the same run, are due to the cache.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd.profiler import DeviceType

from benchmarks.launch_traffic import KERNELS, Traffic, recorded_launches
from benchmarks.layer import LayerRow, LayerStep
from benchmarks.models import LLAMA_3_8B
from benchmarks.peers import TIMED
from benchmarks.results_file import FLOOR, MIB, ResultsFile, command_line, file_of, gpu_name
from benchmarks.settings import BF16, DEFAULTS
from benchmarks.timing import ceilings
from sibo_triton.environment import provenance

PROVIDERS = (FLOOR, "PEFT LoRA", "addmm_ scheme, siblings grouped", "ours, lambda = 0", "ours, SIBO")
STEPS = 8


def device_kernels(step: LayerStep) -> list[list[tuple[str, float]]]:
    """The kernels that the device ran in each step, in order: names and microseconds."""
    steps = []
    for i in range(STEPS + 2):
        step.reset()
        torch.cuda.synchronize()
        if i < 2:  # warm
            step.run(i, lambda: None)
            continue
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step.run(i, lambda: None)
            torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
        events.sort(key=lambda event: event.time_range.start)
        steps.append([(event.name, event.time_range.elapsed_us()) for event in events])
    step.reset()
    return steps


def traffic_of(step: LayerStep) -> list[Traffic]:
    """The traffic of each of our launches, in order."""
    launches: list[Traffic] = []
    step.reset()
    with recorded_launches(launches.append, run=True):
        step.run(0, lambda: None)
    step.reset()
    return launches


def totals(steps: list[list[tuple[str, float]]]) -> list[dict[str, Any]]:
    """For each kernel, how often a step runs it and its total microseconds, medians over steps; the longest first."""
    by_name: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in steps])
    for i, step in enumerate(steps):
        for name, microseconds in step:
            by_name[name][i].append(microseconds)
    rows = [
        {"kernel": name[:120], "count": median(map(len, times)), "us": round(median(map(sum, times)), 2)}
        for name, times in by_name.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def ours(steps: list[list[tuple[str, float]]], launches: list[Traffic], copy_GB_per_s: float) -> list[dict[str, Any]]:
    """Each of our launches in order: its traffic, and its median time."""
    launched = [[event for event in step if event[0] in KERNELS] for step in steps]
    if any([name for name, _ in step] != [launch.name for launch in launches] for step in launched):
        raise RuntimeError("what the profiler saw of our kernels is not what was launched")
    rows = []
    for i, launch in enumerate(launches):
        microseconds = median(step[i][1] for step in launched)
        moved = launch.read + launch.written
        rows.append(
            {
                "kernel": launch.name,
                "grid": list(launch.grid or ()),
                "us": round(microseconds, 2),
                "MiB": round(moved / MIB, 2),
                "reread_MiB": round(launch.reread / MIB, 2),
                "share_of_copy": round(moved / microseconds / 1e3 / copy_GB_per_s, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, help="default: a file of this GPU's in benchmarks/results/")
    options = parser.parse_args()
    gpu = gpu_name("kernel_times")
    ceiling = ceilings("cuda")
    head = {
        "command": command_line("kernel_times"),
        "what": f"kernels of one layer, forward and backward, bfloat16: medians of {STEPS} steps, in microseconds",
        **provenance(),
        "gpu": gpu,
        "ceilings": ceiling,
    }
    results = ResultsFile(options.output or file_of("kernel-times", gpu), head)
    for setting in (BF16, DEFAULTS):
        row = LayerRow(LLAMA_3_8B, options.tokens, setting)
        comparison = row.open("cuda")
        for provider in TIMED:
            if provider.name not in PROVIDERS or provider.unavailable(setting):
                continue
            step = comparison.build(provider)
            steps = device_kernels(step)
            kernels, launches = totals(steps), traffic_of(step)
            our_launches = ours(steps, launches, ceiling["copy_GB_per_s"])
            in_all = round(median(sum(us for _, us in one) for one in steps), 1)
            title = f"{row.title}, {provider.name}"
            results.add({"title": title, "us": in_all, "kernels": kernels, "launches_of_ours": our_launches})
            print(f"\n{title}: {in_all:,.0f} us in kernels", flush=True)
            for kernel in kernels[:14]:
                print(f"  {kernel['us']:9.1f} us  {kernel['count']:4g} x  {kernel['kernel'][:90]}", flush=True)
            for launch in our_launches:
                moved = f"{launch['MiB']:8.1f} MiB {launch['reread_MiB']:8.1f} again"
                share = f"{launch['share_of_copy']:5.2f} of copy"
                print(f"  {launch['us']:9.1f} us  {moved}  {share}  {launch['kernel']} {launch['grid']}")


if __name__ == "__main__":
    main()

"""Python and dispatch time of LoRA modules on tiny tensors: `python -m benchmarks.host_time`.

Forward + backward, and forward without gradients, of one linear, of one whose base layer runs by its own forward, as a
quantised one does, and of three that share x. Printed is the time that a provider adds to the
frozen linears, divided by their number: medians over runs in turn, in microseconds, and of these the median over some
processes, as memory is laid out otherwise in each, which alone makes a difference of some percent. It includes h0's
hooks for providers that mix.

On the CPU, where computing on such small tensors costs almost nothing, it is process time. "kernels' path" is then the
host's work for a GPU, except for the driver and the additional cost of torch's CUDA allocator and operations: kernels
are compiled and bound, but not launched. Its outputs are not computed.

With --device cuda it is the time until the GPU has finished all repeats. The GPU waits for the host, as launches of
this size take the host longer than the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.ahead_of_time.binaries import TARGETS
from benchmarks.ahead_of_time.without_gpu import kernels_chosen, launching_for
from benchmarks.checks import without_known_warnings
from benchmarks.models import LLAMA_3_8B, Part, part_linears
from benchmarks.providers import OursLora, OursSibo, Peft, PeftMixed, Provider
from benchmarks.results_file import RESULTS, command_line, file_of, gpu_name, is_ours
from benchmarks.settings import Setting
from sibo_triton.environment import provenance

TINY = replace(LLAMA_3_8B, hidden=16, ffn=16, heads=1, kv_heads=1, head=16)
TOKENS, REPEATS = 2, 20
OTHER_BASE = "one on another base"
GROUPS = {"one linear": ("o_proj",), OTHER_BASE: ("o_proj",), "three that share x": ("q_proj", "k_proj", "v_proj")}


def simulated_h100() -> AbstractContextManager[None]:
    """Inside, launchers and Triton do everything for an H100 except calling its driver."""
    return launching_for(TARGETS["sm_90"][0])


class OtherLinear(nn.Linear):
    """Stands for a quantised linear: PEFT's layer calls its forward, and then the adapter."""


class Run:
    """A provider on linears that share x."""

    def __init__(self, provider: Provider, title: str, dtype: torch.dtype, setting: Setting, device: str) -> None:
        torch.manual_seed(0)
        names = GROUPS[title]
        part = Part(TINY, names, device, dtype)
        for module in part.modules():
            if title == OTHER_BASE and type(module) is nn.Linear:
                module.__class__ = OtherLinear
        with without_known_warnings():
            part_setting = replace(setting, linears=part_linears(TINY, names))
            self.model: nn.Module = provider.wrap(part, part_setting)
        self.choice: AbstractContextManager[Any] = nullcontext()
        self._now = now_on_gpu if device == "cuda" else time.process_time

    def microseconds(self, h0: torch.Tensor, x: torch.Tensor, grads: list[torch.Tensor]) -> tuple[float, float]:
        """The mean of some repeats: of forward + backward, and of forward without gradients."""
        with self.choice:
            start = self._now()
            for _ in range(REPEATS):
                torch.autograd.backward(self.model(h0, x), grads)
            middle = self._now()
            with torch.no_grad():
                for _ in range(REPEATS):
                    self.model(h0, x)
            return 1e6 * (middle - start) / REPEATS, 1e6 * (self._now() - middle) / REPEATS


def now_on_gpu() -> float:
    """The time after the GPU has finished its work."""
    torch.cuda.synchronize()
    return time.perf_counter()


def runs_of(title: str, dtype: torch.dtype, setting: Setting, device: str) -> dict[str, Run]:
    """The runs by name, the frozen linears first."""
    providers = (Provider(), Peft(), OursLora(), PeftMixed(), OursSibo())
    runs = {
        provider.name: Run(provider, title, dtype, setting, device)
        for provider in providers
        if not (provider.mixes and GROUPS[title] == ("o_proj",))
    }
    if device == "cuda":
        return runs
    for provider in providers:
        if not is_ours(provider.name) or provider.name not in runs:
            continue
        name = f"{provider.name}, kernels' path"
        runs[name] = Run(provider, title, dtype, setting, device)
        runs[name].choice = kernels_chosen()
    return runs


def measured(title: str, dtype: torch.dtype, setting: Setting, rounds: int, device: str) -> list[dict[str, Any]]:
    """A row for each provider, printed as well."""
    names = GROUPS[title]
    runs = runs_of(title, dtype, setting, device)
    h0, x = (torch.randn(1, TOKENS, TINY.hidden, dtype=dtype, device=device) for _ in range(2))
    grads = [torch.randn(1, TOKENS, TINY.shapes()[name][1], dtype=dtype, device=device) for name in names]
    x.requires_grad_()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    with simulated_h100() if device == "cpu" else nullcontext():
        for run in runs.values():
            run.microseconds(h0, x, grads)  # compiles
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(run.microseconds(h0, x, grads))
    frozen, *others = times
    base = str(dtype).removeprefix("torch.")
    print(f"{title}, {base}, dropout {setting.dropout:g}: microseconds a module, forward + backward / forward alone")
    rows = []
    for name in others:
        pairs = list(zip(times[name], times[frozen], strict=True))
        added = [statistics.median((timed[i] - floor[i]) / len(names) for timed, floor in pairs) for i in range(2)]
        print(f"  {name:32} {added[0]:7.1f} {added[1]:7.1f}", flush=True)
        both, alone = (round(value, 1) for value in added)
        case = {"linears": title, "base": base, "dropout": setting.dropout, "provider": name}
        rows.append({**case, "forward_backward_us": both, "forward_without_gradients_us": alone})
    return rows


def all_rows(rounds: int, device: str) -> list[dict[str, Any]]:
    """The rows of all cases, measured in this process."""
    torch.set_num_threads(1)
    rows = []
    for title, dtype, dropout in product(GROUPS, (torch.float32, torch.bfloat16), (0.0, 0.05)):
        if device == "cpu" or dtype == torch.bfloat16:
            rows += measured(title, dtype, Setting(fp32_adapters=True, dropout=dropout), rounds, device)
    return rows


def rows_of_a_process(rounds: int, device: str) -> list[dict[str, Any]]:
    """The same, measured in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        options = ["--rounds", str(rounds), "--device", device, "--processes", "1", "--output", str(output)]
        subprocess.run([sys.executable, "-m", "benchmarks.host_time", *options], check=True)
        return json.loads(output.read_text(encoding="utf-8"))["rows"]


def medians(of_processes: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows with the medians of their times."""
    merged = []
    for rows in zip(*of_processes, strict=True):
        times = {name: statistics.median([row[name] for row in rows]) for name in rows[0] if name.endswith("_us")}
        merged.append(rows[0] | times)
    return merged


def main() -> None:
    """Print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="default: a file of this device's in benchmarks/results/")
    options = parser.parse_args()
    gpu = gpu_name("host_time") if options.device == "cuda" else None
    output = options.output or (RESULTS / "host-time.json" if gpu is None else file_of("host-time", gpu))
    if options.processes > 1:
        rows = medians([rows_of_a_process(options.rounds, options.device) for _ in range(options.processes)])
        print(f"medians of {options.processes} processes:")
        for row in rows:
            print("  ".join(map(str, row.values())))
    else:
        rows = all_rows(options.rounds, options.device)
    head = {
        "command": command_line("host_time"),
        **provenance(with_devices=gpu is not None),
        **({} if gpu is None else {"gpu": gpu}),
        "what": f"microseconds of {'process time' if gpu is None else 'time'} that a module adds to its frozen linear; "
        "tiny tensors, float32 adapters",
    }
    output.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {output}")


if __name__ == "__main__":
    main()

"""Compiles what the GPU tests launch, in parallel, into Triton's cache; says first what is missing. `make gpu` runs it.

Those of `launches.py`, on tensors without memory: see `benchmarks/ahead_of_time/without_gpu.py`.
"""

import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS.parent))
sys.path.insert(0, str(TESTS))

NEEDED = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 17), "peft": (0, 19, 1), "pytest": (8,)}


def missing() -> list[str]:
    """What the tests need and this Python does not have, each with what to do."""
    lines = []
    for name, least in NEEDED.items():
        wanted = f"{name} {'.'.join(map(str, least))} or newer"
        try:
            importlib.import_module(name)
        except ImportError as error:
            lines.append(f"{wanted} is needed, and cannot be imported ({error}): pip install {name}")
            continue
        version = importlib.metadata.version(name)
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
        if numbers < least:
            lines.append(f"{wanted} is needed, and {version} is installed: pip install --upgrade {name}")
    if not lines:
        import torch

        if not torch.cuda.is_available():
            build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
            lines.append(f"a CUDA device is needed, and torch {torch.__version__} sees none; it is built {build}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        lines.append("TRITON_INTERPRET=1 interprets kernels on the CPU: unset it")
    return lines


def compile_launch(job: tuple) -> None:
    """The kernels of one launch, by its place in the list, for a GPU."""
    i, gpu, plans_for = job
    from launches import ALL

    from benchmarks.ahead_of_time.without_gpu import compiling_for

    with compiling_for(gpu, plans_for):
        ALL[i].launch(ALL[i].inputs("meta"))


def compile_all(gpu: object, plans_for: object, workers: int) -> None:
    """Every launch of the tests."""
    from launches import ALL

    from benchmarks.in_parallel import in_parallel

    jobs = [(i, gpu, plans_for) for i in range(len(ALL))]
    for _ in in_parallel("compiling the kernels of launches", compile_launch, jobs, workers):
        pass


def main() -> None:
    problems = missing()
    if problems:
        sys.exit("make gpu: " + "\n          ".join(problems))
    import torch
    from triton.runtime.driver import driver

    from benchmarks.ahead_of_time.without_gpu import target_of_device

    for index in range(torch.cuda.device_count()):
        print(f"device {index}: {torch.cuda.get_device_name(index)}")
    compile_all(driver.active.get_current_target(), target_of_device(), len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()

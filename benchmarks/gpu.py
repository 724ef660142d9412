"""Everything that needs a GPU, one after another: `make gpu`, or `make gpu QUICK=1` in under 8 minutes.

Kernels are compiled first, in parallel; then come the GPU tests, the timed benchmarks, the plots and the README's
tables. Failing tests do not stop the benchmarks, which check every provider before they time it, but make the exit
status 1. With --quick each stage has a time limit, and unused time goes to the next stages; tests with many tokens,
with offsets past 2^31 and of the sanitizer are left out, and benchmarks run their most important rows.

Nothing is installed: the Python that runs this needs torch, triton, transformers, peft and pytest. With pytest-xdist
the tests run in several processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE = 30.0  # seconds that a stage may take beyond its limit before it is stopped


@dataclass(frozen=True)
class Stage:
    """A command, and the consequences if it fails.

    Attributes:
        arguments: of Python.
        seconds: its time limit with --quick.
        takes_budget: whether it is passed its limit, and ends by itself.
        needed: whether nothing else can run if it fails.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    takes_budget: bool = False
    needed: bool = False


def stages(quick: bool) -> list[Stage]:
    flag = ("--quick",) if quick else ()
    left_out = ("-k", "not many_tokens and not past_2_31 and not sanitizer and not inductor") if quick else ()
    files = ("tests/gpu", "tests/test_op_contract.py", *(() if quick else ("tests/test_device_map.py",)))
    tests = ("-m", "pytest", "-q" if quick else "-v", "-p", "no:cacheprovider", *left_out, *_in_parallel(), *files)
    return [
        Stage("the tests' kernels", ("tests/gpu/prepare.py",), 50, needed=True),
        Stage("the benchmarks' kernels", ("-m", "benchmarks.precompile", *flag), 60),
        Stage("tests", tests, 90),
        Stage("layer", ("-m", "benchmarks.layer", *flag), 130, takes_budget=True),
        Stage("step", ("-m", "benchmarks.step", *flag), 65, takes_budget=True),
        Stage("decode", ("-m", "benchmarks.decode", *flag), 40, takes_budget=True),
        Stage("plots", ("-m", "benchmarks.plots"), 10),
        Stage("the README's tables", ("-m", "benchmarks.readme_table"), 5),
    ]


def _in_parallel() -> tuple[str, ...]:
    """pytest's processes: most of the tests' time is host time, and some tests compile further kernels."""
    processes = min(6, len(os.sched_getaffinity(0)) // 2)
    return ("-n", str(processes)) if processes > 1 and importlib.util.find_spec("xdist") else ()


def run_stages(
    chosen: Sequence[Stage], limited: bool, run: Callable[[Sequence[str], float | None], int | None]
) -> dict[str, str]:
    """Run stages in order; returns how each ended, in words.

    Args:
        chosen: the stages to run.
        limited: whether their time limits apply.
        run: runs Python with these arguments for at most so many seconds; returns the exit status, None if it was
            stopped.
    """
    started, end, outcome = time.monotonic(), 0.0, {}
    for stage in chosen:
        end += stage.seconds
        now = time.monotonic() - started
        left = max(end - now, stage.seconds / 2)
        print(f"\n== {stage.name}" + (f": {left:.0f} s, {now:.0f} s so far" if limited else ""), flush=True)
        budget = ("--budget", f"{left:.0f}") if limited and stage.takes_budget else ()
        status = run((*stage.arguments, *budget), left + GRACE if limited else None)
        outcome[stage.name] = "stopped, out of time" if status is None else "done" if status == 0 else "FAILED"
        if stage.needed and status != 0:
            break
    return outcome


def run_python(arguments: Sequence[str], limit: float | None) -> int | None:
    """Run Python in the repository's root; its child processes are stopped with it."""
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under 8 minutes: the most important rows, fewer tests")
    quick = parser.parse_args().quick
    started = time.monotonic()
    outcome = run_stages(stages(quick), quick, run_python)
    print(f"\n{time.monotonic() - started:.0f} s in all")
    for name, how in outcome.items():
        print(f"  {name}: {how}")
    return int(any(how != "done" for how in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())

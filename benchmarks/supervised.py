"""Runs a benchmark in a separate process and restarts it after a crash, so that one provider cannot end the run.

An illegal memory access makes the CUDA context unusable, and some errors end the process. The file of results says what
was running; the next process records it as that provider's error, and continues from there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

RESTARTS = 10
GRACE = 180.0  # seconds beyond the budget, for the current row, the start of the process and its imports
BROKEN_DEVICE = 75  # exit status of a process that can no longer use its device


def supervise(command: Sequence[str], output: Path, budget: float | None) -> int:
    """Run the command until it succeeds, is out of time, or ends with no provider running; returns its exit status.

    Args:
        command: a benchmark; restarted with ``--resume``, and with the remaining ``--budget``.
        output: the file of results that it writes.
        budget: seconds.
    """
    started, extra = time.monotonic(), list[str]()
    for _ in range(RESTARTS + 1):
        left = None if budget is None else budget - (time.monotonic() - started)
        limit = [] if left is None else ["--budget", f"{max(0.0, left):.0f}"]
        before = _crash(output)
        try:
            status = subprocess.run(
                [*command, *extra, *limit], timeout=None if left is None else max(0.0, left) + GRACE
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"stopped {GRACE:.0f} s after the end of its time; {output} has the rows until then", flush=True)
            return 1
        crash = _crash(output)
        if status == 0 or crash is None or crash == before:
            return status
        what = "the device is not usable any more" if status == BROKEN_DEVICE else f"the process ended ({status})"
        print(f"CRASHED {crash['provider']}, {crash['row']}: {what}; going on without it", flush=True)
        extra = ["--resume"]
    print(f"{RESTARTS} restarts were not enough", file=sys.stderr)
    return 1


def _crash(output: Path) -> dict[str, str] | None:
    """The row and provider that the file says were running."""
    try:
        return json.loads(output.read_text(encoding="utf-8")).get("under_way")
    except (OSError, ValueError):
        return None

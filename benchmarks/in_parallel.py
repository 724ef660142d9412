"""Runs jobs in separate processes and prints progress; used to compile many kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any

TELL = 10.0  # seconds between two lines


def in_parallel(
    what: str,
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    workers: int,
    chunk: int = 1,
    chunks_of_process: int | None = None,
) -> Iterator[Any]:
    """What a function returns for each job, as soon as it is available.

    Args:
        what: a description, for the first line.
        function: defined in a module, as new processes import it.
        chunk: how many jobs a process takes at once.
        chunks_of_process: after how many chunks a process is replaced; None: never.
    """
    started = told = time.monotonic()
    print(f"{what}: {len(jobs)} jobs in {workers} processes", flush=True)
    with get_context("spawn").Pool(workers, maxtasksperchild=chunks_of_process) as pool:
        for done, result in enumerate(pool.imap_unordered(function, jobs, chunk), 1):
            yield result
            now = time.monotonic()
            if now - told > TELL or done == len(jobs):
                told, left = now, (now - started) / done * (len(jobs) - done)
                print(f"{done} of {len(jobs)}, {now - started:.0f} s, {left:.0f} s to go", flush=True)

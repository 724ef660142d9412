"""Choosing tiles by timing, on request. Without it every launch takes its plan's one configuration.

`SIBO_TRITON_AUTOTUNE=1` (``docs/operations.md``) times the plan's configuration and its neighbours, and keeps the
fastest. It does so at the first launch of a kernel for a class of shapes (M by its power of two, other sizes as they
are), dtypes and device. The variable is read once, at import. A choice holds for the process, so that results repeat
bitwise within it; another process may choose otherwise, and sum in another order. Tuning makes the first steps slow and
waits for the device; launches that a CUDA graph captures are not tuned.
"""

import os
import threading
from collections.abc import Callable, Hashable

import torch
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench_cudagraph

from .precision import INTERPRETED

VARIABLE = "SIBO_TRITON_AUTOTUNE"
_VALUE = os.environ.get(VARIABLE, "0")
if _VALUE not in ("0", "1"):
    raise ValueError(f"{VARIABLE}={_VALUE!r}: set it to 1, to time tile configurations, or to 0.")
ENABLED = _VALUE == "1"

#: Returns the time of a call, in a CUDA graph, as each trial also prepares its launch, which takes the host longer than
#: the kernel the device; None where no time means anything.
timer: Callable[[Callable[[], object]], float] | None = None if INTERPRETED else do_bench_cudagraph

_fastest: dict[Hashable, dict[str, int]] = {}
_lock = threading.Lock()


def tuned(
    key: tuple[Hashable, ...], config: dict[str, int], trial: Callable[[dict[str, int]], object], rows: str = ""
) -> dict[str, int]:
    """The configuration to launch with: the given one, unless tuning is asked for.

    Args:
        key: the kernel, the class of shapes, the dtypes and flags, and the device.
        config: tile sizes, num_warps and num_stages.
        trial: launches the kernel with a configuration, and changes nothing that outlives the call.
        rows: the tile size that a launch may take otherwise, if any.

    Raises:
        Whatever the launch with ``config`` raises, if no neighbour can be launched.
    """
    if not ENABLED or timer is None or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return config
    with _lock:  # two threads must not choose differently
        if key not in _fastest:
            _fastest[key] = _fastest_of(neighbours(config, rows), trial)
        return _fastest[key]


def neighbours(config: dict[str, int], rows: str = "") -> list[dict[str, int]]:
    """The configuration, and those that differ from it in one of stages, warps and rows."""
    stages, warps = config["num_stages"], config["num_warps"]
    changes = [{"num_stages": n} for n in (stages - 1, stages + 1, stages + 2) if n >= 1]
    changes += [{"num_warps": n} for n in (warps // 2, warps * 2) if 2 <= n <= 8]
    if rows:
        changes += [{rows: n} for n in (config[rows] // 2, config[rows] * 2) if n >= 16]  # the least that a dot takes
    return [config, *(config | change for change in changes)]


def _fastest_of(configs: list[dict[str, int]], trial: Callable[[dict[str, int]], object]) -> dict[str, int]:
    times, failure = [], None
    for config in configs:
        try:
            times.append(timer(lambda config=config: trial(config)))
        except (OutOfResources, PTXASError) as error:
            failure = failure or error
            times.append(float("inf"))
    if min(times) == float("inf"):
        raise failure
    return configs[times.index(min(times))]

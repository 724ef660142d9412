"""What the launchers know of the device that they launch on, and choose tiles and the number of programs by."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from triton.runtime import driver

KIB = 1024


#: Bytes that a multiprocessor should have under way: what an H200 moves in its latency of about a microsecond. By
#: count, not measured.
IN_FLIGHT = 40 * KIB


@dataclass(frozen=True)
class Target:
    """A kind of GPU."""

    backend: str  # "cuda" or "hip"
    capability: int  # of CUDA: 80 of an A100, 90 of an H100; 0 of what is not CUDA's
    shared_memory: int  # bytes that one program may have; about what a multiprocessor has
    multiprocessors: int

    @property
    def hip(self) -> bool:
        return self.backend == "hip"

    def stages(self, least: int, bytes_of_stage: int, programs: int) -> int:
        """num_stages of a loop: deep enough that all but one stage of so many programs come to IN_FLIGHT.

        No deeper than leaves shared memory for two programs, and not below ``least``. Depth costs no registers on CUDA,
        where stages go straight to shared memory; gfx942's 64 KiB have no room for more than the least.
        """
        stages = least
        while (stages - 1) * programs * bytes_of_stage < IN_FLIGHT:
            if self.hip or 2 * (stages + 1) * bytes_of_stage > self.shared_memory:
                break
            stages += 1
        return stages


#: One GPU of each kind that the kernels are compiled for in tests, by the name that its compiler gives the kind.
KNOWN = {
    "sm_80": Target("cuda", 80, 163 * KIB, 108),  # A100
    "sm_90": Target("cuda", 90, 227 * KIB, 132),  # H100, H200
    "sm_100": Target("cuda", 100, 227 * KIB, 148),  # B200
    "sm_120": Target("cuda", 120, 99 * KIB, 170),  # RTX 5090
    "gfx942": Target("hip", 0, 64 * KIB, 304),  # MI300X
}

#: Stands for a device without a driver, on which Triton's interpreter runs: with one multiprocessor sums are cut least.
STAND_IN = Target("cuda", 90, 227 * KIB, 1)


def target_of(device: torch.device) -> Target:
    """The target of a device; the stand-in of a CPU, where only the interpreter launches.

    Launchers call it as ``targets.target_of``, so that one place is to patch where they shall plan for another GPU.
    """
    return _of_gpu(device.index) if device.type == "cuda" else STAND_IN


@cache
def _of_gpu(index: int) -> Target:
    properties = driver.active.utils.get_device_properties(index)  # Triton refuses a launch by the same numbers
    hip = torch.version.hip is not None
    major, minor = torch.cuda.get_device_capability(index)
    return Target(
        backend="hip" if hip else "cuda",
        capability=0 if hip else 10 * major + minor,
        shared_memory=properties["max_shared_mem"],
        multiprocessors=properties["multiprocessor_count"],
    )


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: ``triton.cdiv`` takes microseconds, as it also serves inside kernels."""
    return -(-a // b)


def rank_block(rank: int) -> int:
    """The width of a tile that holds a rank: a power of two, and at least 16, the least that a dot takes."""
    return max(16, triton.next_power_of_2(rank))

"""The GPUs that kernels are compiled for, and what their binaries show that matters for speed.

The disassemblers come with the triton wheel.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

#: What we compile for, and the shared memory that one program may have there, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}

#: The instructions that multiply matrices of 16-bit operands.
TENSOR_CORE = {"sm_80": r"HMMA", "sm_90": r"HGMMA", "sm_100": r"UTCHMMA", "sm_120": r"HMMA", "gfx942": r"v_mfma"}


@dataclass
class Binary:
    """What a compiled kernel uses."""

    shared: int  # bytes of shared memory
    spilled: int  # bytes of registers spilled to memory
    registers: int
    code: str  # the disassembly


def read_binary(compiled: CompiledKernel, target: str) -> Binary:
    """What a kernel that was compiled for a target in TARGETS uses, and its disassembly."""
    return _read_amd(compiled) if target.startswith("gfx") else _read_nvidia(compiled)


def _read_amd(compiled: CompiledKernel) -> Binary:
    code = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s*(\d+)", code).group(1))

    # Scalar registers are spilled to lanes of vector registers, never to memory unless these are spilled in turn.
    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Binary(compiled.metadata.shared, spilled, number("vgpr_count"), code)


def _read_nvidia(compiled: CompiledKernel) -> Binary:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        command = [tool, "-res-usage", "-sass", file]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", code).groups())
    return Binary(compiled.metadata.shared, stack, registers, code)

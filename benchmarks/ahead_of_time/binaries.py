"""The GPUs that kernels are compiled for, and the properties of binaries that matter for speed.

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

from sibo_triton.kernels.targets import KNOWN

#: The targets as Triton's compiler takes them, and the shared memory in bytes that a program may have there.
TARGETS = {
    name: (GPUTarget("hip", name, 64) if target.hip else GPUTarget("cuda", target.capability, 32), target.shared_memory)
    for name, target in KNOWN.items()
}

#: The instructions that multiply matrices of 16-bit operands.
TENSOR_CORE = {"sm_80": r"HMMA", "sm_90": r"HGMMA", "sm_100": r"UTCHMMA", "sm_120": r"HMMA", "gfx942": r"v_mfma"}


@dataclass
class Binary:
    """The resources and the code of a compiled kernel."""

    shared: int  # bytes of shared memory
    spilled: int  # bytes of registers spilled to memory
    registers: int
    code: str  # the disassembly
    unset: list[str]  # instructions that read a uniform register never set before; sm_90 only


def read_binary(compiled: CompiledKernel, target: str) -> Binary:
    """The resources of a kernel compiled for a target in TARGETS, and its disassembly."""
    if target.startswith("gfx"):
        return _read_amd(compiled)
    binary = _read_nvidia(compiled)
    if target == "sm_90":  # where the assembler was seen to err; other targets have instructions that are unknown here
        binary.unset = unset_registers(binary.code)
    return binary


def _read_amd(compiled: CompiledKernel) -> Binary:
    code = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s*(\d+)", code).group(1))

    # Scalar registers are spilled to lanes of vector registers, never to memory unless these are spilled in turn.
    spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    return Binary(compiled.metadata.shared, spilled, number("vgpr_count"), code, [])


def _read_nvidia(compiled: CompiledKernel) -> Binary:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        command = [tool, "-res-usage", "-sass", file]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", code).groups())
    return Binary(compiled.metadata.shared, stack, registers, code, [])


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z0-9_.]+)\s*([^;]*);")


def unset_registers(code: str) -> list[str]:
    """Instructions that read a uniform register before any instruction, in the order of the code, has set it.

    ptxas 12.8, which comes with Triton 3.6 and 3.7, wrote such code for sm_90: the second of several matrix products
    took the address of its operand from an uninitialised register. An H100 then read other shared memory, or
    reported an illegal access.
    """
    written, wrong = set[int](), []
    for opcode, rest in _INSTRUCTION.findall(code):
        operands = [operand.strip() for operand in rest.split(",")]
        names = opcode.split(".")
        wide = "64" in names
        results = []
        if re.fullmatch(r"UR\d+", operands[0]):
            first = int(operands.pop(0)[2:])
            results = list(range(first, first + (4 if "128" in names else 2 if wide or "WIDE" in names else 1)))
        read = []
        for operand in operands:
            for kind, number in re.findall(r"(g?desc)\[UR(\d+)\]", operand):
                first = int(number)
                if kind == "desc":
                    read += [first, first + 1]
                elif names[0] == "HGMMA":  # two addresses, of which the first is read unless that operand is a register
                    read += range(first + (2 if re.match(r"R\d", operands[1]) else 0), first + 4)
                else:
                    read.append(first)
            for number in re.findall(r"(?<!desc\[)\bUR(\d+)", operand):
                read += [int(number), int(number) + 1] if wide and names[0] == "UIADD3" else [int(number)]
        if not written.issuperset(read):
            wrong.append(f"{opcode} {rest.strip()}")
        written.update(results)
    return wrong

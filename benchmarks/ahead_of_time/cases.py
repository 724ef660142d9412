"""Every launch whose kernels must fit every target, and the requirements on them.

`make compile-check` goes through all of them, `tests/kernels_compiled/test_without_gpu.py` through a few. The launches
are classes of `tests/`, which must be on the path.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product

import torch
from gradient_launches import InputGradient, UpBackward, WeightGradient
from kernel_launches import SHORT, Activated, Down, Launch, LowRank, Up
from triton.compiler import CompiledKernel

from benchmarks.ahead_of_time.binaries import TARGETS, TENSOR_CORE, Binary, read_binary
from benchmarks.ahead_of_time.without_gpu import compiling_for

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

RANKS = (16, 64, 128, 256, 512)
#: Dtypes of the activations and the adapter. If both are float32, tensor cores are not used, as in torch unless
#: `torch.set_float32_matmul_precision` allows them.
DTYPES = ((BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (FP32, FP32))
#: A Llama-3-8B layer: 8192 tokens, 4096 features on either side.
TOKENS, WIDTH = 8192, 4096
WIDE = 14336  # the feed-forward network's width, where tiles may be wider
SIBLINGS = 3  # q, k and v
BOTTLENECKS = (64, 256, 1024)
NARROW = "narrow"

NVIDIA_LOAD, AMD_LOAD = r"LDG(STS)?\.E\S*", r"(buffer|global)_load_"
LOAD_128 = {"sm": NVIDIA_LOAD + r"\.128\b", "gfx": AMD_LOAD + r"dwordx4\b"}
LOAD_16 = {"sm": NVIDIA_LOAD + r"\.U16\b", "gfx": AMD_LOAD + r"(ushort|short_d16)"}


@dataclass(frozen=True)
class Case:
    """One launch, whose kernels must fit all targets."""

    kind: str
    rank: int
    dtypes: tuple[torch.dtype, torch.dtype]
    options: str  # what else distinguishes it, for the reader
    launch: Launch

    def __str__(self) -> str:
        x, adapter = (SHORT[dtype] for dtype in self.dtypes)
        return f"{self.kind}, rank {self.rank}, {x}/{adapter}" + (f", {self.options}" if self.options else "")


@dataclass
class Row:
    """The resources of one kernel of a case on a target."""

    target: str
    case: str
    kernel: str
    tiles: str = ""
    warps: int = 0
    stages: int = 0
    registers: int = 0
    shared: int = 0  # bytes
    spilled: int = 0  # bytes
    tensor_cores: bool = False  # whether it multiplies with them
    loads_128: bool = False  # whether it loads 16 bytes at a time
    loads_16: int = 0  # instructions that load 2 bytes
    violation: str = ""


COLUMNS = [column.name for column in fields(Row)]


def _of(*named: tuple[str, bool]) -> str:
    return ", ".join(name for name, applies in named if applies)


def _down(rank: int, dtypes: tuple) -> Iterator[Case]:
    for siblings in (1, SIBLINGS):
        for mixes, difference in ((False, False), (True, False), (True, True)):
            for p in (0.0, 0.1):
                options = _of(("mixing", mixes), ("d", difference), ("dropout", p > 0), ("grouped", siblings > 1))
                lambda_ = 0.3 if mixes else 0.0
                ranks = (rank,) * siblings
                launch = Down(TOKENS, WIDTH, ranks, *dtypes, lambda_, p, difference, lambda_is_tensor=mixes)
                if siblings == 1 or mixes or p == 0:
                    yield Case("down", rank, dtypes, options, launch)


def _up(rank: int, dtypes: tuple) -> Iterator[Case]:
    for adds, has_bias in ((False, False), (False, True), (True, False)):
        options = _of(("added", adds), ("bias", has_bias))
        yield Case("up", rank, dtypes, options, Up(TOKENS, WIDTH, rank, *dtypes, adds, has_bias))


def _low_rank(rank: int, dtypes: tuple) -> Iterator[Case]:
    """With few rows K is split, and the parts are added when y is computed."""
    for rows, mixes, has_bias in ((8, False, False), (8, True, True), (64, True, True)):
        launch = LowRank(rows, WIDTH, WIDTH, (rank,) * SIBLINGS, *dtypes, 0.3 * mixes, has_bias=has_bias)
        options = _of(("mixing", mixes), ("bias", has_bias), (f"{rows} rows", True))
        yield Case("low_rank", rank, dtypes, options, launch)


def _up_backward(rank: int, dtypes: tuple) -> Iterator[Case]:
    for name, wants in (("u", (True, False)), ("dB", (False, True))):
        yield Case("up_backward", rank, dtypes, name, UpBackward(TOKENS, WIDTH, (rank,), *dtypes, wants))
    if rank == min(RANKS):  # larger ranks go through dY twice, as for u and dB alone
        yield Case("up_backward", rank, dtypes, "u and dB", UpBackward(TOKENS, WIDTH, (rank,), *dtypes))
        if dtypes in DTYPES[:2]:
            yield Case("up_backward", 32, dtypes, "u and dB", UpBackward(TOKENS, WIDTH, (32,), *dtypes))
            yield Case("up_backward", rank, dtypes, "u and dB, wide", UpBackward(TOKENS, WIDE, (rank,), *dtypes))


def _down_backward(rank: int, dtypes: tuple) -> Iterator[Case]:
    for siblings, p in product(range(1, SIBLINGS + 1), (0.0, 0.1)):
        ranks = (rank,) * siblings
        group = _of(("pair", siblings == 2), ("triple", siblings == 3), ("dropout", p > 0))
        for mixes in (False, True):
            launch = WeightGradient(TOKENS, WIDTH, ranks, *dtypes, 0.3 * mixes, p, lambda_is_tensor=mixes)
            yield Case("down_weight_gradient", rank, dtypes, _of(("mixing", mixes), (group, group != "")), launch)
        for adds in (True, False):
            wants = "mixing, added" if adds and siblings == 1 else "mixing, with dh0" if not adds else "mixing"
            adds &= siblings == 1
            launch = InputGradient(TOKENS, WIDTH, ranks, *dtypes, 0.3, p, adds, "dh0" in wants, lambda_is_tensor=True)
            yield Case("down_input_gradient", rank, dtypes, _of((wants, True), (group, group != "")), launch)


def _fixed_lambda(rank: int, dtypes: tuple) -> Iterator[Case]:
    """lambda as a number, the default, where the cases above have a tensor."""
    for siblings, p in product((1, SIBLINGS), (0.0, 0.1)):
        ranks, group = (rank,) * siblings, _of(("triple", siblings > 1), ("dropout", p > 0))
        for name, launch in (
            ("down", Down(TOKENS, WIDTH, ranks, *dtypes, 0.3, p)),
            ("dA", WeightGradient(TOKENS, WIDTH, ranks, *dtypes, 0.3, p)),
            ("dx", InputGradient(TOKENS, WIDTH, ranks, *dtypes, 0.3, p)),
        ):
            yield Case("fixed lambda", rank, dtypes, _of((name, True), (group, group != "")), launch)


def _bottleneck(size: int, dtypes: tuple) -> Iterator[Case]:
    """What bottleneck adapters need of the kernels beyond LoRA, in training and with few rows."""
    kind = "bottleneck"
    for rows, p in ((TOKENS, 0.0), (TOKENS, 0.1), (64, 0.1)):
        options = _of(("down", True), ("mixing", p > 0), ("dropout", p > 0), (f"{rows} rows", rows < TOKENS))
        launch = Activated(rows, WIDTH, (size,), *dtypes, "tanh", 0.3 if p else 0.0, p)
        yield Case(kind, size, dtypes, options, launch)
    for p, difference in product((0.0, 0.1), (False, True)):
        options = _of(("down, mixing, pair", True), ("d", difference), ("dropout", p > 0))
        launch = Activated(TOKENS, WIDTH, (size,) * 2, *dtypes, "tanh", 0.3, p, difference=difference)
        yield Case(kind, size, dtypes, options, launch)
    for activation in ("gelu", "silu", "relu"):
        yield Case(
            kind, size, dtypes, f"down, {activation}", Activated(TOKENS, WIDTH, (size,), *dtypes, activation, 0.3)
        )
    for siblings in (1, 2):  # in series dx is added to the frozen layer's, once for the pair
        launch = InputGradient(TOKENS, WIDTH, (size,) * siblings, *dtypes, 0.3, 0.0, adds=True)
        yield Case(kind, size, dtypes, _of(("dx, added", True), ("pair", siblings > 1)), launch)
    yield Case(kind, size, dtypes, "up", Up(TOKENS, WIDTH, size, *dtypes, adds=True, has_bias=True))
    for rank, activation in ((size, "tanh"), (size, "gelu"), (16, "tanh")):
        if rank == size or size == min(BOTTLENECKS):
            launch = UpBackward(TOKENS, WIDTH, (rank,), *dtypes, wants_sum=True, activation=activation)
            yield Case(kind, rank, dtypes, f"up backward, {activation}", launch)


def _narrow(rank: int, dtypes: tuple) -> Iterator[Case]:
    """Ranks whose matrices are too narrow for 16-byte loads; at rank 1 the other side is contiguous."""
    for name, launch in (
        ("down", Down(TOKENS, WIDTH, (rank,) * SIBLINGS, *dtypes, 0.3, 0.1)),
        ("up", Up(TOKENS, WIDTH, rank, *dtypes)),
        ("up backward", UpBackward(TOKENS, WIDTH, (rank,), *dtypes)),
        ("up backward of few rows", UpBackward(130, WIDTH, (rank,), *dtypes)),
        ("dA", WeightGradient(TOKENS, WIDTH, (rank,) * SIBLINGS, *dtypes, 0.3)),
        ("dx", InputGradient(TOKENS, WIDTH, (rank,), *dtypes, 0.3, 0.1)),
    ):
        yield Case(NARROW, rank, dtypes, name, launch)


CASES = [
    case
    for cases_of in (_down, _up, _low_rank, _up_backward, _down_backward)
    for rank in RANKS
    for dtypes in DTYPES
    for case in cases_of(rank, dtypes)
]
CASES += [case for size in BOTTLENECKS for dtypes in DTYPES for case in _bottleneck(size, dtypes)]
CASES += [case for rank in (16, 64) for dtypes in DTYPES for case in _fixed_lambda(rank, dtypes)]
CASES += [case for rank in (1, 8) for dtypes in DTYPES for case in _narrow(rank, dtypes)]


#: Every kernel, some with several options.
OF_EACH_KERNEL: list[Launch] = [
    Down(130, 200, (16, 3), BF16, FP32, 0.3, 0.1, difference=True, lambda_is_tensor=True, strides="padded"),
    Up(130, 200, 16, BF16, BF16, adds=True, strides="transposed"),
    LowRank(3, 800, 200, (16, 3), BF16, BF16, 0.3, 0.1, has_bias=True),
    UpBackward(130, 200, (16,), BF16, FP32, scaling_is_tensor=True),
    UpBackward(130, 200, (16, 3), BF16, BF16, grad_dtype=BF16),
    UpBackward(130, 200, (64,), BF16, BF16, wants_sum=True, activation="gelu"),
    Activated(130, 800, (24,), BF16, FP32, "silu", 0.3, 0.1),
    WeightGradient(130, 200, (24,), BF16, BF16, 0.3, 0.1),
    WeightGradient(130, 200, (24, 16), BF16, BF16, 0.3, grad_dtype=BF16),
    InputGradient(130, 200, (16,), BF16, BF16, p=0.1, adds=True, strides="padded"),
    InputGradient(130, 200, (16, 3), BF16, BF16, p=0.1, wants_dh=True, last_is_plain=True),
]


def check(case: Case, target: str) -> list[Row]:
    """A row for each kernel of the launch; a failed compilation is a row too."""
    gpu, _ = TARGETS[target]
    rows = []
    try:
        with compiling_for(gpu) as compiled:
            case.launch.launch(case.launch.inputs("meta"))
    except Exception as error:  # whatever the compiler raises; the other cases must still be checked
        violation = f"does not compile: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        return [Row(target, str(case), case.kind, violation=violation)]
    for kernel in compiled:
        binary = _read_once(kernel.kernel, target)
        has_few_rows = isinstance(case.launch, LowRank)  # multiplied by the instruction of sm_80
        loads = "gfx" if target.startswith("gfx") else "sm"
        row = Row(
            target,
            str(case),
            kernel.name,
            " ".join(f"{name}={size}" for name, size in kernel.tiles.items()),
            kernel.warps,
            kernel.stages,
            binary.registers,
            binary.shared,
            binary.spilled,
            bool(re.search(TENSOR_CORE[target] + ("|HMMA" if has_few_rows else ""), binary.code)),
            bool(re.search(LOAD_128[loads], binary.code)),
            len(re.findall(LOAD_16[loads], binary.code)),
        )
        has_dot = any(name.startswith("DOT_DTYPE") for name in kernel.constants)
        has_bias = isinstance(case.launch, Activated | Up | LowRank) and case.launch.has_bias
        row.violation = violation_of(row, has_dot and case.dtypes != (FP32, FP32), has_bias, case.kind == NARROW)
        if binary.unset:
            row.violation = "; ".join(filter(None, (row.violation, f"reads what nothing set: {binary.unset[0]}")))
        rows.append(row)
    return rows


_binaries: dict[str, Binary] = {}


def _read_once(kernel: CompiledKernel, target: str) -> Binary:
    """Some kernels, such as the one that adds parts, are the same in many cases."""
    if kernel.hash not in _binaries:  # the hash includes the target
        _binaries[kernel.hash] = read_binary(kernel, target)
    return _binaries[kernel.hash]


def violation_of(row: Row, multiplies_16_bit: bool, reads_vector: bool = False, narrow: bool = False) -> str:
    """What is wrong with a kernel; empty if nothing.

    A vector, which is short, may be read element by element, and so may a matrix of a narrow rank.
    """
    limit = TARGETS[row.target][1]
    wrong = {
        f"spills {row.spilled} bytes of registers": row.spilled > 0,
        f"wants {row.shared} bytes of shared memory, {row.target} has {limit}": row.shared > limit,
        "multiplies without tensor cores": multiplies_16_bit and not row.tensor_cores,
        "never loads 16 bytes at a time": not row.loads_128 and not narrow,
        f"loads 2 bytes at a time in {row.loads_16} places": row.loads_16 > 0 and not (reads_vector or narrow),
    }
    return "; ".join(text for text, is_wrong in wrong.items() if is_wrong)

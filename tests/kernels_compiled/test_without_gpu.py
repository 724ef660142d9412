"""Launches that compile without a GPU compile what a launch on one looks for, and what does not fit is named."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from kernel_launches import BF16, Up, name_of

from benchmarks.ahead_of_time.binaries import TARGETS
from benchmarks.ahead_of_time.cases import CASES, OF_EACH_KERNEL, Case, Row, check, violation_of
from benchmarks.ahead_of_time.without_gpu import compiling_for
from sibo_triton.kernels import up as up_module
from sibo_triton.kernels.up import up_kernel

pytestmark = pytest.mark.skipif(
    not isinstance(up_kernel, triton.JITFunction), reason="TRITON_INTERPRET=1: unset it to compile kernels"
)


@pytest.mark.parametrize("launch", OF_EACH_KERNEL, ids=name_of)
def test_tensors_with_memory_find_what_was_compiled_without(launch, tmp_path, monkeypatch):
    """In Triton's cache, by its own key: source, types, divisibility, constants, options and target."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gpu, _ = TARGETS["sm_90"]

    def compile_on(device):
        with compiling_for(gpu) as compiled:
            launch.launch(launch.inputs(device))
        files = {path.relative_to(tmp_path): path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
        return [kernel.kernel.hash for kernel in compiled], files

    hashes, files = compile_on("meta")
    assert hashes and len(files) == len(set(hashes))
    assert compile_on("cpu") == (hashes, files)


def test_another_divisibility_is_another_kernel():
    gpu, _ = TARGETS["sm_90"]
    hashes = set()
    for width in (200, 208):
        with compiling_for(gpu) as compiled:
            launch = Up(130, width, 16, BF16, BF16)
            launch.launch(launch.inputs("meta"))
        hashes |= {kernel.kernel.hash for kernel in compiled}
    assert len(hashes) == 2


def test_nothing_stays_changed():
    before = triton.runtime.jit.JITFunction.run, triton.runtime.jit.driver, torch.version.hip
    with pytest.raises(ZeroDivisionError), compiling_for(TARGETS["gfx942"][0]):
        assert triton.runtime.jit.driver is not before[1]
        raise ZeroDivisionError
    assert before == (triton.runtime.jit.JITFunction.run, triton.runtime.jit.driver, torch.version.hip)


GOOD = {"shared": 99 * 1024, "tensor_cores": True, "loads_128": True}


@pytest.mark.parametrize(
    ("found", "violation"),
    [
        ({}, ""),
        ({"spilled": 8}, "spills 8 bytes of registers"),
        ({"shared": 99 * 1024 + 1}, "wants 101377 bytes of shared memory, sm_120 has 101376"),
        ({"tensor_cores": False}, "multiplies without tensor cores"),
        ({"loads_128": False}, "never loads 16 bytes at a time"),
        ({"loads_16": 2}, "loads 2 bytes at a time in 2 places"),
        ({"spilled": 4, "tensor_cores": False}, "spills 4 bytes of registers; multiplies without tensor cores"),
    ],
)
def test_each_violation_is_named(found, violation):
    assert violation_of(Row("sm_120", "a case", "a kernel", **(GOOD | found)), multiplies_16_bit=True) == violation


def test_float32_throughout_need_not_use_tensor_cores():
    row = Row("sm_120", "a case", "a kernel", **(GOOD | {"tensor_cores": False}))
    assert violation_of(row, multiplies_16_bit=False) == ""


def test_a_bias_may_be_read_by_elements():
    row = Row("sm_120", "a case", "a kernel", **(GOOD | {"loads_16": 1}))
    assert violation_of(row, multiplies_16_bit=True, reads_vector=True) == ""


class Retiled:
    """A kernel that is launched at other tiles than the launcher chose."""

    def __init__(self, kernel, tiles):
        self.kernel, self.tiles = kernel, tiles

    def __getitem__(self, grid):
        return lambda **arguments: self.kernel[grid](**arguments | self.tiles)


@pytest.mark.parametrize(
    ("target", "tiles", "violation"),
    [
        ("sm_120", {"BM": 256, "BN": 256, "BR": 16, "num_warps": 4, "num_stages": 2}, "spills"),
        ("gfx942", {"BM": 256, "BN": 256, "BR": 16, "num_warps": 2, "num_stages": 2}, "spills"),
        (
            "sm_120",
            {"BM": 128, "BN": 128, "BR": 128, "num_warps": 8, "num_stages": 4},
            "bytes of shared memory, sm_120",
        ),
    ],
)
def test_tiles_that_do_not_fit_are_found(target, tiles, violation, monkeypatch):
    monkeypatch.setattr(up_module, "up_kernel", Retiled(up_kernel, tiles))
    case = Case("up", 512, (BF16, BF16), "", Up(8192, 4096, 512, BF16, BF16))
    (row,) = check(case, target)
    assert violation in row.violation and row.tiles.split()[0] == f"BM={tiles['BM']}"


def test_what_does_not_compile_is_named(monkeypatch):
    monkeypatch.setattr(up_module, "up_kernel", Retiled(up_kernel, {"BM": 7}))
    case = Case("up", 16, (BF16, BF16), "", Up(8192, 4096, 16, BF16, BF16))
    (row,) = check(case, "sm_80")
    assert row.violation.startswith("does not compile: ") and row.kernel == "up"


def test_names_of_cases_differ():
    assert len({str(case) for case in CASES}) == len(CASES)


#: One of each kind for each target, far apart in the list.
KINDS = sorted({case.kind for case in CASES})
FEW = [
    (cases[(31 * i + 17 * j) % len(cases)], target)
    for i, kind in enumerate(KINDS)
    for j, target in enumerate(TARGETS)
    for cases in ([case for case in CASES if case.kind == kind],)
]


@pytest.mark.parametrize(("case", "target"), FEW, ids=str)
def test_every_kernel_fits_its_target(case, target):
    """All of them: make compile-check."""
    rows = check(case, target)
    assert rows and not [row.violation for row in rows if row.violation]

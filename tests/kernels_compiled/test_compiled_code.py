"""Kernels compiled at the tiles that a launch would choose: those nearest to what a target has, and their code.

`test_without_gpu.py` draws from the cases of `make compile-check`; here are some by name, and what else binaries show.
"""

import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from gradient_launches import InputGradient, UpBackward, WeightGradient
from kernel_launches import BF16, FP16, FP32, Activated, Down, Up, name_of

from benchmarks.ahead_of_time.binaries import TARGETS, read_binary, unset_registers
from benchmarks.ahead_of_time.cases import TOKENS, WIDTH, Case, check
from benchmarks.ahead_of_time.without_gpu import compiling_for
from sibo_triton.kernels.partial_sums import sum_parts
from sibo_triton.kernels.up import up_kernel

pytestmark = pytest.mark.skipif(
    not isinstance(up_kernel, triton.JITFunction), reason="TRITON_INTERPRET=1: unset it to compile kernels"
)

BY_TENSOR = {"lambda_is_tensor": True}


def down(ranks, *dtypes, difference=False, p=0.1, **rest):
    return Down(TOKENS, WIDTH, ranks, *dtypes, 0.3, p, difference, **BY_TENSOR | rest)


def weight_gradient(ranks, *dtypes, p=0.1):
    return WeightGradient(TOKENS, WIDTH, ranks, *dtypes, 0.3, p, **BY_TENSOR)


def input_gradient(ranks, *dtypes, p=0.1, **rest):
    return InputGradient(TOKENS, WIDTH, ranks, *dtypes, 0.3, p, **BY_TENSOR | rest)


def up_backward(rank, *dtypes, wants=(True, True), **rest):
    return UpBackward(TOKENS, WIDTH, (rank,), *dtypes, wants, **rest)


NEAR_THE_LIMIT = [
    ("gfx942", down((64,), BF16, BF16, p=0.0)),  # the most shared memory where there is least
    ("sm_80", down((512,), FP16, FP32, difference=True)),  # two times three dots
    ("sm_120", down((64,), FP16, FP32, difference=True)),  # the most registers
    ("sm_90", down((16, 8, 16), BF16, FP32, difference=True)),
    ("gfx942", down((16, 4, 64), BF16, FP32)),
    ("sm_90", down((64,), FP32, FP32, difference=True)),
    ("sm_90", Activated(TOKENS, WIDTH, (256,), BF16, BF16, "gelu", 0.3)),
    ("sm_120", Activated(TOKENS, WIDTH, (1024,), BF16, FP32, "tanh", 0.3, 0.1)),
    ("sm_120", Activated(TOKENS, WIDTH, (256, 256), BF16, FP32, "tanh", 0.3, 0.1, difference=True)),
    ("sm_120", up_backward(16, BF16, BF16, activation="gelu_pytorch_tanh", wants_sum=True)),
    ("sm_90", input_gradient((256, 256), BF16, BF16, adds=True)),  # in series, gate and up
    ("sm_80", Up(TOKENS, WIDTH, 256, BF16, FP32, adds=True)),
    ("gfx942", Up(TOKENS, WIDTH, 512, FP16, FP32, adds=True, has_bias=True)),
    ("sm_80", up_backward(32, BF16, BF16)),
    ("gfx942", up_backward(16, FP16, FP32)),
    ("gfx942", up_backward(512, BF16, BF16, wants=(False, True))),
    ("sm_80", up_backward(32, BF16, BF16, activation="gelu", wants_sum=True)),
    ("sm_90", up_backward(256, BF16, FP32, activation="tanh", wants_sum=True)),
    ("sm_120", weight_gradient((64,), FP16, FP32)),
    ("sm_80", weight_gradient((16, 16, 16), FP16, FP32, p=0.0)),  # a tile for all three
    ("sm_100", weight_gradient((128, 16, 128), BF16, FP32)),
    ("sm_90", input_gradient((16, 16, 16), BF16, BF16, wants_dh=True)),  # three sums
    ("sm_80", input_gradient((512, 128), FP16, FP32, p=0.0)),
    ("sm_90", input_gradient((64,), FP32, FP32, p=0.0, adds=True)),
]


@pytest.mark.parametrize(("target", "launch"), NEAR_THE_LIMIT, ids=lambda of: of if of in TARGETS else name_of(of))
def test_it_fits(target, launch):
    rows = check(Case(type(launch).__name__, 0, dtypes_of(launch), "", launch), target)
    assert rows and not [row.violation for row in rows if row.violation]


def dtypes_of(launch):
    """Of the activations and of the adapter."""
    names = ("x_dtype", "y_dtype", "g_dtype"), ("a_dtype", "b_dtype")
    return tuple(next(getattr(launch, name) for name in of if hasattr(launch, name)) for of in names)


def binaries_of(launch, target="sm_90"):
    with compiling_for(TARGETS[target][0]) as compiled:
        launch.launch(launch.inputs("meta"))
    return {kernel.name: read_binary(kernel.kernel, target) for kernel in compiled}


def products(binary, rows_and_columns):
    """wgmma instructions of Hopper for so many rows, columns, and 16 of what is summed over."""
    return len(re.findall(rf"HGMMA\.{rows_and_columns}x16\.F32\.BF16", binary.code))


@pytest.mark.parametrize("dtypes", [(FP16, FP32), (BF16, FP32)])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_assembler_sets_every_register_it_reads(rank, dtypes):
    """It did not at rank 1 in one pass over dY, where both sides are in parts."""
    for binary in binaries_of(UpBackward(130, 63, (rank,), *dtypes)).values():
        assert not binary.unset


def test_a_register_that_nothing_set_is_found():
    """As an H100 met it: the second of the row takes its operand's address from UR6."""
    wrong = """
        /*42a0*/                   UMOV UR10, 0x5 ;  /* 0x */
        /*42b0*/                   UMOV UR11, 0x40000040 ;
        /*42d0*/                   HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR8], RZ, !UPT ;
        /*42e0*/                   UIADD3 UR4, UP0, UR6, 0x2, URZ ;
        /*42f0*/              @!UP0 UIADD3.64 UR14, UR10, 0x2, URZ ;
        /*4300*/                   STG.E.128 desc[UR10][R2.64+UR4], R4 ;
    """
    assert unset_registers(wrong) == ["UIADD3 UR4, UP0, UR6, 0x2, URZ"]
    assert unset_registers(wrong.replace("UR6", "UR11")) == []
    assert unset_registers(wrong.replace("R24, R32, gdesc", "R24, gdesc"))[0].startswith("HGMMA")  # UR8, too
    assert unset_registers(wrong.replace("desc[UR10][R2", "desc[UR11][R2"))[-1].startswith("STG")  # UR12


@pytest.mark.parametrize(
    ("a_dtype", "mixes", "count"),
    [
        (BF16, False, 4),  # of 16 columns in a tile
        (BF16, True, 2 * 4),  # x and h0
        (FP32, True, 2 * 2 * 4),  # by A's high and low part
    ],
)
def test_products_of_a_step(a_dtype, mixes, count):
    lambda_ = {"lambda_is_tensor": True} if mixes else {"lambda_": 0.0}
    (binary,) = binaries_of(Down(TOKENS, WIDTH, (16,), BF16, a_dtype, **lambda_)).values()
    assert products(binary, "64x16") == count and binary.spilled == 0
    assert "LDGSTS.E.BYPASS.128" in binary.code, "straight to shared memory"


@pytest.mark.parametrize(("b_dtype", "dots"), [(BF16, 1), (FP32, 3)])
def test_up_multiplies_as_often_as_its_dtypes_need(b_dtype, dots):
    (binary,) = binaries_of(Up(TOKENS, WIDTH, 16, BF16, b_dtype, adds=True)).values()
    assert products(binary, "64x128") == dots
    assert "STG.E.128" in binary.code and not re.search(r"STG\.E(\.U16|\.64)?\s", binary.code)


@pytest.mark.parametrize("ranks", [(16,), (16, 16, 16)])
def test_products_without_dropout_and_dh0_have_one_sum(ranks):
    """One product for each sibling, and no tile of its own."""
    (binary,) = binaries_of(InputGradient(TOKENS, WIDTH, ranks, BF16, BF16, **BY_TENSOR)).values()
    assert products(binary, "64x128") == len(ranks)
    assert binary.spilled == 0 and binary.registers <= 128


def test_float32_below_highest_uses_tensor_cores():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        (binary,) = binaries_of(Down(TOKENS, WIDTH, (16,), FP32, FP32, 0.0)).values()
    finally:
        torch.set_float32_matmul_precision(before)
    assert products(binary, "64x16") == 3 * 2 and binary.spilled == 0


@pytest.mark.parametrize(
    "launch",
    [
        Down(40, 4095, (16,), BF16, BF16),
        WeightGradient(TOKENS, 4095, (16,), BF16, BF16),
        Activated(40, 4095, (24,), BF16, BF16, "silu"),
    ],
    ids=name_of,
)
def test_odd_widths_compile(launch):
    """They load 2 bytes at a time and may spill; they are multiplied by tensor cores all the same."""
    (binary, *_) = binaries_of(launch).values()
    assert "HGMMA" in binary.code


def test_second_stage_is_one_kernel_whatever_the_number_of_parts():
    """16 parts, or 1, in a tuple would compile another."""
    gpu, _ = TARGETS["sm_90"]
    hashes = set()
    for parts in ((16, 1), (17, 1), (2, 3), (1, 32)):
        with compiling_for(gpu) as compiled:
            sum_parts([torch.empty(n, 256, device="meta") for n in parts], [BF16, BF16])
        hashes |= {kernel.kernel.hash for kernel in compiled}
    assert len(hashes) == 1

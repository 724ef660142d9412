"""The kernels of the down-projection's gradients, compiled at the tiles that a launch would choose."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from ahead_of_time import POINTER, TARGETS, TENSOR_CORE, compile_for

from sibo_triton.kernels import down_input_gradient, down_weight_gradient
from sibo_triton.kernels.down_input_gradient import down_input_gradient_kernel
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient_kernel
from sibo_triton.kernels.targets import KNOWN

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

pytestmark = pytest.mark.skipif(
    not isinstance(down_input_gradient_kernel, triton.JITFunction),
    reason="TRITON_INTERPRET=1: unset it to compile kernels",
)


def compile_kernel(target, kernel, ranks, config, arguments, constants):
    config = dict(config)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    of_launch = {name for name, kind in arguments.items() if "constexpr" not in kind}
    aligned = {name for name in of_launch if name.startswith(("p_", "stride_", "keep", "first")) or name == "K"}
    aligned |= {"r"} & set(arguments) if all(rank % 16 == 0 for rank in ranks) else set()
    return compile_for(target, kernel, arguments, constants | config, frozenset(aligned), options)


def compile_weight_gradient(target, ranks, dtype, a_dtype, dropout, mixes=True, k=4096):
    """A launch on contiguous activations of a usual width, with lambda a tensor."""
    n = len(ranks)
    chosen = down_weight_gradient.plan(ranks, dtype, dtype if mixes else None, (a_dtype, mixes, dropout), KNOWN[target])
    product, product_h = chosen.product, chosen.product_h
    arguments = {
        "p_x": POINTER[dtype],
        **dict.fromkeys(("p_u", "p_partial"), (POINTER[FP32],) * n),
        "lambda_": (POINTER[FP32] if mixes else "fp32",) * n,
        **dict.fromkeys(("r", "first"), ("i32",) * n),
        **dict.fromkeys(("M", "r_tiles", "stride_x_m"), "i32"),
    }
    arguments |= {"p_initial_residual": POINTER[dtype], "stride_h_m": "i32"} if mixes else {}
    of_dropout = {"p_seed": ("*i64",) * n, "keep_from": ("i32",) * n, "dropout_scale": ("fp32",) * n}
    arguments |= of_dropout if dropout else {}
    constants = {
        "stride_x_k": 1,
        "stride_h_k": 1 if mixes else 0,
        "K": k,
        "STEPS": 8,
        "SIBLINGS": n,
        "SHARES_TILES": chosen.shares_tiles,
        "HAS_INITIAL_RESIDUAL": mixes,
        "LAMBDA_IS_TENSOR": (mixes,) * n,
        "HAS_DROPOUT": dropout,
        "MIX_FIRST": chosen.mix_first,
        "SPLIT_X": product.split_a,
        "SPLIT_U": product.split_b,
        "DOT_DTYPE": product.tl_dtype,
        "SPLIT_H": product_h.split_a,
        "SPLIT_U_H": product_h.split_b,
        "DOT_DTYPE_H": product_h.tl_dtype,
    }
    constants |= {} if mixes else {"p_initial_residual": None, "stride_h_m": 0}
    constants |= {} if dropout else dict.fromkeys(of_dropout)
    return compile_kernel(target, down_weight_gradient_kernel, ranks, chosen.config, arguments, constants)


def compile_input_gradient(target, ranks, dtype, a_dtype, dropout, accumulate=True, wants_dh=False):
    n = len(ranks)
    sums = 1 if n == 1 else 1 + wants_dh + (wants_dh or dropout)
    chosen = down_input_gradient.plan(ranks, a_dtype, frozenset([dtype]), sums, KNOWN[target])
    product = chosen.operands
    arguments = {
        "p_dx": POINTER[dtype],
        "p_u": (POINTER[FP32],) * n,
        "p_lora_a": (POINTER[a_dtype],) * n,
        "p_seed": ("*i64" if dropout else "constexpr",) * n,
        "lambda_": (POINTER[FP32],) * n,
        "keep_from": ("i32",) * n,
        "dropout_scale": ("fp32",) * n,
        "stride_a_r": ("i32",) * n,
        "stride_a_k": ("constexpr",) * n,
        **dict.fromkeys(("M", "K", "stride_dx_m"), "i32"),
    }
    arguments |= {"p_dh": POINTER[dtype]} if wants_dh else {}
    constants = {
        "stride_a_k": (1,) * n,
        "stride_dx_k": 1,
        "R": ranks,
        "SIBLINGS": n,
        "MIXES": (True,) * n,
        "LAMBDA_IS_TENSOR": (True,) * n,
        "HAS_DROPOUT": (dropout,) * n,
        "OWN_SUM": (dropout or wants_dh,) * n,
        "HAS_DX": True,
        "ACCUMULATE": accumulate,
        "HAS_DH": wants_dh,
        "SPLIT_U": product.split_a,
        "SPLIT_A": product.split_b,
        "DOT_DTYPE": product.tl_dtype,
    }
    constants |= {} if dropout else {"p_seed": (None,) * n}
    constants |= {} if wants_dh else {"p_dh": None}
    return compile_kernel(target, down_input_gradient_kernel, ranks, chosen.config, arguments, constants)


def assert_fits(binary, target, x_dtype, tensor_cores):
    assert binary.spilled == 0
    assert binary.shared <= TARGETS[target][1]
    if tensor_cores:
        assert re.search(TENSOR_CORE[target], binary.code)
    # Every access to a 16-bit matrix of [M, K] is of 16 bytes.
    if target.startswith("sm"):
        assert re.search(r"LDG(STS)?\.E(\.BYPASS)?(\.[A-Z]+)*\.128", binary.code)
        if x_dtype != FP32:
            assert not re.search(r"(LDG|LDGSTS|STG)\.E(\.BYPASS)?\.U16|LDGSTS\.E(\.BYPASS)?\.64", binary.code)
    else:
        assert re.search(r"(buffer|global)_load_dwordx4", binary.code)


WEIGHT_CASES = [
    ("sm_80", (64,), FP16, FP32, True),
    ("sm_120", (64,), FP16, FP32, True),  # the most registers
    ("sm_90", (16,), BF16, FP32, True),
    ("sm_90", (16,), BF16, BF16, False),
    ("sm_90", (512,), BF16, BF16, True),
    ("sm_90", (64,), FP32, FP32, True),
    ("gfx942", (32,), BF16, BF16, True),
    ("gfx942", (512,), FP16, FP32, False),
    ("sm_80", (16, 16, 16), FP16, FP32, False),  # a tile for all three
    ("sm_90", (16, 8, 16), BF16, BF16, False),
    ("sm_120", (16, 16), BF16, BF16, False),
    ("gfx942", (16, 16, 16), BF16, BF16, False),
    ("sm_100", (128, 16, 128), BF16, FP32, True),
]


@pytest.mark.parametrize(("target", "ranks", "dtype", "a_dtype", "dropout"), WEIGHT_CASES)
def test_weight_gradient_fits_its_target(target, ranks, dtype, a_dtype, dropout):
    binary = compile_weight_gradient(target, ranks, dtype, a_dtype, dropout)
    assert_fits(binary, target, dtype, tensor_cores=dtype != FP32)


INPUT_CASES = [
    ("sm_80", (128,), BF16, FP32, False),
    ("sm_90", (16,), BF16, FP32, True),
    ("sm_90", (512,), FP16, FP16, False),
    ("gfx942", (16,), BF16, BF16, True),
    ("sm_90", (16, 16, 16), BF16, BF16, True),  # three sums
    ("sm_100", (16, 8, 16), BF16, FP32, True),
    ("sm_80", (512, 128), FP16, FP32, False),
    ("gfx942", (64, 64, 64), FP16, FP16, False),
]


@pytest.mark.parametrize(("target", "ranks", "dtype", "a_dtype", "dropout"), INPUT_CASES)
def test_input_gradient_fits_its_target(target, ranks, dtype, a_dtype, dropout):
    binary = compile_input_gradient(target, ranks, dtype, a_dtype, dropout, len(ranks) == 1, wants_dh=ranks[0] == 16)
    assert_fits(binary, target, dtype, tensor_cores=dtype != FP32)


@pytest.mark.parametrize(("ranks", "products"), [((16,), 1), ((16, 16, 16), 3)])
def test_products_without_dropout_and_dh0_have_one_sum(ranks, products):
    """On Hopper, of 64 rows, 128 columns and 16 of the rank: one product for each sibling, and no tile of its own."""
    binary = compile_input_gradient("sm_90", ranks, BF16, BF16, dropout=False, accumulate=False)
    assert len(re.findall(r"HGMMA\.64x128x16\.F32\.BF16", binary.code)) == products
    assert binary.spilled == 0 and binary.registers <= 128


def test_gradients_compile_for_an_odd_width():
    binary = compile_weight_gradient("sm_90", (16,), BF16, BF16, False, k=4095)
    assert binary.spilled == 0 and "HGMMA" in binary.code

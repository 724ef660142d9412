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


def compile_kernel(target, kernel, rank, config, arguments, constants):
    config = dict(config)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    aligned = {name for name in arguments if name.startswith(("p_", "stride_", "keep")) or name == "K"}
    aligned |= {"r"} & set(arguments) if rank % 16 == 0 else set()
    return compile_for(target, kernel, arguments, constants | config, frozenset(aligned), options)


def compile_weight_gradient(target, rank, dtype, a_dtype, dropout, mixes=True, k=4096):
    """A launch on contiguous activations of a usual width, with lambda a tensor."""
    chosen = down_weight_gradient.plan(rank, dtype, dtype if mixes else None, a_dtype, KNOWN[target])
    product, product_h = chosen.product, chosen.product_h
    arguments = {
        "p_u": POINTER[FP32],
        "p_x": POINTER[dtype],
        "p_partial": POINTER[FP32],
        "lambda_": POINTER[FP32] if mixes else "fp32",
        "keep_from": "i32",
        "scale": "fp32",
        **dict.fromkeys(("M", "r", "stride_x_m"), "i32"),
    }
    arguments |= {"p_initial_residual": POINTER[dtype], "stride_h_m": "i32"} if mixes else {}
    arguments |= {"p_seed": "*i64"} if dropout else {}
    constants = {
        "stride_x_k": 1,
        "stride_h_k": 1 if mixes else 0,
        "K": k,
        "STEPS": 8,
        "HAS_INITIAL_RESIDUAL": mixes,
        "LAMBDA_IS_TENSOR": mixes,
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
    constants |= {} if dropout else {"p_seed": None}
    return compile_kernel(target, down_weight_gradient_kernel, rank, chosen.config, arguments, constants)


def compile_input_gradient(target, rank, dtype, a_dtype, dropout, accumulate=True, wants_dh=False):
    chosen = down_input_gradient.plan(rank, a_dtype, frozenset([dtype]), KNOWN[target])
    product = chosen.operands
    arguments = {
        "p_u": POINTER[FP32],
        "p_lora_a": POINTER[a_dtype],
        "p_dx": POINTER[dtype],
        "lambda_": POINTER[FP32],
        "keep_from": "i32",
        "scale": "fp32",
        **dict.fromkeys(("M", "K", "stride_a_r", "stride_dx_m"), "i32"),
    }
    arguments |= {"p_seed": "*i64"} if dropout else {}
    arguments |= {"p_dh": POINTER[dtype]} if wants_dh else {}
    constants = {
        "stride_a_k": 1,
        "stride_dx_k": 1,
        "R": rank,
        "MIXES": True,
        "LAMBDA_IS_TENSOR": True,
        "HAS_DROPOUT": dropout,
        "HAS_DX": True,
        "ACCUMULATE": accumulate,
        "HAS_DH": wants_dh,
        "SPLIT_U": product.split_a,
        "SPLIT_A": product.split_b,
        "DOT_DTYPE": product.tl_dtype,
    }
    constants |= {} if dropout else {"p_seed": None}
    constants |= {} if wants_dh else {"p_dh": None}
    return compile_kernel(target, down_input_gradient_kernel, rank, chosen.config, arguments, constants)


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
    ("sm_80", 64, FP16, FP32, True),
    ("sm_120", 64, FP16, FP32, True),  # the most registers
    ("sm_90", 16, BF16, FP32, True),
    ("sm_90", 16, BF16, BF16, False),
    ("sm_90", 512, BF16, BF16, True),
    ("sm_90", 64, FP32, FP32, True),
    ("gfx942", 32, BF16, BF16, True),
    ("gfx942", 512, FP16, FP32, False),
]


@pytest.mark.parametrize(("target", "rank", "dtype", "a_dtype", "dropout"), WEIGHT_CASES)
def test_weight_gradient_fits_its_target(target, rank, dtype, a_dtype, dropout):
    binary = compile_weight_gradient(target, rank, dtype, a_dtype, dropout)
    assert_fits(binary, target, dtype, tensor_cores=dtype != FP32)


INPUT_CASES = [
    ("sm_80", 128, BF16, FP32, False),
    ("sm_90", 16, BF16, FP32, True),
    ("sm_90", 512, FP16, FP16, False),
    ("gfx942", 16, BF16, BF16, True),
]


@pytest.mark.parametrize(("target", "rank", "dtype", "a_dtype", "dropout"), INPUT_CASES)
def test_input_gradient_fits_its_target(target, rank, dtype, a_dtype, dropout):
    binary = compile_input_gradient(target, rank, dtype, a_dtype, dropout, wants_dh=rank == 16)
    assert_fits(binary, target, dtype, tensor_cores=dtype != FP32)


def test_gradients_compile_for_an_odd_width():
    binary = compile_weight_gradient("sm_90", 16, BF16, BF16, False, k=4095)
    assert binary.spilled == 0 and "HGMMA" in binary.code

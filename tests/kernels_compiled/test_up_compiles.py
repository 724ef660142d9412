"""The kernels of the up-projection and its gradients, compiled at the tiles that a launch would choose."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from ahead_of_time import POINTER, TARGETS, TENSOR_CORE, compile_for
from without_gpu import compiling_for

from sibo_triton.kernels import up, up_backward
from sibo_triton.kernels.partial_sums import BLOCK, BP, sum_parts, sum_parts_kernel
from sibo_triton.kernels.targets import KNOWN
from sibo_triton.kernels.up import up_kernel
from sibo_triton.kernels.up_backward import both_kernel, launch_of_both, product_kernel

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

pytestmark = pytest.mark.skipif(
    not isinstance(up_kernel, triton.JITFunction), reason="TRITON_INTERPRET=1: unset it to compile kernels"
)


def compile_at(target, kernel, config, arguments, constants, also_divisible=()):
    config = dict(config)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    aligned = {name for name in arguments if name.startswith(("p_", "stride_"))} | set(also_divisible)
    return compile_for(target, kernel, arguments, constants | config, frozenset(aligned), options)


def compile_up(target, rank, b_dtype, y_dtype, has_base, has_biases=False):
    """A launch on contiguous matrices, with the scaling a number."""
    chosen = up.plan(rank, b_dtype, y_dtype, KNOWN[target])
    dot = chosen.operands
    arguments = {
        "p_t": POINTER[FP32],
        "p_lora_b": POINTER[b_dtype],
        "p_y": POINTER[y_dtype],
        "scaling": "fp32",
        **dict.fromkeys(("M", "N", "stride_b_n"), "i32"),
    }
    constants = {
        "stride_b_r": 1,
        "R": rank,
        "HAS_LORA_BIAS": has_biases,
        "HAS_BASE_BIAS": has_biases,
        "HAS_BASE": has_base,
        "SCALING_IS_TENSOR": False,
        "SPLIT_T": dot.split_a,
        "SPLIT_B": dot.split_b,
        "DOT_DTYPE": dot.tl_dtype,
    }
    for name, dtype in (("lora_bias", b_dtype), ("base_bias", y_dtype)):
        constants[f"stride_{name}_n"] = int(has_biases)
        (arguments if has_biases else constants)[f"p_{name}"] = POINTER[dtype] if has_biases else None
    if has_base:
        arguments |= {"p_base": POINTER[y_dtype], "stride_base_m": "i32"}
        constants["stride_base_n"] = 1
    else:
        constants |= {"p_base": None, "stride_base_m": 0, "stride_base_n": 0}
    return compile_at(target, up_kernel, chosen.config, arguments, constants, ["N"])


def compile_both(target, rank, g_dtype, b_dtype, m=8192, n=4096):
    chosen = up_backward.plan(m, n, rank, g_dtype, b_dtype, KNOWN[target])
    dot_u, dot_grad_b = chosen.dot_u, chosen.dot_grad_b
    launch = launch_of_both(m, n, rank, dot_u, dot_grad_b, g_dtype.itemsize, KNOWN[target])
    arguments = {
        "p_grad_y": POINTER[g_dtype],
        "p_lora_b": POINTER[b_dtype],
        "p_t": POINTER[FP32],
        "p_u": POINTER[FP32],
        "p_grad_b": POINTER[FP32],
        "scaling": "fp32",
        **dict.fromkeys(("M", "N", "stride_g_m", "stride_b_n"), "i32"),
    }
    constants = {
        "stride_g_n": 1,
        "stride_b_r": 1,
        "R": rank,
        "SCALING_IS_TENSOR": False,
        "SPLIT_G_U": dot_u.split_a,
        "SPLIT_B": dot_u.split_b,
        "DOT_DTYPE_U": dot_u.tl_dtype,
        "SPLIT_G_B": dot_grad_b.split_a,
        "SPLIT_T": dot_grad_b.split_b,
        "DOT_DTYPE_B": dot_grad_b.tl_dtype,
    }
    return compile_at(target, both_kernel, launch.config, arguments, constants, ["N"])


def compile_product(target, rank, g_dtype, b_dtype, output, m=8192, n=4096):
    """Of the two passes, the one for u (of B) or for dB (of t, with dY transposed)."""
    chosen = up_backward.plan(m, n, rank, g_dtype, b_dtype, KNOWN[target])
    dot, launch = (chosen.dot_grad_b, chosen.grad_b) if output == "dB" else (chosen.dot_u, chosen.u)
    stride, one = ("stride_g_j", "stride_g_q") if output == "dB" else ("stride_g_q", "stride_g_j")
    arguments = {
        "p_g": POINTER[g_dtype],
        "p_w": POINTER[FP32 if output == "dB" else b_dtype],
        "p_out": POINTER[FP32],
        "scaling": "fp32",
        **dict.fromkeys(("Q", "J", stride, "stride_w_j"), "i32"),
    }
    constants = {
        one: 1,
        "stride_w_r": 1,
        "R": rank,
        "SCALING_IS_TENSOR": False,
        "SPLIT_G": dot.split_a,
        "SPLIT_W": dot.split_b,
        "DOT_DTYPE": dot.tl_dtype,
    }
    return compile_at(target, product_kernel, launch.config, arguments, constants, ["Q", "J"])


def assert_fits(binary, target, tensor_cores=True):
    assert binary.spilled == 0
    assert binary.shared <= TARGETS[target][1]
    assert re.search(r"LDG\.E\S*\.128|LDGSTS\.E\S*\.128|(buffer|global)_load_dwordx4", binary.code)
    if tensor_cores:
        assert re.search(TENSOR_CORE[target], binary.code)


@pytest.mark.parametrize(
    ("target", "rank", "b_dtype", "y_dtype", "has_base", "has_biases"),
    [
        ("sm_80", 16, BF16, BF16, False, True),
        ("sm_80", 16, BF16, BF16, True, False),
        ("sm_80", 256, FP32, BF16, True, False),
        ("sm_80", 64, FP32, FP32, True, True),
        ("gfx942", 64, FP32, FP32, True, False),
        ("gfx942", 512, FP32, FP16, True, True),
    ],
)
def test_up_fits_its_target(target, rank, b_dtype, y_dtype, has_base, has_biases):
    binary = compile_up(target, rank, b_dtype, y_dtype, has_base, has_biases)
    assert_fits(binary, target, tensor_cores=not b_dtype == y_dtype == FP32)
    if target.startswith("sm"):
        assert "STG.E.128" in binary.code and not re.search(r"STG\.E(\.U16|\.64)?\s", binary.code)


@pytest.mark.parametrize(("b_dtype", "dots"), [(BF16, 1), (FP32, 3)])
def test_up_multiplies_as_often_as_its_dtypes_need(b_dtype, dots):
    """On Hopper, by wgmma of 64 rows, 128 columns and 16 of the rank."""
    binary = compile_up("sm_90", 16, b_dtype, BF16, has_base=True)
    assert_fits(binary, "sm_90")
    assert len(re.findall(r"HGMMA\.64x128x16\.F32\.BF16", binary.code)) == dots


@pytest.mark.parametrize(
    ("target", "rank", "g_dtype", "b_dtype"),
    [
        ("sm_80", 16, FP16, FP32),
        ("sm_80", 32, BF16, BF16),
        ("sm_90", 16, BF16, FP32),
        ("gfx942", 16, FP16, FP32),
        ("gfx942", 16, BF16, FP32),
        ("gfx942", 32, BF16, BF16),
    ],
)
def test_one_pass_fits_its_target(target, rank, g_dtype, b_dtype):
    binary = compile_both(target, rank, g_dtype, b_dtype)
    assert_fits(binary, target, tensor_cores=not g_dtype == b_dtype == FP32)


@pytest.mark.parametrize(
    ("target", "rank", "g_dtype", "b_dtype", "output"),
    [
        ("sm_80", 256, FP16, FP32, "dB"),
        ("sm_80", 512, BF16, BF16, "u"),
        ("sm_90", 128, BF16, BF16, "dB"),
        ("sm_90", 512, BF16, FP32, "u"),
        ("gfx942", 16, BF16, FP32, "dB"),
        ("gfx942", 512, BF16, BF16, "dB"),
        ("gfx942", 256, FP16, FP32, "u"),
        ("gfx942", 64, FP32, FP32, "u"),
    ],
)
def test_two_passes_fit_their_target(target, rank, g_dtype, b_dtype, output):
    binary = compile_product(target, rank, g_dtype, b_dtype, output)
    assert_fits(binary, target, tensor_cores=not g_dtype == b_dtype == FP32)


@pytest.mark.parametrize(("target", "dtypes"), [("sm_90", (FP32, BF16)), ("gfx942", (BF16, FP16))])
def test_second_stage_fits_its_target(target, dtypes):
    arguments = {"p_parts": (POINTER[FP32],) * 2, "p_total": tuple(POINTER[dtype] for dtype in dtypes)}
    arguments |= dict.fromkeys(("parts", "numel", "first_block"), ("i32",) * 2)
    config = {"num_warps": 4, "num_stages": 3}  # Triton's own choice
    constants = {"SUMS": 2, "BLOCK": BLOCK, "BP": BP}
    binary = compile_at(target, sum_parts_kernel, config, arguments, constants, ["numel"])
    assert_fits(binary, target, tensor_cores=False)


def test_second_stage_is_one_kernel_whatever_the_number_of_parts():
    """16 parts, or 1, in a tuple would compile another."""
    gpu, _ = TARGETS["sm_90"]
    hashes = set()
    for parts in ((16, 1), (17, 1), (2, 3), (1, 32)):
        with compiling_for(gpu) as compiled:
            of = [torch.empty(n, 256, device="meta") for n in parts]
            sum_parts(of, [BF16, BF16])
        hashes |= {kernel.kernel.hash for kernel in compiled}
    assert len(hashes) == 1

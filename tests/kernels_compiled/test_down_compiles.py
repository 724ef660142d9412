"""The down kernel, compiled for each kind of GPU at the tiles that a launch would choose."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from ahead_of_time import POINTER, TARGETS, TENSOR_CORE, compile_for

from sibo_triton.kernels.down import _TL_DTYPES, down_kernel, tiles

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

pytestmark = pytest.mark.skipif(
    not isinstance(down_kernel, triton.JITFunction), reason="TRITON_INTERPRET=1: unset it to compile kernels"
)


def compile_down(target, rank, dtype, a_dtype, mixes=True, k=4096):
    """A launch on contiguous activations of a usual width, with lambda a tensor."""
    dot_dtype = dtype if dtype == a_dtype else FP32
    config = tiles(rank, dot_dtype)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    arguments = {
        "p_x": POINTER[dtype],
        "p_initial_residual": POINTER[dtype],
        "p_lora_a": POINTER[a_dtype],
        "p_t": POINTER[FP32],
        "lambda_": POINTER[FP32],
        **dict.fromkeys(("M", "r", "stride_x_m", "stride_h_m", "stride_a_r"), "i32"),
    }
    constants = {
        "stride_x_k": 1,
        "stride_h_k": 1,
        "stride_a_k": 1,
        "K": k,
        "HAS_INITIAL_RESIDUAL": mixes,
        "LAMBDA_IS_TENSOR": mixes,
        "DOT_DTYPE": _TL_DTYPES[dot_dtype],
        **config,
    }
    if not mixes:
        arguments["lambda_"] = "fp32"
        constants |= {"p_initial_residual": None, "stride_h_m": 0, "stride_h_k": 0}
        del arguments["p_initial_residual"], arguments["stride_h_m"]
    aligned = {name for name in arguments if name.startswith(("p_", "stride_")) or (name == "r" and rank % 16 == 0)}
    return compile_for(target, down_kernel, arguments, constants, frozenset(aligned), options)


CASES = [
    *((target, 16, BF16, BF16) for target in TARGETS),
    *((target, 64, FP32, FP32) for target in TARGETS),
    *(("sm_90", rank, BF16, BF16) for rank in (64, 128, 512)),
    ("gfx942", 512, BF16, BF16),  # the most shared memory where there is least
    ("sm_90", 8, FP16, FP16),
    ("sm_80", 16, BF16, FP32),
]


@pytest.mark.parametrize(("target", "rank", "dtype", "a_dtype"), CASES)
def test_down_fits_its_target(target, rank, dtype, a_dtype):
    binary = compile_down(target, rank, dtype, a_dtype)
    assert binary.spilled == 0
    assert binary.shared <= TARGETS[target][1]
    if target.startswith("sm"):  # loads of 16 bytes, straight to shared memory
        assert "LDGSTS.E.BYPASS.128" in binary.code
    else:
        assert "buffer_load_dwordx4" in binary.code or "global_load_dwordx4" in binary.code
    if dtype == a_dtype != FP32:
        assert re.search(TENSOR_CORE[target], binary.code)
        assert not re.search(r"LDGSTS\.E(\.BYPASS)?(\.64)?\s", binary.code)


@pytest.mark.parametrize(("mixes", "products"), [(False, 1), (True, 2)])
def test_down_multiplies_twice_only_where_it_mixes(mixes, products):
    """On Hopper, by wgmma of 64 rows, the rank and 16 columns: 4 to a step of 64 columns."""
    binary = compile_down("sm_90", 16, BF16, BF16, mixes=mixes)
    assert binary.spilled == 0
    assert len(re.findall(r"HGMMA\.64x16x16\.F32\.BF16", binary.code)) == 4 * products


def test_down_compiles_for_an_odd_width():
    binary = compile_down("sm_90", 16, BF16, BF16, k=4095)
    assert binary.spilled == 0 and "HGMMA" in binary.code

"""The down kernel, compiled for each kind of GPU at the tiles that a launch would choose."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
from ahead_of_time import POINTER, TARGETS, TENSOR_CORE, compile_for

from sibo_triton.kernels.down import down_kernel, plan
from sibo_triton.kernels.targets import KNOWN

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

pytestmark = pytest.mark.skipif(
    not isinstance(down_kernel, triton.JITFunction), reason="TRITON_INTERPRET=1: unset it to compile kernels"
)


def compile_down(
    target, ranks, dtype, a_dtype, mixes=True, drops=False, difference=False, k=4096, splits=1, exact=True
):
    """A launch for siblings of these ranks on contiguous activations of a usual width, with lambda a tensor."""
    n = len(ranks)
    kind = (a_dtype, mixes, drops, difference)
    chosen = plan(max(ranks), dtype, dtype if mixes else None, kind, KNOWN[target], exact)
    tiles = dict(chosen.config)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    arguments = {
        "p_x": POINTER[dtype],
        "p_initial_residual": POINTER[dtype],
        "p_t": POINTER[FP32],
        "p_lora_a": (POINTER[a_dtype],) * n,
        "p_seed": ("*i64",) * n,
        "lambda_": (POINTER[FP32] if mixes else "fp32",) * n,
        "keep_from": ("i32",) * n,
        "dropout_scale": ("fp32",) * n,
        **dict.fromkeys(("r", "first_tile", "t_start", "stride_a_r"), ("i32",) * n),
        "stride_a_k": ("constexpr",) * n,
        **dict.fromkeys(("M", "r_tiles", "stride_x_m", "stride_h_m", "stride_t_split"), "i32"),
    }
    constants = {
        "stride_x_k": 1,
        "stride_h_k": 1,
        "stride_a_k": (1,) * n,
        "K": k,
        "K_STEPS": triton.cdiv(k, tiles["BK"] * splits),
        "SIBLINGS": n,
        "HAS_INITIAL_RESIDUAL": mixes,
        "HAS_DROPOUT": drops,
        "HAS_DIFFERENCE": difference,
        "LAMBDA_IS_TENSOR": (mixes,) * n,
        "MIX_FIRST": chosen.mix_first,
        "SPLIT_X": chosen.operands.split_a,
        "SPLIT_A": chosen.operands.split_b,
        "DOT_DTYPE": chosen.operands.tl_dtype,
        **tiles,
    }
    if not mixes:
        constants |= {"p_initial_residual": None, "stride_h_m": 0, "stride_h_k": 0}
        del arguments["p_initial_residual"], arguments["stride_h_m"]
    if not drops:
        constants |= dict.fromkeys(("p_seed", "keep_from", "dropout_scale"))
        del arguments["p_seed"], arguments["keep_from"], arguments["dropout_scale"]
    aligned = {name for name in arguments if name.startswith(("p_", "stride_")) and name != "stride_a_k"}
    aligned |= {"t_start"} | ({"r"} if all(rank % 16 == 0 for rank in ranks) else set())
    return compile_for(target, down_kernel, arguments, constants, frozenset(aligned), options)


CASES = [
    # target, ranks, dtype of x and h0, dtype of A, dropout, d
    *((target, (16,), BF16, BF16, True, False) for target in TARGETS),
    ("sm_90", (64,), BF16, BF16, True, True),
    ("gfx942", (64,), BF16, BF16, False, False),  # the most shared memory where there is least
    ("gfx942", (512,), FP16, FP16, True, False),
    ("sm_80", (512,), FP16, FP32, True, True),  # two times three dots
    ("sm_120", (64,), FP16, FP32, True, True),  # the most registers
    ("sm_90", (64,), FP32, FP32, True, True),
    ("sm_90", (16, 8, 16), BF16, FP32, True, True),
    ("gfx942", (16, 4, 64), BF16, FP32, True, False),
]


@pytest.mark.parametrize(("target", "ranks", "dtype", "a_dtype", "drops", "difference"), CASES)
def test_down_fits_its_target(target, ranks, dtype, a_dtype, drops, difference):
    binary = compile_down(target, ranks, dtype, a_dtype, True, drops, difference)
    assert binary.spilled == 0
    assert binary.shared <= TARGETS[target][1]
    if target.startswith("sm"):  # loads of 16 bytes, straight to shared memory
        assert "LDGSTS.E.BYPASS.128" in binary.code
    else:
        assert "buffer_load_dwordx4" in binary.code or "global_load_dwordx4" in binary.code
    if (dtype, a_dtype) != (FP32, FP32):
        assert re.search(TENSOR_CORE[target], binary.code)
        assert not re.search(r"LDGSTS\.E(\.BYPASS)?(\.64)?\s", binary.code)


def test_float32_below_highest_uses_tensor_cores():
    binary = compile_down("sm_90", (16,), FP32, FP32, exact=False)
    assert binary.spilled == 0 and len(re.findall(r"HGMMA\.64x16x16\.F32\.BF16", binary.code)) == 3 * 2


@pytest.mark.parametrize(
    ("a_dtype", "mixes", "products", "steps"),
    [
        (BF16, False, 1, 4),  # of 16 columns in a tile
        (BF16, True, 2, 4),  # x and h0
        (FP32, True, 4, 2),  # by A's high and low part
    ],
)
def test_products_of_a_step(a_dtype, mixes, products, steps):
    """On Hopper, by wgmma of 64 rows, the rank and 16 columns."""
    binary = compile_down("sm_90", (16,), BF16, a_dtype, mixes=mixes)
    assert binary.spilled == 0
    assert len(re.findall(r"HGMMA\.64x16x16\.F32\.BF16", binary.code)) == steps * products


def test_down_compiles_for_parts_of_an_odd_width():
    binary = compile_down("sm_90", (16,), BF16, BF16, k=4095, splits=8)
    assert binary.spilled == 0 and "HGMMA" in binary.code

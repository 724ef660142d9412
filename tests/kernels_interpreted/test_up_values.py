"""The up kernel: what is split and not finite; its values are in test_any_launch.py and tests/gpu."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from inputs import BF16, FP16, FP32, randn

from sibo_triton.kernels.precision import operands
from sibo_triton.kernels.targets import KNOWN
from sibo_triton.kernels.up import add_up, plan, up


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_split_products_keep_float32(size):
    """Within 4e-5 before y is rounded: seen in a float32 y, for which the kernel splits where torch allows it to."""
    torch.manual_seed(0)
    t, lora_b = torch.randn(64, 128) * size, randn(96, 128, FP32)
    exact = t.double() @ lora_b.double().T

    def error():
        return float((up(t, lora_b, 1.0, FP32).double() - exact).norm() / exact.norm())

    assert error() < 3e-7
    torch.set_float32_matmul_precision("high")
    try:
        assert 1e-6 < error() < 4e-5  # the interpreter's cast to bfloat16 truncates; a GPU's does not
    finally:
        torch.set_float32_matmul_precision("highest")


def test_which_products_are_split():
    def flags(*arguments):
        dot = operands(*arguments)
        return dot.split_a, dot.split_b, dot.dtype

    assert flags(BF16, BF16) == (False, False, BF16)
    assert flags(FP16, FP16) == (False, False, FP16)
    assert flags(BF16, FP32) == (False, True, BF16)
    assert flags(FP32, BF16) == (True, False, BF16)
    assert flags(FP16, FP32) == flags(FP32, FP32) == (True, True, BF16)
    assert flags(FP16, BF16) == (True, False, BF16)
    assert flags(FP32, FP32, True) == (False, False, FP32)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("b_dtype", "y_dtype"), [(FP32, FP32), (FP32, BF16), (BF16, BF16), (FP32, FP16)])
def test_what_is_not_finite_stays_so(b_dtype, y_dtype, value):
    t, lora_b, base = torch.randn(70, 20), randn(140, 20, b_dtype), randn(70, 140, y_dtype)
    t[3, 19] = value
    lora_b[139, 0] = value
    base[68, 5] = value
    bad = torch.zeros(70, 140, dtype=torch.bool)
    bad[3] = bad[:, 139] = True
    assert torch.equal(~up(t, lora_b, 2.0, y_dtype).isfinite(), bad)
    assert torch.equal(~up(t, lora_b, 2.0, y_dtype, base_bias=base[68]).isfinite(), bad | (torch.arange(140) == 5))
    bad[68, 5] = True
    assert torch.equal(~add_up(base, t, lora_b, 2.0).isfinite(), bad)


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
def test_tiles_pad_every_rank(target):
    for b_dtype in (FP16, FP32):
        for y_dtype in (FP16, FP32):
            for rank in range(1, 513):
                BR = plan(rank, b_dtype, y_dtype, target).config["BR"]
                assert BR >= 16 and BR & (BR - 1) == 0


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "t is torch.float64: the kernel takes torch.float16", {"t": torch.zeros(4, 2).double()}),
        (ValueError, r"t has shape \[4, 2\] and strides \(1, 4\)", {"t": torch.zeros(2, 4).T}),
        (ValueError, r"t has shape \[1, 4, 2\]", {"t": torch.zeros(1, 4, 2)}),
        (ValueError, r"lora_b has shape \[2, 7\], but \[N, 2\] fits t", {"lora_b": torch.zeros(2, 7)}),
        (TypeError, "lora_b is torch.float64: the kernel takes torch.float16", {"lora_b": torch.zeros(8, 2).double()}),
        (ValueError, r"lora_bias has shape \[7\], but \[8\] fits lora_b", {"lora_bias": torch.zeros(7)}),
        (ValueError, r"base_bias has shape \[1\], but \[8\] fits lora_b", {"base_bias": torch.zeros(1)}),
        (TypeError, "base_bias is torch.float64", {"base_bias": torch.zeros(8).double()}),
        (TypeError, "lora_bias is torch.int64", {"lora_bias": torch.zeros(8, dtype=torch.int64)}),
        (ValueError, r"scaling is a torch.float32 tensor of shape \[2\]", {"scaling": torch.zeros(2)}),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments):
    right = {"t": torch.zeros(4, 2), "lora_b": torch.zeros(8, 2), "scaling": 1.0} | arguments
    with pytest.raises(error, match=message):
        up(**right, dtype=FP32)
    if "base_bias" not in right:
        with pytest.raises(error, match=message):
            add_up(torch.zeros(4, 8), **right)


def test_wrong_outputs_are_named():
    right = {"t": torch.zeros(4, 2), "lora_b": torch.zeros(8, 2), "scaling": 1.0}
    with pytest.raises(TypeError, match="y is torch.float64: the kernel takes torch.float16"):
        up(**right, dtype=torch.float64)
    with pytest.raises(TypeError, match="base is torch.float64"):
        add_up(torch.zeros(4, 8).double(), **right)
    with pytest.raises(ValueError, match=r"base has shape \[4, 7\], but \[4, 8\] fits t and lora_b"):
        add_up(torch.zeros(4, 7), **right)

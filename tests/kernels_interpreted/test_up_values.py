"""The values of the up kernel against float64, where plain torch's error in the same dtypes is the yardstick."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from inputs import BF16, FP16, FP32, LAYOUTS, ROUNDING, randn

from sibo_triton.kernels.precision import operands
from sibo_triton.kernels.targets import KNOWN
from sibo_triton.kernels.up import add_up, plan, up


def assert_as_good_as_torch(y, t, lora_b, scaling, lora_bias=None, base=None):
    """``base``: what the product is added to. float32 adapters compare with float32, others with torch in 16 bits."""
    s = float(scaling)
    bias = torch.zeros(lora_b.shape[0]) if lora_bias is None else lora_bias
    added = torch.zeros(y.shape, dtype=y.dtype) if base is None else base.expand(y.shape)
    assert (y.shape, y.is_contiguous()) == ((t.shape[0], lora_b.shape[0]), True)
    if y.numel() == 0:
        return
    exact = added.double() + s * (t.double() @ lora_b.double().T + bias.double())
    terms = added.double().abs() + abs(s) * (t.double().abs() @ lora_b.double().abs().T + bias.double().abs())
    # Every element: a float32 or split product, rounded once.
    product = 1e-6 if y.dtype == lora_b.dtype == FP32 else 6e-5 if lora_b.dtype == FP32 else 1e-6
    tiny = 2**-24 if y.dtype == FP16 else 1e-30  # half of float16's smallest number, and nothing to speak of
    assert ((y.double() - exact).abs() <= product * terms + 1.01 * ROUNDING[y.dtype] * exact.abs() + tiny).all()
    # All together no worse than torch, in the dtype that B has and y takes.
    by_torch = (added.to(FP32) + s * (t.to(lora_b.dtype) @ lora_b.T + bias.to(lora_b.dtype))).to(y.dtype)
    error, torch_error = (float((result.double() - exact).norm()) for result in (y, by_torch))
    margin = 2.3 if y.dtype == BF16 else 1.2
    allowed = 2e-7 if y.dtype == lora_b.dtype == FP32 else 3e-5 if lora_b.dtype == FP32 else 2e-7
    assert error <= margin * torch_error + allowed * float(exact.norm())


# Chosen so that each value meets most of the others' once.
@pytest.mark.parametrize(
    ("m", "n", "r", "b_dtype", "y_dtype", "scaling", "bias_dtype"),
    [
        (1, 1, 1, FP32, FP32, 2.0, None),
        (64, 128, 16, BF16, BF16, 2.0, None),
        (65, 129, 16, FP16, FP16, torch.tensor([0.5]), FP16),
        (63, 127, 3, FP32, BF16, torch.tensor(0.7), None),
        (130, 200, 4, FP32, FP16, 1.0, FP32),
        (7, 257, 8, BF16, FP32, -0.3, BF16),
        (100, 96, 24, FP32, BF16, torch.tensor([0.1], dtype=torch.float64), FP32),
        (33, 130, 48, FP32, FP32, torch.tensor([0.3]), FP32),
        (70, 129, 64, FP16, BF16, 0.9, None),
        (66, 40, 65, BF16, BF16, torch.tensor([0.25], dtype=BF16), FP32),
        (64, 33, 128, FP32, FP16, 0.3, BF16),
        (5, 70, 200, FP16, FP32, torch.tensor([0.3]), None),
        (65, 31, 257, BF16, FP16, 0.3, FP16),
        (2, 64, 512, FP32, BF16, 0.3, None),
        (64, 96, 512, FP32, FP32, 0.5, None),
    ],
)
@pytest.mark.parametrize("adds", [False, True])
def test_up(m, n, r, b_dtype, y_dtype, scaling, bias_dtype, adds):
    t, lora_b = randn(m, r, FP32).contiguous(), randn(n, r, b_dtype)
    lora_bias = None if bias_dtype is None else randn(1, n, bias_dtype)[0]
    if adds:
        base = randn(m, n, y_dtype)
        y = add_up(base, t, lora_b, scaling, lora_bias)
    else:
        base = lora_bias
        y = up(t, lora_b, scaling, y_dtype, lora_bias, base_bias=base)
    assert y.dtype == y_dtype
    assert_as_good_as_torch(y, t, lora_b, scaling, lora_bias, base)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 70), st.integers(0, 140), st.integers(0, 70)),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP16, BF16])] * 4),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    scaling_is_tensor=st.booleans(),
    has_biases=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_any_shape_strides_and_dtypes(sizes, dtypes, layouts, scaling_is_tensor, has_biases, seed):
    """Nothing is written to the base, of which an expanded one has one row."""
    torch.manual_seed(seed)
    (m, n, r), (b_dtype, y_dtype, *bias_dtypes), (b_layout, base_layout) = sizes, dtypes, layouts
    t, lora_b, base = torch.randn(m, r), randn(n, r, b_dtype, b_layout), randn(m, n, y_dtype, base_layout)
    lora_bias, base_bias = (
        randn(n, 1, dtype, "padded")[:, 0] if has else None  # a stride of 2
        for dtype, has in zip(bias_dtypes, has_biases, strict=True)
    )
    scaling = torch.tensor([1.5]) if scaling_is_tensor else 1.5
    before = base.clone()
    y = add_up(base, t, lora_b, scaling, lora_bias)
    assert torch.equal(base, before)
    assert_as_good_as_torch(y, t, lora_b, scaling, lora_bias, base)
    y = up(t, lora_b, scaling, y_dtype, lora_bias, base_bias)
    assert_as_good_as_torch(y, t, lora_b, scaling, lora_bias, base_bias)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_split_products_keep_float32(size):
    """Within 1e-4 before y is rounded: seen in a float32 y, for which the kernel splits where torch allows it to."""
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

"""The values of the down kernel against float64, where plain torch's error in the same dtypes is the yardstick."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from sibo_triton import reference
from sibo_triton.kernels.down import down, tiles

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def randn(rows, cols, dtype, strides="contiguous"):
    """Random values inside a buffer of NaN, so that a read beyond the matrix shows."""
    if strides == "expanded":
        return randn(1, cols, dtype).expand(rows, cols)
    buffer = torch.full((rows + 2, cols + (strides != "contiguous")), math.nan, dtype=dtype)
    if strides == "transposed":
        buffer = buffer.T.contiguous().T
    view = buffer[1 : rows + 1, :cols]
    return view.copy_(torch.randn(rows, cols).to(dtype))


def assert_as_good_as_torch(t, x, lora_a, h0, lambda_):
    assert (t.dtype, t.shape, t.is_contiguous()) == (FP32, (x.shape[0], lora_a.shape[0]), True)
    h0_used = x if h0 is None else h0
    exact_lambda = float(lambda_)
    x_mixed = (1 - exact_lambda) * x.double() + exact_lambda * h0_used.double()
    exact = x_mixed @ lora_a.double().T
    if t.numel() == 0:
        return
    # Every element within float32's rounding of its terms: the interpreter's dots are float32, whatever is in memory.
    terms = ((1 - exact_lambda) * x.double().abs() + exact_lambda * h0_used.double().abs()) @ lora_a.double().abs().T
    assert ((t.double() - exact).abs() <= 1e-6 * terms + 1e-30).all()
    # And all together no worse than torch; float32 where dtypes meet, as torch needs one dtype.
    dtypes = {tensor.dtype for tensor in (x, lora_a, h0_used)}
    dtype = dtypes.pop() if len(dtypes) == 1 else FP32
    by_torch = reference.down(x.to(dtype), lora_a.to(dtype), h0_used.to(dtype), lambda_)
    error, torch_error = (float((result.double() - exact).norm()) for result in (t, by_torch))
    assert error <= 1.2 * torch_error + 1e-7 * float(exact.norm())


# Chosen so that each value meets most of the others' once.
@pytest.mark.parametrize(
    ("m", "k", "r", "x_dtype", "h0_dtype", "a_dtype", "lambda_"),
    [
        (1, 1, 1, FP32, FP32, FP32, 0.3),
        (64, 64, 16, BF16, BF16, BF16, 0.3),
        (65, 63, 16, FP16, FP16, FP16, torch.tensor([0.3])),
        (63, 65, 3, BF16, BF16, FP32, torch.tensor(0.7)),
        (130, 200, 4, FP16, FP16, FP32, 1.0),
        (7, 257, 8, FP32, BF16, FP32, 0.1),
        (100, 96, 24, BF16, FP32, BF16, torch.tensor([0.1])),
        (33, 130, 48, BF16, BF16, BF16, torch.tensor([0.0])),
        (70, 129, 64, FP16, FP16, FP16, 0.9),
        (70, 129, 64, FP32, FP32, FP32, torch.tensor([0.25], dtype=torch.float64)),
        (66, 40, 65, BF16, BF16, BF16, torch.tensor([0.25], dtype=BF16)),
        (64, 33, 128, BF16, BF16, BF16, 0.3),
        (5, 70, 200, FP16, FP16, FP16, torch.tensor([0.3])),
        (65, 70, 200, FP32, FP32, FP32, 0.3),
        (65, 31, 257, BF16, BF16, BF16, 0.3),
        (2, 64, 512, BF16, BF16, FP32, 0.3),
        (64, 96, 512, FP16, FP16, FP16, 0.5),
    ],
)
def test_down(m, k, r, x_dtype, h0_dtype, a_dtype, lambda_):
    x, h0, lora_a = randn(m, k, x_dtype), randn(m, k, h0_dtype), randn(r, k, a_dtype)
    assert_as_good_as_torch(down(x, lora_a, h0, lambda_), x, lora_a, h0, lambda_)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("r", [5, 130])
def test_plain_lora_does_not_read_h0(r, dtype):
    x, lora_a = randn(67, 70, dtype), randn(r, 70, dtype)
    without = down(x, lora_a)
    assert_as_good_as_torch(without, x, lora_a, None, 0.0)
    assert torch.equal(down(x, lora_a, torch.full_like(x, math.nan), 0.0), without)


LAYOUTS = ("contiguous", "padded", "transposed", "expanded")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 70), st.integers(0, 140), st.integers(0, 70)),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP16, BF16])] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    lambda_=st.sampled_from([0.0, 0.1, 1.0]),
    lambda_is_tensor=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_strides_and_dtypes(sizes, dtypes, layouts, lambda_, lambda_is_tensor, seed):
    torch.manual_seed(seed)
    m, k, r = sizes
    shapes = ((m, k), (m, k), (r, k))
    x, h0, lora_a = (randn(*shape, *rest) for shape, *rest in zip(shapes, dtypes, layouts, strict=True))
    if lambda_is_tensor:
        lambda_ = torch.tensor([lambda_])
    assert_as_good_as_torch(down(x, lora_a, h0, lambda_), x, lora_a, h0, lambda_)


def test_two_products_are_more_exact_than_torch_by_orders_of_magnitude():
    """Mixing the accumulators rounds nothing to 16 bits."""
    x, h0, lora_a = (randn(rows, 512, BF16) for rows in (64, 64, 16))
    exact = reference.down(x.double(), lora_a.double(), h0.double(), 0.3)
    error, torch_error = (
        float((t.double() - exact).norm() / exact.norm())
        for t in (down(x, lora_a, h0, 0.3), reference.down(x, lora_a, h0, 0.3))
    )
    assert error < 1e-6 < 1e-3 < torch_error


@pytest.mark.parametrize("r", [16, 128])
@pytest.mark.parametrize("lambda_", [0.3, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(value, lambda_, r):
    x, h0, lora_a = randn(70, 40, FP32), randn(70, 40, FP32), randn(r, 40, FP32)
    x[3, 39] = value
    h0[66, 0] = value
    bad = ~down(x, lora_a, h0, lambda_).isfinite()
    rows = torch.zeros(70, dtype=torch.bool)
    rows[[3, 66]] = True
    assert torch.equal(bad, rows[:, None].expand_as(bad))


def test_offsets_past_2_31():
    """Three rows, 2^30 elements and more apart; what lies between is never touched, nor ever backed by memory."""
    try:
        x = torch.empty_strided((3, 24), (2**30 + 8, 1), dtype=FP16)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space: {error}")
    x.copy_(torch.randn(3, 24))
    lora_a = randn(16, 24, FP16)
    assert_as_good_as_torch(down(x, lora_a, x, 0.5), x, lora_a, x, 0.5)


def test_tiles_pad_every_rank():
    for dtype in (FP16, BF16, FP32):
        for rank in range(1, 513):
            BR = tiles(rank, dtype)["BR"]
            assert BR >= 16 and BR & (BR - 1) == 0 and (BR >= rank or BR >= 64)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "initial_residual is None, but lambda_ is 0.5", {"initial_residual": None}),
        (ValueError, r"initial_residual has shape \[4, 1\]", {"initial_residual": torch.zeros(4, 1)}),
        (ValueError, r"lora_a has shape \[2, 7\]", {"lora_a": torch.zeros(2, 7)}),
        (ValueError, r"x has shape \[2, 4, 8\]", {"x": torch.zeros(2, 4, 8)}),
        (TypeError, "lora_a is torch.float64: the kernel takes torch.float16", {"lora_a": torch.zeros(2, 8).double()}),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments):
    right = {"x": torch.zeros(4, 8), "lora_a": torch.zeros(2, 8), "initial_residual": torch.zeros(4, 8), "lambda_": 0.5}
    with pytest.raises(error, match=message):
        down(**right | arguments)

"""The values of the down-projection's gradients against float64, where plain torch's error is the yardstick."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from gradients import SEED, absolute_terms, assert_close, gradients
from inputs import BF16, FP16, FP32, LAYOUTS, randn

from sibo_triton.kernels import targets
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import cut, down_weight_gradient, plan
from sibo_triton.kernels.siblings import DownGradients


def check(u, x, lora_a, h0, lambda_, p, *, base=None, wants_dx=True, wants_dh=True):
    """All gradients, or the wanted ones, of inputs in any dtypes; dx and dh0 in those of x and h0."""
    h0_used = x if h0 is None else h0
    mixes = isinstance(lambda_, torch.Tensor) or lambda_ != 0
    exact_lambda = lambda_.double() if isinstance(lambda_, torch.Tensor) else lambda_
    arguments = (u, x, lora_a, h0_used)
    exact = gradients(torch.float64, *arguments, exact_lambda, p)
    terms = absolute_terms(*arguments, exact_lambda, p)
    read = {x.dtype, lora_a.dtype} | ({h0_used.dtype} if mixes else set())
    by_torch = gradients(lora_a.dtype if len(read) == 1 else FP32, *arguments, lambda_, p)
    seed = SEED if p else None

    own = DownGradients(u, lora_a, lora_a.dtype, lambda_, p, seed)
    (da,) = down_weight_gradient([own], x, h0)
    assert (da.dtype, da.shape, da.is_contiguous()) == (FP32, lora_a.shape, True)
    assert_close(da, exact[0], terms[0], by_torch[0], splits=len(read) > 1)

    wants_dh = wants_dh and mixes
    dx, dh = down_input_gradient(
        [own],
        dtype=x.dtype if wants_dx else None,
        base=base,
        residual_dtype=h0_used.dtype if wants_dh else None,
    )
    splits = lora_a.dtype == FP32 and not {FP32} >= {t.dtype for t in (dx, dh) if t is not None}
    assert (dx is None) == (not wants_dx) and (dh is None) == (not wants_dh)
    if wants_dx:
        assert (dx.dtype, dx.is_contiguous()) == (x.dtype, True)
        base = torch.zeros_like(dx) if base is None else base
        exact_sum, torch_sum = base.double() + exact[1], (base.float() + by_torch[1].float()).to(dx.dtype)
        assert_close(dx, exact_sum, terms[1] + base.double().abs(), torch_sum, splits)
    if wants_dh:
        assert (dh.dtype, dh.is_contiguous()) == (h0_used.dtype, True)
        assert_close(dh, exact[2], terms[2], by_torch[2].to(dh.dtype), splits)


# Chosen so that each value meets most of the others' once.
@pytest.mark.parametrize(
    ("m", "k", "r", "x_dtype", "h0_dtype", "a_dtype", "lambda_", "p"),
    [
        (1, 1, 1, FP32, FP32, FP32, 0.3, 0.5),
        (64, 64, 16, BF16, BF16, BF16, 0.3, 0.0),
        (65, 63, 16, FP16, FP16, FP16, torch.tensor([0.3]), 0.1),
        (63, 65, 3, BF16, BF16, FP32, torch.tensor(0.7), 0.05),
        (130, 200, 4, FP16, FP16, FP32, 1.0, 0.0),
        (7, 257, 8, FP32, BF16, FP32, 0.1, 0.9),
        (100, 96, 24, BF16, FP32, BF16, torch.tensor([0.1]), 0.0),
        (33, 130, 48, BF16, BF16, BF16, torch.tensor([0.0]), 0.3),
        (70, 129, 64, FP16, FP16, FP16, 0.9, 0.0),
        (70, 129, 64, FP32, FP32, FP32, torch.tensor([0.25], dtype=torch.float64), 0.1),
        (66, 40, 65, BF16, BF16, BF16, torch.tensor([0.25], dtype=BF16), 0.1),
        (64, 33, 128, BF16, BF16, BF16, 0.3, 0.0),
        (5, 70, 200, FP16, FP16, FP32, torch.tensor([0.3]), 0.2),
        (65, 70, 200, FP32, FP32, FP32, 0.3, 0.0),
        (65, 31, 257, BF16, BF16, BF16, 0.0, 0.1),
        (2, 64, 512, BF16, BF16, FP32, 0.3, 0.5),
    ],
)
def test_gradients(m, k, r, x_dtype, h0_dtype, a_dtype, lambda_, p):
    torch.manual_seed(m)
    u, x, h0, lora_a = torch.randn(m, r), randn(m, k, x_dtype), randn(m, k, h0_dtype), randn(r, k, a_dtype)
    check(u, x, lora_a, h0, lambda_, p)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(("r", "p"), [(5, 0.0), (66, 0.1)])
def test_plain_lora_does_not_read_h0(dtype, r, p):
    u, x, lora_a = torch.randn(33, r), randn(33, 70, dtype), randn(r, 70, dtype)
    check(u, x, lora_a, None, 0.0, p)
    nan = torch.full_like(x, math.nan)
    own = DownGradients(u, None, dtype, 0.0, p, SEED)
    (without,), (with_h0,) = (down_weight_gradient([own], x, h0) for h0 in (None, nan))
    assert torch.equal(without, with_h0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 70), st.integers(0, 140), st.integers(0, 70)),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP16, BF16])] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    lambda_=st.sampled_from([0.0, 0.1, 1.0]),
    lambda_is_tensor=st.booleans(),
    p=st.sampled_from([0.0, 0.05, 0.6]),
    base=st.sampled_from([None, *LAYOUTS]),
    wanted=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_any_shape_strides_dtypes_and_subset(sizes, dtypes, layouts, lambda_, lambda_is_tensor, p, base, wanted, seed):
    torch.manual_seed(seed)
    m, k, r = sizes
    shapes = ((m, k), (m, k), (r, k))
    x, h0, lora_a = (randn(*shape, *rest) for shape, *rest in zip(shapes, dtypes, layouts, strict=True))
    added_to = None if base is None else randn(m, k, FP32 if wanted[1] else x.dtype, base)
    lambda_ = torch.tensor([lambda_]) if lambda_is_tensor else lambda_
    wants_dx, wants_dh = wanted
    check(torch.randn(m, r), x, lora_a, h0, lambda_, p, base=added_to, wants_dx=wants_dx, wants_dh=wants_dh)


@pytest.mark.parametrize(("k", "multiprocessors", "parts"), [(520, 1, 1), (70, 1, 3), (70, 100, 6)])
def test_rows_in_any_number_of_parts(k, multiprocessors, parts, monkeypatch):
    """One part, a last part that is not full, and a part for each tile."""
    target = dataclasses.replace(targets.STAND_IN, multiprocessors=multiprocessors)
    monkeypatch.setattr(targets, "target_of", lambda device: target)
    config = plan((8,), BF16, BF16, (BF16, True, True), target).config
    assert cut(333, k, 8, config["BM"], config["BK"], config["BR"], 4 * multiprocessors)[1] == parts
    x, h0, lora_a = randn(333, k, BF16), randn(333, k, BF16), randn(8, k, BF16)
    check(torch.randn(333, 8), x, lora_a, h0, 0.3, 0.1)


@pytest.mark.parametrize(("lambda_", "r"), [(0.0, 4), (0.3, 4), (0.3, 100)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_under_the_mask(value, lambda_, r):
    """As torch's: 0 * nan = nan, in the columns of dA that met it and in the row of dx."""
    p = 0.9
    u, x, h0, lora_a = torch.randn(40, r), randn(40, 70, FP32), randn(40, 70, FP32), randn(r, 70, FP32)
    x[3, 7:19] = value
    h0[5, 60:] = value
    own = DownGradients(u, lora_a, FP32, lambda_, p, SEED)
    bad = ~down_weight_gradient([own], x, h0)[0].isfinite()
    columns = torch.zeros(70, dtype=torch.bool)
    columns[7:19] = True
    if lambda_:
        columns[60:] = True
    assert torch.equal(bad, columns.expand_as(bad))
    u[11, 1] = value
    dx, _ = down_input_gradient([own], dtype=FP32)
    assert torch.equal(~dx.isfinite(), (torch.arange(40) == 11)[:, None].expand_as(dx))


U, X, A = torch.zeros(4, 2), torch.zeros(4, 8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "initial_residual is None, but lambda_ is 0.5", {"initial_residual": None}),
        (ValueError, r"initial_residual has shape \[4, 1\]", {"initial_residual": torch.zeros(4, 1)}),
        (ValueError, r"x has shape \[5, 8\]", {"x": torch.zeros(5, 8)}),
        (ValueError, "dropout_p is 0.1, and the seed None", {"dropout_p": 0.1}),
        (ValueError, "pass one int64 value", {"dropout_p": 0.1, "dropout_seed": torch.zeros(1)}),
        (ValueError, "must lie in", {"dropout_p": 1.0, "dropout_seed": SEED}),
        (ValueError, "contiguous", {"u": torch.zeros(2, 4).T}),
        (TypeError, "u is torch.float16", {"u": U.half()}),
        (TypeError, "x is torch.float64: the kernel takes torch.float16", {"x": X.double()}),
        (TypeError, "adapter_dtype is torch.float64", {"adapter_dtype": torch.float64}),
        (TypeError, "grad_dtype is torch.float64", {"grad_dtype": torch.float64}),
    ],
)
def test_wrong_arguments_of_the_weight_gradient_are_named(error, message, arguments):
    given = {"x": X, "initial_residual": X, "u": U, "lora_a": None, "lambda_": 0.5, "adapter_dtype": FP32} | arguments
    x, h0 = given.pop("x"), given.pop("initial_residual")
    with pytest.raises(error, match=message):
        down_weight_gradient([DownGradients(**given)], x, h0)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"lora_a has shape \[3, 8\]", {"lora_a": torch.zeros(3, 8)}),
        (ValueError, "lambda_ is the number 0", {"lambda_": 0.0, "residual_dtype": FP32}),
        (ValueError, r"base has shape \[4, 9\], but \[4, 8\] fits u and lora_a", {"base": torch.zeros(4, 9)}),
        (TypeError, "base is torch.float64", {"base": X.double()}),
        (ValueError, "dropout_p is 0.1, and the seed None", {"dropout_p": 0.1}),
        (TypeError, "the gradient is torch.float64", {"dtype": torch.float64}),
        (TypeError, "lora_a is torch.float64", {"lora_a": A.double()}),
    ],
)
def test_wrong_arguments_of_the_input_gradient_are_named(error, message, arguments):
    given = {"u": U, "lora_a": A, "adapter_dtype": FP32, "lambda_": 0.5, "dtype": FP32} | arguments
    wanted = {name: given.pop(name) for name in ("dtype", "base", "residual_dtype") if name in given}
    with pytest.raises(error, match=message):
        down_input_gradient([DownGradients(**given)], **wanted)

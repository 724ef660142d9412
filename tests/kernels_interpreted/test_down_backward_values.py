"""The down-projection's gradients: parts of rows, what is not read or not finite; values are in test_any_launch.py."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gradient_launches import WeightGradient
from gradients import SEED
from inputs import BF16, FP16, FP32, randn
from kernel_yardstick import check

from sibo_triton.kernels import targets
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.down_weight_gradient_plan import cut, plan
from sibo_triton.kernels.siblings import DownGradients


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize(("r", "p"), [(5, 0.0), (66, 0.1)])
def test_plain_lora_does_not_read_h0(dtype, r, p):
    u, x = torch.randn(33, r), randn(33, 70, dtype)
    nan = torch.full_like(x, math.nan)
    own = DownGradients(u, None, dtype, 0.0, p, SEED)
    (without,), (with_h0,) = (down_weight_gradient([own], x, h0) for h0 in (None, nan))
    assert torch.equal(without, with_h0)


@pytest.mark.parametrize(("k", "multiprocessors", "parts"), [(520, 1, 1), (70, 1, 3), (70, 100, 6)])
def test_rows_in_any_number_of_parts(k, multiprocessors, parts, monkeypatch):
    """One part, a last part that is not full, and a part for each tile."""
    target = dataclasses.replace(targets.STAND_IN, multiprocessors=multiprocessors)
    monkeypatch.setattr(targets, "target_of", lambda device: target)
    config = plan((8,), BF16, BF16, (BF16, True, True), target).config
    assert cut(333, k, 8, config["BM"], config["BK"], config["BR"], 4 * multiprocessors)[1] == parts
    check(WeightGradient(333, k, (8,), BF16, BF16, 0.3, 0.1), "cpu")


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

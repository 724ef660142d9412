"""What a bottleneck adapter has kernels do beside LoRA's products: bias, activation, its derivative, the sum of dY.

Against float64, where plain torch's error in the same dtypes is the yardstick.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from inputs import BF16, FP16, FP32, LAYOUTS, ROUNDING, randn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.launch_traffic import recorded_launches
from sibo_triton import reference
from sibo_triton.kernels import targets
from sibo_triton.kernels.activations import NAMES
from sibo_triton.kernels.down import down_activated_siblings, down_siblings
from sibo_triton.kernels.siblings import DownProjection, UpGradients, rank_dtype
from sibo_triton.kernels.targets import KNOWN
from sibo_triton.kernels.up_backward import up_backward_siblings
from sibo_triton.reference import ACTIVATIONS


def names_of(launches):
    return lambda launch: launches.append(launch.name)


def assert_close(result, exact, slack, dtype, by_torch=None):
    """Each element within ``slack`` and its rounding; all together no worse than torch, if that is known."""
    assert (result.dtype, result.shape, result.is_contiguous()) == (dtype, exact.shape, True)
    rounding = 1.01 * ROUNDING[dtype]
    assert ((result.double() - exact).abs() <= slack + rounding * exact.abs() + 2**-24).all()
    if by_torch is not None and exact.numel():
        error, torch_error = (float((of.double() - exact).norm()) for of in (result, by_torch))
        margin = 2.1 if dtype == BF16 else 1.2  # see ROUNDING
        assert error <= margin * torch_error + float(slack.norm())


def gradient_in_float64(activation, p):
    p = p.double().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(ACTIVATIONS[activation](p).sum(), p)
    return slope


def check_down(x, weight, bias, h0, activation, lambda_=0.0, dropout_p=0.0, seed=None, difference=False):
    one = DownProjection(weight, lambda_, dropout_p, seed, difference, bias, activation)
    ((p, d, activated),) = down_activated_siblings(x, [one], h0)
    dtypes = {x.dtype, weight.dtype} | ({h0.dtype} if one.mixes else set())
    splits = 2e-4 if len(dtypes) > 1 else 2e-6
    kept = rank_dtype(x.dtype, weight.dtype)
    wide = float(lambda_)
    h0_used = h0 if one.mixes else x
    arguments = (x.double(), weight.double(), h0_used.double(), wide, dropout_p, seed)
    b64 = torch.zeros(()) if bias is None else bias.double()
    exact = reference.down(*arguments) + b64
    terms = reference.down(*(of.abs() if isinstance(of, torch.Tensor) and of is not seed else of for of in arguments))
    slack = splits * (terms + b64.abs())
    dtype = weight.dtype if len(dtypes) == 1 else FP32
    by_torch = reference.down(x.to(dtype), weight.to(dtype), h0_used.to(dtype), lambda_, dropout_p, seed)
    by_torch = by_torch if bias is None else (by_torch + bias.to(dtype))
    if kept != dtype:
        by_torch = by_torch.to(kept)
    assert_close(p, exact, slack, kept, by_torch)
    # no activation is steeper than 1.13, nor is its value's relative error above 4 roundings of float32
    of_f = ACTIVATIONS[activation](exact)
    assert_close(activated, of_f, 1.13 * slack + 4e-7 * of_f.abs(), kept, ACTIVATIONS[activation](by_torch).to(kept))
    assert (d is not None) == difference
    if difference:
        ((_, alone),) = down_siblings(x, [one._replace(bias=None, activation=None)], h0)
        assert torch.equal(d, alone)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("dtype", "few_rows"), [(FP32, False), (FP32, True), (BF16, False), (FP16, True)])
def test_down(activation, dtype, few_rows, monkeypatch):
    """In one launch; few rows, of which K is split, in two."""
    if few_rows:
        monkeypatch.setattr(targets, "target_of", lambda device: KNOWN["sm_90"])
    m, k, r = (5, 512, 24) if few_rows else (66, 100, 24)
    x, weight, bias = randn(m, k, dtype), randn(r, k, dtype) / math.sqrt(k), randn(1, r, dtype)[0]
    launches = []
    with recorded_launches(names_of(launches), run=True):
        check_down(x, weight, bias, None, activation)
    assert launches == ["down_kernel", "activate_parts_kernel"][: 1 + few_rows]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 70), st.integers(0, 140), st.sampled_from([0, 1, 8, 24, 70, 200])),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP16, BF16])] * 4),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    activation=st.sampled_from(NAMES),
    has_bias=st.booleans(),
    lambda_=st.sampled_from([0.0, 0.1, 1.0]),
    lambda_is_tensor=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.6]),
    difference=st.booleans(),
    splits=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_down_of_any_shape_strides_and_dtypes(
    sizes, dtypes, layouts, activation, has_bias, lambda_, lambda_is_tensor, dropout_p, difference, splits, seed
):
    torch.manual_seed(seed)
    m, k, r = sizes
    shapes = ((m, k), (m, k), (r, k))
    x, h0, weight = (randn(*shape, *rest) for shape, *rest in zip(shapes, dtypes, layouts, strict=False))
    bias = randn(r, 1, dtypes[3], "padded")[:, 0] if has_bias else None
    lambda_ = torch.tensor([lambda_]) if lambda_is_tensor else lambda_
    with pytest.MonkeyPatch.context() as patch:
        if splits:
            patch.setattr(targets, "target_of", lambda device: KNOWN["sm_90"])
        check_down(x, weight, bias, h0, activation, lambda_, dropout_p, reference.draw_seed(), difference)


def check_up_backward(grad_y, p, weight, scaling, activation, wants_u=True, wants_weight=True, wants_sum=True):
    asked = UpGradients(grad_y, p, weight, scaling, wants_u, FP32 if wants_weight else None, wants_sum, activation)
    ((u, grad_weight, total),) = up_backward_siblings([asked])
    assert (u is None, grad_weight is None, total is None) == (not wants_u, not wants_weight, not wants_sum)
    s, g, w, splits = float(scaling), grad_y.double(), weight.double(), grad_y.dtype != weight.dtype
    of_parts = 2e-4 if splits else 2e-6
    slope, f = gradient_in_float64(activation, p), ACTIVATIONS[activation](p.double())
    by_torch = [of.to(weight.dtype) for of in (grad_y, weight, p)]
    if wants_u:
        exact = s * (g @ w) * slope
        # the derivative's own error is a few roundings of float32
        slack = of_parts * (abs(s) * (g.abs() @ w.abs())) * (slope.abs() + 0.1)
        t_u = (s * (by_torch[0] @ by_torch[1])).float() * gradient_in_float64(activation, by_torch[2]).float()
        assert_close(u, exact, slack, FP32, t_u)
    if wants_weight:
        exact, terms = s * (g.T @ f), abs(s) * (g.abs().T @ f.abs())
        # f(p) is rounded, once, to the dtype of p, and to that of the product
        rounded = max(ROUNDING[p.dtype], 0 if splits else ROUNDING[weight.dtype])
        t_w = (s * (by_torch[0].T @ ACTIVATIONS[activation](by_torch[2]))).float()
        assert_close(grad_weight, exact, (of_parts + rounded) * terms, FP32, t_w)
    if wants_sum:
        assert_close(total, g.sum(0), 1e-6 * g.abs().sum(0), FP32)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("r", "dtype"), [(16, BF16), (16, FP32), (70, FP16), (70, FP32)])
def test_up_backward(activation, r, dtype):
    """Rank 16 in one pass over dY, where u has several parts, 70 in two, where f' takes no launch."""
    launches = []
    with recorded_launches(names_of(launches), run=True):
        check_up_backward(randn(70, 128, dtype), randn(70, r, dtype), randn(128, r, dtype), 0.7, activation)
    passes = ["both_kernel", "activation_gradient_kernel"] if r == 16 else ["product_kernel"] * 2
    assert [name for name in launches if name != "sum_parts_kernel"] == passes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 150), st.integers(0, 270), st.sampled_from([0, 1, 8, 24, 70, 130])),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP16, BF16])] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    activation=st.sampled_from(NAMES),
    scaling_is_tensor=st.booleans(),
    wants=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    splits=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_up_backward_of_any_shape_strides_and_dtypes(
    sizes, dtypes, layouts, activation, scaling_is_tensor, wants, splits, seed
):
    torch.manual_seed(seed)
    m, n, r = sizes
    grad_y, weight = (randn(*shape, *rest) for shape, *rest in zip(((m, n), (n, r)), dtypes, layouts, strict=False))
    scaling = torch.tensor([1.5]) if scaling_is_tensor else 1.5
    with pytest.MonkeyPatch.context() as patch:
        if splits:
            patch.setattr(targets, "target_of", lambda device: KNOWN["sm_90"])
        check_up_backward(grad_y, torch.randn(m, r).to(dtypes[2]), weight, scaling, activation, *wants)


@pytest.mark.parametrize("activation", NAMES)
def test_activations_far_out_near_0_and_not_finite(activation):
    """As torch's, to a few roundings of each value; but GELU of infinity, which torch has NaN, is infinity."""
    points = [0.0, -0.0, 1e-30, -1e-8, 1e-4, -1e-3, 0.6, 0.7, -9.0, 30.0, 100.0, -200.0, 1e30]
    points += [math.inf, -math.inf, math.nan]
    own = DownProjection(torch.ones(1, 1), activation=activation)
    ((p, _, activated),) = down_activated_siblings(torch.tensor(points)[:, None], [own])
    by_torch = ACTIVATIONS[activation](p)
    by_torch[-3] = activated[-3] if by_torch[-3].isnan() else by_torch[-3]
    torch.testing.assert_close(activated, by_torch, rtol=1e-6, atol=1e-37, equal_nan=True)


def test_siblings_share_a_launch(monkeypatch):
    """Each with its own rank, bias and lambda; also where K is split."""
    x, h0 = randn(70, 520, BF16), randn(70, 520, BF16)
    siblings = [
        DownProjection(randn(r, 520, BF16), lambda_, bias=randn(1, r, FP32)[0], activation="gelu")
        for r, lambda_ in ((24, 0.1), (130, 0.5))
    ]
    for launches_wanted in (["down_kernel"], ["down_kernel", *["activate_parts_kernel"] * 2]):
        launches = []
        with recorded_launches(names_of(launches), run=True):
            together = down_activated_siblings(x, siblings, h0)
        assert launches == launches_wanted
        for sibling, results in zip(siblings, together, strict=True):
            (alone,) = down_activated_siblings(x, [sibling], h0)
            for result, expected in zip(results[::2], alone[::2], strict=True):
                torch.testing.assert_close(result, expected, rtol=2**-7, atol=1e-2)
        monkeypatch.setattr(targets, "target_of", lambda device: KNOWN["sm_90"])


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("activation='elu' has no kernel: choose one of gelu, gelu_pytorch_tanh", "down"),
        ("activation='elu' has no kernel", "up"),
        (r"bias has shape \[3\], but \[2\] fits", "bias"),
        ("t is None, but dB is wanted, or an activation", "no p"),
    ],
)
def test_wrong_arguments_are_named(message, call):
    x, weight = torch.zeros(4, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=message):
        if call == "down":
            down_activated_siblings(x, [DownProjection(weight, activation="elu")])
        elif call == "bias":
            down_activated_siblings(x, [DownProjection(weight, bias=torch.zeros(3), activation="tanh")])
        else:
            p = None if call == "no p" else torch.zeros(4, 2)
            activation = "elu" if call == "up" else "tanh"
            up_backward_siblings([UpGradients(x, p, weight.T, 1.0, True, None, False, activation)])

"""What a bottleneck adapter has kernels do beside LoRA's products: bias, activation, its derivative, the sum of dY.

Of any shapes, strides and dtypes in test_any_launch.py.
"""

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gradient_launches import UpBackward
from inputs import BF16, FP16, FP32, randn
from kernel_launches import Activated
from kernel_yardstick import check

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.launch_traffic import recorded_launches
from sibo_triton.kernels import targets
from sibo_triton.kernels.activations import NAMES
from sibo_triton.kernels.down import down_activated_siblings
from sibo_triton.kernels.siblings import DownProjection, UpGradients
from sibo_triton.kernels.targets import KNOWN
from sibo_triton.kernels.up_backward import up_backward_siblings
from sibo_triton.reference import ACTIVATIONS


def names_of(launches):
    return lambda launch: launches.append(launch.name)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("dtype", "few_rows"), [(FP32, False), (FP32, True), (BF16, False), (FP16, True)])
def test_down(activation, dtype, few_rows, monkeypatch):
    """In one launch; few rows, of which K is split, in two."""
    if few_rows:
        monkeypatch.setattr(targets, "target_of", lambda device: KNOWN["sm_90"])
    launch = Activated(*((5, 512) if few_rows else (66, 100)), (24,), dtype, dtype, activation)
    tensors, launches = launch.inputs("cpu"), []
    tensors["a0"] /= math.sqrt(launch.k)  # so that p is of the size where the activation bends
    with recorded_launches(names_of(launches), run=True):
        check(launch, "cpu", tensors)
    assert launches == ["down_kernel", "activate_parts_kernel"][: 1 + few_rows]


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("r", "dtype"), [(16, BF16), (16, FP32), (70, FP16), (70, FP32)])
def test_up_backward(activation, r, dtype):
    """Rank 16 in one pass over dY, where u has several parts, 70 in two, where f' takes no launch."""
    launches = []
    with recorded_launches(names_of(launches), run=True):
        check(UpBackward(70, 128, (r,), dtype, dtype, wants_sum=True, activation=activation), "cpu")
    passes = ["both_kernel", "activation_gradient_kernel"] if r == 16 else ["product_kernel"] * 2
    assert [name for name in launches if name != "sum_parts_kernel"] == passes


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

"""The kernels of u and dB: passes, parts, siblings; their values are in test_any_launch.py and tests/gpu."""

import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from inputs import BF16, FP16, FP32, ROUNDING, force_passes, randn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.launch_traffic import recorded_launches
from sibo_triton.kernels.partial_sums import sum_parts
from sibo_triton.kernels.siblings import UpGradients
from sibo_triton.kernels.targets import KNOWN
from sibo_triton.kernels.up_backward import up_backward_siblings
from sibo_triton.kernels.up_backward_plan import BYTES_OF_LAUNCH, bytes_moved, plan


@pytest.fixture(params=["one pass", "two passes"])
def passes(request, monkeypatch):
    """Both ways."""
    force_passes(monkeypatch, request.param)
    return request.param


def up_backward(grad_y, t, lora_b, scaling, wants_u=True, wants_grad_b=True):
    own = UpGradients(grad_y, t, lora_b, scaling, wants_u, FP32 if wants_grad_b else None)
    return up_backward_siblings([own])[0][:2]


@pytest.mark.parametrize(("g_dtype", "size"), [(FP16, 1e-30), (FP16, 1e30), (BF16, 1e-6)])
def test_float32_adapters_keep_float32(g_dtype, size, passes):
    """On a 16-bit model, at any scale of B and t: no float16 part underflows."""
    torch.manual_seed(0)
    grad_y, t, lora_b = randn(130, 129, g_dtype), torch.randn(130, 16) * size, torch.randn(129, 16) * size
    for out, g, w in zip(up_backward(grad_y, t, lora_b, 1.0), (grad_y, grad_y.T), (lora_b, t), strict=True):
        exact = g.double() @ w.double()
        assert float((out.double() - exact).norm() / exact.norm()) < 4e-5


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("g_dtype", "b_dtype", "value"),
    [(FP32, FP32, math.inf), (BF16, BF16, math.nan), (BF16, FP32, -math.inf), (FP16, FP32, math.inf)],
)
def test_what_is_not_finite_stays_so(g_dtype, b_dtype, value, passes):
    grad_y, t, lora_b = randn(70, 140, g_dtype), torch.randn(70, 12), randn(140, 12, b_dtype)
    grad_y[3, 139] = value
    u, grad_b = up_backward(grad_y, t, lora_b, 2.0)
    bad_u, bad_grad_b = torch.zeros(70, 12, dtype=torch.bool), torch.zeros(140, 12, dtype=torch.bool)
    bad_u[3] = bad_grad_b[139] = True
    assert torch.equal(~u.isfinite(), bad_u) and torch.equal(~grad_b.isfinite(), bad_grad_b)
    grad_y[3, 139] = 1.0
    lora_b[5, 7] = t[69, 11] = value
    u, grad_b = up_backward(grad_y, t, lora_b, 2.0)
    bad_u[:], bad_grad_b[:] = False, False
    bad_u[:, 7] = bad_grad_b[:, 11] = True
    assert torch.equal(~u.isfinite(), bad_u) and torch.equal(~grad_b.isfinite(), bad_grad_b)


@pytest.mark.parametrize(
    "parts", [(1, 2), (9, 1), (17, 8), (2, None), (None, 3), (1, 1), (None, None), (3,), (5, 2, 12)]
)
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (FP32, FP16, BF16)])
def test_sum_of_parts(parts, dtypes):
    """Rounded once: bfloat16 truncates in the interpreter."""
    shapes = ((100, 3), (7, 300), (257,))
    given = [None if n is None else torch.randn(n, *shape) for n, shape in zip(parts, shapes, strict=False)]
    totals = sum_parts(given, dtypes[: len(parts)])
    for of, total, dtype in zip(given, totals, dtypes, strict=False):
        assert (total is None) == (of is None)
        if of is not None:
            exact = of.double().sum(0)
            assert (total.dtype, total.shape, total.is_contiguous()) == (dtype, exact.shape, True)
            rounding = 0.0 if dtype == FP32 else ROUNDING[dtype]
            assert ((total.double() - exact).abs() <= 1.01 * rounding * exact.abs() + 3e-6).all()


def test_one_part_in_its_dtype_is_not_copied():
    part = torch.randn(1, 100)
    assert sum_parts([part], [FP32])[0].data_ptr() == part.data_ptr()


def test_passes_are_chosen_by_the_bytes_they_move():
    """A Llama-3-8B layer's shape, M = 8192 and N = 4096; dY alone has 64 MiB in 16 bits."""
    one_pass = plan(8192, 4096, 16, BF16, BF16, KNOWN["sm_90"]).both
    assert (one_pass.parts, one_pass.grad_b_parts) == (16, 8)
    mib = 2**20
    # dY, B, t; 16 parts of u, written and read, and their sum; 8 parts of dB, likewise.
    expected = 64 * mib + mib / 8 + mib / 2 + 33 * mib / 2 + 17 * mib / 4
    assert bytes_moved(8192, 4096, 16, 2, 2, 1, 16, 8) == expected
    for rank, dtypes, chosen in (
        (16, (BF16, FP32), True),
        (32, (BF16, BF16), True),
        (64, (BF16, BF16), False),
        (512, (BF16, FP32), False),
        (16, (FP32, FP32), True),
    ):
        assert (plan(8192, 4096, rank, *dtypes, KNOWN["sm_90"]).both is not None) is chosen, (rank, dtypes)


def test_a_launch_is_worth_some_bytes():
    """Of few columns two passes move as many bytes as one, and take a launch more."""
    target = KNOWN["sm_80"]
    chosen = plan(8192, 512, 16, BF16, BF16, target)
    sizes, both = (8192, 512, 16, 2, 2), chosen.both
    one = bytes_moved(*sizes, 1, both.parts, both.grad_b_parts)
    two = bytes_moved(*sizes, 2, chosen.u.parts, chosen.grad_b.parts)
    assert two <= one < two + BYTES_OF_LAUNCH
    # At rank 32 the parts of dB weigh more than a launch.
    assert plan(8192, 1024, 32, BF16, BF16, target).both is None


SIBLINGS = [
    # M, N, r, of B, scaling, u wanted, of dB
    (130, 300, 16, BF16, 2.0, True, BF16),
    (130, 70, 3, BF16, torch.tensor([0.5]), True, BF16),
    (66, 33, 24, FP32, 0.7, True, FP32),
    (66, 33, 16, FP16, -0.3, False, FP16),
    (130, 40, 70, FP32, 1.0, True, None),
    (0, 40, 16, BF16, 1.0, True, BF16),
    (40, 30, 0, BF16, 1.0, False, FP32),
]


def test_siblings(passes):
    """Each with its own dY, N, rank and dtypes; and all sums in one launch."""
    siblings, names = [], []
    for m, n, r, dtype, scaling, wants_u, grad_dtype in SIBLINGS:
        grad_y, t = randn(m, n, BF16 if dtype == FP32 else dtype), torch.randn(m, r)
        siblings.append(UpGradients(grad_y, t, randn(n, r, dtype), scaling, wants_u, grad_dtype))
    with recorded_launches(lambda launch: names.append(launch.name), run=True):
        results = up_backward_siblings(siblings)
    assert names.count("sum_parts_kernel") == 1 and names[-1] == "sum_parts_kernel"
    assert len(names) - 1 == (6 if passes == "one pass" else 8)  # dB is not wanted of one, and u not of another
    for (grad_y, t, lora_b, scaling, wants_u, grad_dtype, *_), (u, grad_b, _) in zip(siblings, results, strict=True):
        assert (u is not None, None if grad_b is None else grad_b.dtype) == (wants_u, grad_dtype)
        (alone,) = up_backward_siblings([UpGradients(grad_y, t, lora_b, scaling)])
        assert u is None or torch.equal(u, alone[0])
        if grad_b is not None:
            exact = alone[1].double()
            assert ((grad_b.double() - exact).abs() <= 1.01 * ROUNDING[grad_dtype] * exact.abs() + 2**-25).all()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "grad_y is torch.float64: the kernel takes torch.float16", {"grad_y": torch.zeros(4, 8).double()}),
        (TypeError, "t is torch.float64", {"t": torch.zeros(4, 2).double()}),
        (TypeError, "lora_b is torch.float64", {"lora_b": torch.zeros(8, 2).double()}),
        (ValueError, r"grad_y has shape \[4, 7\], but \[4, 8\] fits t and lora_b", {"grad_y": torch.zeros(4, 7)}),
        (ValueError, r"grad_y has shape \[5, 8\], but \[4, 8\] fits t and lora_b", {"grad_y": torch.zeros(5, 8)}),
        (ValueError, r"lora_b has shape \[8, 3\], but \[N, 2\] fits t", {"lora_b": torch.zeros(8, 3)}),
        (ValueError, r"t has shape \[4, 2\] and strides \(1, 4\)", {"t": torch.zeros(2, 4).T}),
        (ValueError, "t is None, but dB is wanted, or an activation: pass t", {"t": None}),
        (TypeError, "grad_dtype is torch.float64: the kernel takes torch.float16", {"grad_dtype": torch.float64}),
        (ValueError, r"scaling is a torch.float32 tensor of shape \[2\]", {"scaling": torch.zeros(2)}),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments):
    right = {"grad_y": torch.zeros(4, 8), "t": torch.zeros(4, 2), "lora_b": torch.zeros(8, 2), "scaling": 1.0}
    with pytest.raises(error, match=message):
        up_backward_siblings([UpGradients(**right | arguments)])

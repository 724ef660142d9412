"""The gradients of siblings that share x and h0, in shared passes: each against float64, as of a layer alone."""

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from gradients import absolute_terms, assert_close, gradients
from inputs import BF16, FP16, FP32, LAYOUTS, randn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.launch_traffic import recorded_launches
from sibo_triton.kernels import targets
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.down_weight_gradient_plan import plan
from sibo_triton.kernels.siblings import DownGradients
from sibo_triton.kernels.targets import KNOWN
from sibo_triton.ops import triton_backend as backend

M, K = 70, 136


def siblings_of(ranks, dtypes, lambdas, rates, grad_dtypes, rows=M, layout="contiguous"):
    return [
        DownGradients(torch.randn(rows, r), randn(r, K, dtype, layout), dtype, lambda_, p, torch.tensor([i - 7]), grad)
        for i, (r, dtype, lambda_, p, grad) in enumerate(zip(ranks, dtypes, lambdas, rates, grad_dtypes, strict=True))
    ]


def check(siblings, x, h0, dx_dtype, residual_dtype):
    """All results, each no further from float64's than torch's in the same dtypes, summed in float32, may be."""
    grads_a, dx, dh = backend.down_backward_siblings(siblings, x, h0, dx_dtype, residual_dtype)
    sums = {name: [0.0, 0.0, 0.0] for name in ("dx", "dh")}  # exact, terms, by torch
    for sibling, grad_a in zip(siblings, grads_a, strict=True):
        u, lora_a, adapter_dtype, lambda_, p, seed, grad_dtype = sibling
        rest = (u, x, lora_a, h0, lambda_, p, seed)
        exact_lambda = lambda_.double() if isinstance(lambda_, torch.Tensor) else lambda_
        read = {x.dtype, adapter_dtype} | ({h0.dtype} if sibling.mixes else set())
        exact = gradients(torch.float64, u, x, lora_a, h0, exact_lambda, p, seed)
        terms = absolute_terms(u, x, lora_a, h0, exact_lambda, p, seed)
        by_torch = gradients(adapter_dtype if len(read) == 1 else FP32, *rest)
        assert (grad_a is None) == (grad_dtype is None)
        if grad_a is not None:
            assert (grad_a.dtype, grad_a.shape, grad_a.is_contiguous()) == (grad_dtype, lora_a.shape, True)
            assert_close(grad_a, exact[0], terms[0], by_torch[0].to(grad_dtype), splits=len(read) > 1)
        for name, of in (("dx", 1), ("dh", 2)):
            for i, result in enumerate((exact, terms, by_torch)):
                if result[of] is not None:
                    sums[name][i] += result[of].double() if i < 2 else result[of].float()
    a_dtypes = {sibling.lora_a.dtype for sibling in siblings}
    splits = a_dtypes != {FP32} != {dx_dtype, residual_dtype} - {None} if len(a_dtypes) > 1 else a_dtypes == {FP32}
    for name, result, dtype in (("dx", dx, dx_dtype), ("dh", dh, residual_dtype)):
        assert (result is None) == (dtype is None)
        if result is not None:
            exact, terms, by_torch = sums[name]
            assert (result.dtype, result.is_contiguous()) == (dtype, True)
            assert_close(result, exact, terms, by_torch.to(dtype), splits)


TENSOR, OTHER = torch.tensor([0.3]), torch.tensor(0.65, dtype=BF16)


# Each with three siblings: ranks, dtypes of A, lambdas, rates, dtypes of dA; then of x, of h0, of dx and of dh0.
@pytest.mark.parametrize(
    ("ranks", "a_dtypes", "lambdas", "rates", "grad_dtypes", "x_dtype", "h0_dtype", "dx_dtype", "residual_dtype"),
    [
        # one tile of columns for all, with a lambda for each
        ((3, 16, 24), (FP16,) * 3, (0.3, TENSOR, 0.9), (0, 0, 0), (FP16,) * 3, FP16, FP16, FP16, None),
        ((16, 16, 16), (BF16,) * 3, (TENSOR, OTHER, 1.0), (0, 0, 0), (BF16,) * 3, BF16, BF16, BF16, BF16),
        ((1, 33, 9), (FP32,) * 3, (0.0, 0.0, 0.0), (0, 0, 0), (FP32,) * 3, FP32, FP32, FP32, None),
        ((8, 8, 8), (FP32,) * 3, (0.1, 0.2, TENSOR), (0, 0, 0), (FP32,) * 3, BF16, BF16, BF16, None),
        # a tile for each: masked, mixed first, or of many columns
        ((3, 16, 40), (FP16,) * 3, (0.3, TENSOR, 0.5), (0.1, 0.5, 0.05), (FP16,) * 3, FP16, FP16, FP16, FP16),
        ((16, 70, 200), (BF16,) * 3, (0.3, TENSOR, 0.9), (0, 0, 0), (FP32,) * 3, BF16, BF16, BF16, None),
        ((16, 70, 3), (FP32,) * 3, (0.3, TENSOR, 0.9), (0.1, 0.1, 0.1), (FP32,) * 3, FP32, FP32, FP32, FP32),
        ((16, 130, 64), (FP16,) * 3, (0.0, 0.0, 0.0), (0, 0, 0), (FP16,) * 3, FP16, FP16, FP16, None),
        # of several kinds
        ((3, 16, 24), (FP16,) * 3, (0.0, TENSOR, 0.9), (0, 0.3, 0), (FP16, None, FP32), FP16, FP16, FP16, FP16),
        ((16, 16, 8), (FP16, FP32, BF16), (0.3, 0.6, 0.0), (0, 0, 0.1), (FP16, FP32, FP32), FP16, BF16, FP16, FP16),
        ((16, 0, 8), (FP32,) * 3, (0.3, 0.6, 0.2), (0, 0, 0), (FP32, FP32, BF16), FP32, FP32, FP32, FP32),
        # dh0 alone, to which one has nothing to give; float32 results of 16-bit adapters
        ((16, 16, 8), (FP16,) * 3, (0.3, 0.0, 0.2), (0, 0, 0), (None,) * 3, FP16, FP16, None, FP32),
        ((16, 16, 8), (BF16,) * 3, (0.3, 0.0, 0.2), (0.2, 0.2, 0), (None,) * 3, BF16, BF16, FP32, FP16),
    ],
)
def test_siblings(ranks, a_dtypes, lambdas, rates, grad_dtypes, x_dtype, h0_dtype, dx_dtype, residual_dtype):
    torch.manual_seed(sum(ranks))
    x, h0 = randn(M, K, x_dtype), randn(M, K, h0_dtype)
    check(siblings_of(ranks, a_dtypes, lambdas, rates, grad_dtypes), x, h0, dx_dtype, residual_dtype)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70),
    ranks=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP16, BF16])] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    lambdas=st.tuples(*[st.sampled_from([0.0, 0.3, TENSOR])] * 4),
    rates=st.tuples(*[st.sampled_from([0.0, 0.2])] * 4),
    grad_dtypes=st.tuples(*[st.sampled_from([FP32, FP16, None])] * 4),
    wanted=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**16),
)
def test_any_siblings(rows, ranks, dtypes, layouts, lambdas, rates, grad_dtypes, wanted, seed):
    torch.manual_seed(seed)
    x_dtype, h0_dtype, a_dtype = dtypes
    x, h0 = randn(rows, K, x_dtype, layouts[0]), randn(rows, K, h0_dtype, layouts[1])
    n = len(ranks)
    own = siblings_of(ranks, [a_dtype] * n, lambdas[:n], rates[:n], grad_dtypes[:n], rows, layouts[2])
    wants_dh = wanted[1] and any(sibling.mixes for sibling in own)
    check(own, x, h0, x_dtype if wanted[0] else None, h0_dtype if wants_dh else None)


def test_siblings_share_launches():
    """A pass for dA of each kind, one that adds all parts of dA, and one pass for dx and dh0."""

    def launches(lambdas, rates, grad_dtypes=(BF16,) * 3):
        names = []
        own = siblings_of((16, 8, 16), (BF16,) * 3, lambdas, rates, grad_dtypes, rows=200)
        with recorded_launches(lambda launch: names.append(launch.name.removesuffix("_kernel")), run=True):
            backend.down_backward_siblings(own, x, h0, BF16, BF16 if any(lambdas) else None)
        return names

    x, h0 = randn(200, K, BF16), randn(200, K, BF16)
    rest = ["sum_parts", "down_input_gradient"]
    assert launches((0.1, 0.2, 0.3), (0, 0, 0)) == ["down_weight_gradient", *rest]
    assert launches((0.1, 0.2, 0.3), (0.1, 0.1, 0.2)) == ["down_weight_gradient", *rest]
    assert launches((0.0, 0.0, 0.0), (0, 0, 0)) == ["down_weight_gradient", *rest]
    assert launches((0.1, 0.0, 0.3), (0, 0, 0)) == ["down_weight_gradient"] * 2 + rest
    assert launches((0.1, 0.2, 0.3), (0, 0, 0), (None,) * 3) == ["down_input_gradient"]


def test_few_columns_share_a_tile(monkeypatch):
    """And x's loads; where they do not, as on AMD's GPUs, values are the same."""
    kind = (BF16, True, False)
    chosen = {name: plan((16, 16, 9), BF16, BF16, kind, target) for name, target in KNOWN.items()}
    assert {name for name, of in chosen.items() if of.shares_tiles} == set(KNOWN) - {"gfx942"}
    assert chosen["sm_90"].first == (0, 16, 32) and chosen["gfx942"].columns == 3 * chosen["gfx942"].config["BR"]
    for ranks, of_kind in (((16, 64), kind), ((16, 16), (BF16, True, True)), ((16,), kind)):
        assert not plan(ranks, BF16, BF16, of_kind, KNOWN["sm_90"]).shares_tiles
    x, h0 = randn(M, K, BF16), randn(M, K, BF16)
    own = siblings_of((16, 16, 9), (BF16,) * 3, (0.1, TENSOR, 0.3), (0, 0, 0), (FP32,) * 3)
    shared = down_weight_gradient(own, x, h0)
    monkeypatch.setattr(targets, "target_of", lambda device: KNOWN["gfx942"])
    for of, alone in zip(shared, down_weight_gradient(own, x, h0), strict=True):
        torch.testing.assert_close(of, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("rates", [(0, 0), (0.2, 0.2)])
def test_what_is_not_finite_stays_with_its_sibling(rates):
    """In dA; and out of dh0, if the sibling does not mix."""
    x, h0 = randn(M, K, FP32), randn(M, K, FP32)
    broken, other = siblings_of((16, 8), (FP16,) * 2, (0.0, 0.3), rates, (FP32,) * 2)
    broken.u[5] = math.inf
    h0[:, 3] = math.nan
    (bad, good), dx, dh = backend.down_backward_siblings([broken, other], x, h0, FP32, FP32)
    assert not bad.isfinite().any() and dh.isfinite().all()
    assert torch.equal(~good.isfinite(), (torch.arange(K) == 3).expand_as(good))
    assert torch.equal(~dx.isfinite(), (torch.arange(M) == 5)[:, None].expand_as(dx))


def test_what_siblings_cannot_be_is_named():
    one = DownGradients(torch.zeros(4, 2), torch.zeros(2, 8), FP32)
    for other, message in (
        (one._replace(u=torch.zeros(5, 2)), r"u has shape \[5, 2\], but \[4, r\] fits the other siblings"),
        (one._replace(lora_a=torch.zeros(2, 7)), r"lora_a has shape \[2, 7\], but \[2, 8\] fits u"),
    ):
        with pytest.raises(ValueError, match=message):
            down_input_gradient([one, other], dtype=FP32)
    with pytest.raises(ValueError, match="lambda_ is the number 0"):
        down_input_gradient([one, one], residual_dtype=FP32)
    with pytest.raises(ValueError, match="x is None, but dA is wanted: pass x, or grad_dtype=None"):
        backend.down_backward_siblings([one], None, None, FP32, None)

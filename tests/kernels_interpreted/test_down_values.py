"""The values of the down kernel against float64, where plain torch's error in the same dtypes is the yardstick."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from inputs import BF16, FP16, FP32, LAYOUTS, ROUNDING, randn

import sibo_triton.kernels.down as down_file
from sibo_triton import reference
from sibo_triton.kernels import targets
from sibo_triton.kernels.down import down, down_parts, down_siblings
from sibo_triton.kernels.down_plan import cut, plan, steps_of_split
from sibo_triton.kernels.siblings import DownProjection, rank_dtype
from sibo_triton.kernels.targets import KNOWN


def assert_as_good_as_torch(t, x, lora_a, h0, lambda_, dropout_p=0.0, seed=None, d=None):
    kept = rank_dtype(x.dtype, lora_a.dtype)
    assert (t.dtype, t.shape, t.is_contiguous()) == (kept, (x.shape[0], lora_a.shape[0]), True)
    rounding, twice = 0.0 if kept == FP32 else ROUNDING[kept], 2 if kept == BF16 else 1  # see ROUNDING
    h0_used = x if h0 is None else h0
    dtypes = {tensor.dtype for tensor in (x, lora_a, h0_used)}
    by_parts = len(dtypes) > 1 or (dtypes == {FP32} and torch.get_float32_matmul_precision() != "highest")
    dtype = FP32 if len(dtypes) > 1 else dtypes.pop()  # as torch needs one
    a64 = lora_a.double()

    def assert_one(result, weights, by_torch):
        """Against ``drop(weights[0] x + weights[1] h0) A^T``."""
        x64, h64 = (reference.dropout(tensor.double(), dropout_p, seed) for tensor in (x, h0_used))
        exact = (weights[0] * x64 + weights[1] * h64) @ a64.T
        terms = (abs(weights[0]) * x64.abs() + abs(weights[1]) * h64.abs()) @ a64.abs().T
        # Every element within float32's rounding of its terms, as the interpreter's dots are float32 whatever is in
        # memory; or within that of two bfloat16 parts, 2^-14 where the interpreter cuts off, in both factors.
        of_terms, underflow = 2e-4 if by_parts else 1e-6, 2**-24 if kept == FP16 else 1e-30
        assert ((result.double() - exact).abs() <= of_terms * terms + rounding * exact.abs() + underflow).all()
        # And all together no worse than torch.
        error, torch_error = (float((tensor.double() - exact).norm()) for tensor in (result, by_torch))
        margin = 1e-4 * float(terms.norm()) if by_parts else 1e-7 * float(exact.norm())
        margin += rounding * float(exact.norm()) if kept != dtype else 0.0
        assert error <= 1.2 * twice * torch_error + margin

    if t.numel() == 0:
        return
    x_one, a_one, h_one = x.to(dtype), lora_a.to(dtype), h0_used.to(dtype)
    by_torch = reference.down(x_one, a_one, h_one, lambda_, dropout_p, seed)
    assert_one(t, (1 - float(lambda_), float(lambda_)), by_torch)
    if d is not None:
        assert (d.dtype, d.shape, d.is_contiguous()) == (kept, t.shape, True)
        assert_one(d, (-1.0, 1.0), reference.down(h_one - x_one, a_one, None, 0.0, dropout_p, seed))


# Chosen so that each value meets most of the others' once.
@pytest.mark.parametrize(
    ("m", "k", "r", "x_dtype", "h0_dtype", "a_dtype", "lambda_", "dropout_p", "difference"),
    [
        (1, 1, 1, FP32, FP32, FP32, 0.3, 0.0, True),
        (64, 64, 16, BF16, BF16, BF16, 0.3, 0.0, False),
        (64, 64, 16, BF16, BF16, BF16, torch.tensor([0.3]), 0.05, True),
        (65, 63, 16, FP16, FP16, FP16, torch.tensor([0.3]), 0.1, False),
        (63, 65, 3, BF16, BF16, FP32, torch.tensor(0.7), 0.0, False),
        (63, 65, 24, BF16, BF16, FP32, torch.tensor(0.7), 0.05, True),
        (130, 200, 4, FP16, FP16, FP32, 1.0, 0.3, False),
        (7, 257, 8, FP32, BF16, FP32, 0.1, 0.5, False),
        (100, 96, 24, BF16, FP32, BF16, torch.tensor([0.1]), 0.0, False),
        (33, 130, 48, BF16, BF16, BF16, torch.tensor([0.0]), 0.9, True),
        (70, 129, 64, FP16, FP16, FP16, 0.9, 0.0, True),
        (70, 129, 64, FP32, FP32, FP32, torch.tensor([0.25], dtype=torch.float64), 0.05, True),
        (70, 129, 64, BF16, BF16, FP32, 0.3, 0.0, False),
        (66, 40, 65, BF16, BF16, BF16, torch.tensor([0.25], dtype=BF16), 0.05, False),
        (64, 33, 128, BF16, BF16, BF16, 0.3, 0.05, True),
        (64, 33, 128, BF16, FP32, FP16, 0.3, 0.05, True),
        (5, 70, 200, FP16, FP16, FP16, torch.tensor([0.3]), 0.0, False),
        (5, 40, 200, FP32, FP32, FP32, 0.3, 0.5, False),
        (65, 31, 257, BF16, BF16, BF16, 0.3, 0.0, False),
        (65, 31, 257, FP16, FP16, FP32, 0.3, 0.3, False),
        (2, 64, 512, BF16, BF16, FP32, 0.3, 0.05, False),
        (64, 96, 512, FP16, FP16, FP16, 0.5, 0.0, True),
    ],
)
def test_down(m, k, r, x_dtype, h0_dtype, a_dtype, lambda_, dropout_p, difference):
    x, h0, lora_a = randn(m, k, x_dtype), randn(m, k, h0_dtype), randn(r, k, a_dtype)
    seed = reference.draw_seed()
    t, d = down(x, lora_a, h0, lambda_, dropout_p, seed, difference)
    assert (d is not None) == difference
    assert_as_good_as_torch(t, x, lora_a, h0, lambda_, dropout_p, seed, d)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("r", [5, 130])
def test_plain_lora_does_not_read_h0(r, dtype):
    x, lora_a = randn(67, 70, dtype), randn(r, 70, dtype)
    without, _ = down(x, lora_a)
    assert_as_good_as_torch(without, x, lora_a, None, 0.0)
    assert torch.equal(down(x, lora_a, torch.full_like(x, math.nan), 0.0)[0], without)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 70), st.integers(0, 140), st.integers(0, 70)),
    dtypes=st.tuples(*[st.sampled_from([FP32, FP16, BF16])] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    lambda_=st.sampled_from([0.0, 0.1, 1.0]),
    lambda_is_tensor=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.05, 0.6]),
    difference=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_strides_and_dtypes(sizes, dtypes, layouts, lambda_, lambda_is_tensor, dropout_p, difference, seed):
    torch.manual_seed(seed)
    m, k, r = sizes
    shapes = ((m, k), (m, k), (r, k))
    x, h0, lora_a = (randn(*shape, *rest) for shape, *rest in zip(shapes, dtypes, layouts, strict=True))
    if lambda_is_tensor:
        lambda_ = torch.tensor([lambda_])
    drop_seed = reference.draw_seed()
    ((t, d),) = down_siblings(x, [DownProjection(lora_a, lambda_, dropout_p, drop_seed, difference)], h0)
    assert_as_good_as_torch(t, x, lora_a, h0, lambda_, dropout_p, drop_seed, d)


@pytest.mark.parametrize(("mixed", "dropout_p"), [(False, 0.3), (True, 0.0)])
def test_siblings_of_ragged_ranks(mixed, dropout_p):
    """Each has its own lambda and mask; 130 takes several tiles of the rank, 0 none."""
    x, h0 = randn(70, 130, BF16), randn(70, 130, BF16)
    dtypes = (BF16, FP32, BF16, FP32, BF16) if mixed else [BF16] * 5
    lambdas = (torch.tensor([0.3]), 0.0, 0.7, torch.tensor(0.1, dtype=FP32), 1.0)
    siblings = [
        DownProjection(randn(r, 130, dtype, layout), lambda_, dropout_p, reference.draw_seed(), r == 130 or not mixed)
        for r, dtype, layout, lambda_ in zip(
            (3, 130, 0, 16, 300), dtypes, ("transposed", *LAYOUTS), lambdas, strict=True
        )
    ]
    for sibling, (t, d) in zip(siblings, down_siblings(x, siblings, h0), strict=True):
        assert (d is not None) == sibling.difference
        rest = sibling.lambda_, sibling.dropout_p, sibling.dropout_seed, d
        assert_as_good_as_torch(t, x, sibling.lora_a, h0, *rest)


def test_siblings_of_one_kind_share_a_launch(monkeypatch):
    grids, launch = [], down_file._launch
    monkeypatch.setattr(down_file, "_launch", lambda *arguments: grids.append(1) or launch(*arguments))
    x, h0 = randn(4, 40, BF16), randn(4, 40, BF16)
    down_siblings(
        x, [DownProjection(randn(r, 40, BF16), lambda_) for r, lambda_ in ((3, 0.1), (16, 0.2), (8, 0.3))], h0
    )
    assert len(grids) == 1
    # One that does not mix must not meet what is not finite in h0.
    h0[0] = math.inf
    pair = [DownProjection(randn(16, 40, BF16), lambda_) for lambda_ in (0.1, 0.0)]
    (mixed, _), (plain, _) = down_siblings(x, pair, h0)
    assert len(grids) == 3 and not mixed[0].isfinite().any() and plain.isfinite().all()


@pytest.mark.parametrize(
    ("k", "dtype", "dropout_p"), [(512, BF16, 0.0), (500, BF16, 0.3), (128, FP32, 0.3), (125, FP32, 0.0)]
)
def test_few_rows_are_split_along_k(k, dtype, dropout_p, monkeypatch):
    x, h0 = randn(5, k, dtype), randn(5, k, dtype)
    siblings = [
        DownProjection(randn(r, k, dtype), torch.tensor(lambda_), dropout_p, reference.draw_seed(), difference=True)
        for r, lambda_ in ((3, 0.2), (16, 0.4))
    ]
    cuts = []
    monkeypatch.setattr(targets, "target_of", lambda device: KNOWN["sm_90"])
    monkeypatch.setattr(down_file, "cut", lambda *sizes: cuts.append(cut(*sizes)) or cuts[-1])
    results = down_siblings(x, siblings, h0)
    assert len(cuts) == 1 and cuts[0].splits > 1
    for sibling, (t, d) in zip(siblings, results, strict=True):
        rest = sibling.lambda_, sibling.dropout_p, sibling.dropout_seed, d
        assert_as_good_as_torch(t, x, sibling.lora_a, h0, *rest)
    for again, before in zip(down_siblings(x, siblings, h0), results, strict=True):
        assert all(map(torch.equal, again, before))


def test_steps_of_split():
    assert steps_of_split(132, 64, 132) == steps_of_split(99, 64, 132) == 64  # enough rows, or nearly
    assert steps_of_split(1000, 63, 132) == 63
    assert steps_of_split(1, 3, 132) == 3  # too short
    for steps in (7, 64, 65, 230):
        of_rows = {programs: steps_of_split(programs, steps, 132) for programs in range(1, 99)}
        assert set(of_rows.values()) <= {4, 8, 16, 32, 64, 128, steps}, "few kernels to compile"
        for programs, of_split in of_rows.items():
            last = steps % of_split > 0  # a split that has less to do
            assert programs * (math.ceil(steps / of_split) - last) <= 2 * 132
            assert of_split == 4 or programs * steps / of_split > 132 * 0.9


def test_two_products_are_more_exact_than_torch_by_orders_of_magnitude(monkeypatch):
    """Mixing the accumulators rounds nothing to 16 bits: parts of the sums are float32, and rounded once, at last."""
    monkeypatch.setattr(targets, "target_of", lambda device: KNOWN["sm_90"])
    x, h0, lora_a = (randn(rows, 512, BF16) for rows in (64, 64, 16))
    exact = reference.down(x.double(), lora_a.double(), h0.double(), 0.3)
    error, torch_error = (
        float((t.double() - exact).norm() / exact.norm())
        for t in (down_parts(x, [DownProjection(lora_a, 0.3)], h0)[0].sum(0), reference.down(x, lora_a, h0, 0.3))
    )
    assert error < 1e-6 < 1e-3 < torch_error


@pytest.mark.parametrize(
    ("x_dtype", "a_dtype", "scale"),
    [(BF16, FP32, 1e12), (BF16, FP32, 1e-12), (FP16, FP32, 1e12), (FP16, FP32, 1e-12), (FP32, BF16, 1.0)],
)
@pytest.mark.parametrize("r", [16, 70])
def test_fp32_operands_keep_their_precision(r, x_dtype, a_dtype, scale):
    """Whatever the magnitude: no part under- or overflows."""
    x, h0, lora_a = randn(64, 500, x_dtype), randn(64, 500, x_dtype), scale * randn(r, 500, a_dtype)
    exact = reference.down(x.double(), lora_a.double(), h0.double(), 0.3)
    error = (down(x, lora_a, h0, 0.3)[0].double() - exact).norm() / exact.norm()
    # 1e-4 is asked, and a GPU rounds better than the interpreter, which cuts off. But a float32 operand that is not
    # split would show no error at all here: the interpreter's dots are float32.
    assert 1e-6 < error < 4e-5


@pytest.mark.parametrize(("precision", "difference"), [("high", False), ("medium", True)])
def test_float32_follows_torchs_matmul_precision(difference, precision):
    x, h0, lora_a = (randn(rows, 130, FP32) for rows in (60, 60, 24))
    own = [DownProjection(lora_a, 0.3, 0.1, reference.draw_seed(), difference)]
    ((highest, _),) = down_siblings(x, own, h0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        ((t, d),) = down_siblings(x, own, h0)
        assert not torch.equal(t, highest)
        assert_as_good_as_torch(t, x, lora_a, h0, 0.3, 0.1, own[0].dropout_seed, d)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("x_dtype", "a_dtype", "r", "lambda_", "dropout_p"),
    [
        (FP32, FP32, 16, 0.3, 0.5),
        (FP32, FP32, 128, 1.0, 0.0),
        (BF16, BF16, 16, 1.0, 0.5),
        (BF16, FP32, 16, 0.3, 0.5),
        (BF16, FP32, 128, 1.0, 0.5),
        (FP16, FP32, 16, 0.3, 0.0),
    ],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_stays_in_its_row(value, x_dtype, a_dtype, r, lambda_, dropout_p):
    """Under the mask too."""
    seed = reference.draw_seed()
    x, h0, lora_a = randn(70, 40, x_dtype), randn(70, 40, x_dtype), randn(r, 40, a_dtype)
    x[3] = value if dropout_p == 0 else torch.where(reference.dropout_mask(70, 40, dropout_p, seed)[3], x[3], value)
    h0[66, 0] = value
    bad = ~down(x, lora_a, h0, lambda_, dropout_p, seed)[0].isfinite()
    rows = torch.zeros(70, dtype=torch.bool)
    rows[[3, 66]] = True
    assert torch.equal(bad, rows[:, None].expand_as(bad))
    x[3], h0[66], lora_a[5, 7] = 1, 1, value
    bad = ~down(x, lora_a, h0, lambda_, dropout_p, seed)[0].isfinite()
    assert bad[:, 5].all() and not bad[:, :5].any() and not bad[:, 6:].any()


@pytest.mark.parametrize("target", KNOWN.values(), ids=KNOWN)
def test_tiles_pad_every_rank(target):
    for x_dtype in (FP16, BF16, FP32):
        for a_dtype in (x_dtype, FP32):
            for rank in range(1, 513):
                BR = plan(rank, x_dtype, x_dtype, (a_dtype, True, True, rank % 2 == 0, False, None), target).config[
                    "BR"
                ]
                assert BR >= 16 and BR & (BR - 1) == 0 and (BR >= rank or BR >= 32)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "initial_residual is None, but lambda_ is 0.5", {"initial_residual": None}),
        (ValueError, r"initial_residual has shape \[4, 1\]", {"initial_residual": torch.zeros(4, 1)}),
        (ValueError, r"lora_a has shape \[2, 7\]", {"lora_a": torch.zeros(2, 7)}),
        (ValueError, r"x has shape \[2, 4, 8\]", {"x": torch.zeros(2, 4, 8)}),
        (ValueError, "dropout_p is 1.0", {"dropout_p": 1.0}),
        (ValueError, "dropout_p is 0.5, and the seed None: pass", {"dropout_p": 0.5}),
        (ValueError, "pass one int64 value", {"dropout_p": 0.5, "dropout_seed": torch.zeros(1)}),
        (TypeError, "lora_a is torch.float64: the kernel takes torch.float16", {"lora_a": torch.zeros(2, 8).double()}),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments):
    right = {"x": torch.zeros(4, 8), "lora_a": torch.zeros(2, 8), "initial_residual": torch.zeros(4, 8), "lambda_": 0.5}
    with pytest.raises(error, match=message):
        down(**right | arguments)

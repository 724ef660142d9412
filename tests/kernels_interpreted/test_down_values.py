"""The down kernel: what is split, shared and not read; its values are in test_any_launch.py and tests/gpu."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from inputs import BF16, FP16, FP32, LAYOUTS, randn
from kernel_launches import Down
from kernel_yardstick import check

import sibo_triton.kernels.down as down_file
from sibo_triton import reference
from sibo_triton.kernels import targets
from sibo_triton.kernels.down import down_parts, down_siblings
from sibo_triton.kernels.down_plan import cut, plan, steps_of_split
from sibo_triton.kernels.siblings import DownProjection
from sibo_triton.kernels.targets import KNOWN


def down(x, lora_a, initial_residual=None, *projection, **options):
    """t and d of one layer."""
    return down_siblings(x, [DownProjection(lora_a, *projection, **options)], initial_residual)[0]


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("r", [5, 130])
def test_plain_lora_does_not_read_h0(r, dtype):
    x, lora_a = randn(67, 70, dtype), randn(r, 70, dtype)
    without, _ = down(x, lora_a)
    assert torch.equal(down(x, lora_a, torch.full_like(x, math.nan), 0.0)[0], without)


@pytest.mark.parametrize(("mixed", "dropout_p"), [(False, 0.3), (True, 0.0)])
def test_siblings_of_ragged_ranks(mixed, dropout_p):
    """As each alone, with its own lambda and mask; 130 takes several tiles of the rank, 0 none."""
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
        ((alone, alone_d),) = down_siblings(x, [sibling], h0)
        torch.testing.assert_close(t, alone, rtol=2**-7, atol=1e-2)
        torch.testing.assert_close(d, alone_d, rtol=2**-7, atol=1e-2)


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
    cuts = []
    monkeypatch.setattr(targets, "target_of", lambda device: KNOWN["sm_90"])
    monkeypatch.setattr(down_file, "cut", lambda *sizes: cuts.append(cut(*sizes)) or cuts[-1])
    check(Down(5, k, (3, 16), dtype, dtype, 0.4, dropout_p, difference=True, lambda_is_tensor=True), "cpu")
    assert len(cuts) == 1 and cuts[0].splits > 1


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
    ((highest, highest_d),) = down_siblings(x, own, h0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        ((t, d),) = down_siblings(x, own, h0)
        for found, exact in ((t, highest), (d, highest_d)):
            assert found is None or 1e-6 < (found - exact).norm() / exact.norm() < 4e-5
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

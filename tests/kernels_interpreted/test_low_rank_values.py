"""Siblings' low-rank products for few rows: how many launches they take; their values are in test_any_launch.py."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from inputs import BF16, FP16, FP32, randn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.launch_traffic import recorded_launches
from sibo_triton.kernels import targets
from sibo_triton.kernels.down import down_parts, down_siblings
from sibo_triton.kernels.few_rows import low_rank_siblings
from sibo_triton.kernels.siblings import DownProjection, UpProjection
from sibo_triton.kernels.targets import KNOWN
from sibo_triton.kernels.up import up

SEED = torch.tensor([11])


@pytest.fixture(autouse=True)
def many_multiprocessors(monkeypatch):
    """So that K is cut."""
    monkeypatch.setattr(targets, "target_of", lambda device: KNOWN["sm_90"])


def group(x_dtype, a_dtypes, b_dtypes, ranks, widths, lambdas, rates, biases, k):
    siblings = [
        DownProjection(randn(r, k, dtype), lambda_, p, SEED + i)
        for i, (r, dtype, lambda_, p) in enumerate(zip(ranks, a_dtypes, lambdas, rates, strict=True))
    ]
    ups = []
    for n, r, dtype, (scaling, has_lora_bias, has_base_bias) in zip(widths, ranks, b_dtypes, biases, strict=True):
        lora_bias = randn(n, 1, dtype, "padded")[:, 0] if has_lora_bias else None  # a stride of 2
        ups.append(
            UpProjection(randn(n, r, dtype), scaling, lora_bias, randn(1, n, x_dtype)[0] if has_base_bias else None)
        )
    return siblings, ups


NO_BIAS = [(2.0, False, False), (0.5, False, False), (torch.tensor([-0.7]), False, False)]
BIASES = [(torch.tensor(0.7), True, True), (0.5, False, True), (1.5, True, False)]


def test_siblings_of_several_kinds():
    """As each alone, with its own dtype, lambda and mask."""
    x, h0 = randn(3, 600, BF16), randn(3, 600, FP16)
    dtypes = (BF16, FP32, FP16)
    siblings, ups = group(BF16, dtypes, dtypes, (16, 8, 5), (140, 30, 70), (0.3, 0.6, 0.0), (0.2, 0, 0.5), BIASES, 600)
    for y, *one in zip(low_rank_siblings(x, siblings, ups, h0, BF16), siblings, ups, strict=True):
        (alone,) = low_rank_siblings(x, *([of] for of in one), h0, BF16)
        torch.testing.assert_close(y, alone, rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize("m", [1, 130])
def test_a_group_takes_two_launches(m):
    names, x, h0 = [], randn(m, 1000, BF16), randn(m, 1000, BF16)
    rest = ((16, 16, 16), (256, 64, 64), (0.1, 0.2, 0.3), (0, 0, 0), NO_BIAS, 1000)
    siblings, ups = group(BF16, [BF16] * 3, [BF16] * 3, *rest)
    with recorded_launches(lambda launch: names.append(launch.name), run=True):
        low_rank_siblings(x, siblings, ups, h0, BF16)
    assert names == ["down_kernel", "up_siblings_kernel"]
    assert len(down_parts(x, siblings, h0)[0]) > 1


def test_one_part_gives_what_the_two_steps_give(monkeypatch):
    """Up to the last bit: the interpreter's products depend on where NumPy has put their operands."""
    monkeypatch.setattr(targets, "target_of", lambda device: targets.STAND_IN)
    x, h0 = randn(9, 300, FP16), randn(9, 300, FP16)
    rest = ((16, 70, 3), (140, 64, 30), (0.1, 0.2, 0.0), (0, 0, 0), BIASES, 300)
    siblings, ups = group(FP16, [FP16] * 3, [FP16] * 3, *rest)
    ys = low_rank_siblings(x, siblings, ups, h0, FP16)
    for y, (t, _), (lora_b, s, lora_bias, base_bias) in zip(ys, down_siblings(x, siblings, h0), ups, strict=True):
        expected = up(t, lora_b, s, FP16, lora_bias, base_bias)
        torch.testing.assert_close(y, expected, atol=2**-9, rtol=2**-10)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"lora_b has shape \[8, 3\], but \[N, 2\] fits lora_a", {"lora_b": torch.zeros(8, 3)}),
        (ValueError, r"lora_bias has shape \[7\], but \[8\] fits lora_b", {"lora_bias": torch.zeros(7)}),
        (ValueError, r"base_bias has shape \[1\], but \[8\] fits lora_b", {"base_bias": torch.zeros(1)}),
        (ValueError, r"scaling is a torch.float32 tensor of shape \[2\]", {"scaling": torch.zeros(2)}),
        (TypeError, "lora_b is torch.float64", {"lora_b": torch.zeros(8, 2).double()}),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments):
    right = {"lora_b": torch.zeros(8, 2), "scaling": 1.0}
    siblings = [DownProjection(torch.zeros(2, 5))]
    with pytest.raises(error, match=message):
        low_rank_siblings(torch.zeros(4, 5), siblings, [UpProjection(**right | arguments)], None, FP32)
    with pytest.raises(TypeError, match="y is torch.float64"):
        low_rank_siblings(torch.zeros(4, 5), siblings, [UpProjection(**right)], None, torch.float64)
    with pytest.raises(ValueError):
        low_rank_siblings(torch.zeros(4, 5), siblings, [], None, FP32)

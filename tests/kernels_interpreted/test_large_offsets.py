"""Addresses past 2^31 elements, in everything that a launcher reads or writes: the last program of a launch alone.

The tensors take gigabytes of address space; only what that program touches is ever backed by memory.
"""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from inputs import FP16, FP32, randn
from triton.runtime import interpreter

from sibo_triton.kernels import (
    down,
    down_input_gradient,
    down_weight_gradient,
    few_rows,
    partial_sums,
    targets,
    up,
    up_backward,
    up_backward_plan,
)
from sibo_triton.kernels.siblings import DownGradients, DownProjection, UpGradients, UpProjection

LONG = 2**22 + 70  # rows, of which the last tile has 6
RANK = 512
END = 6


class LastProgram:
    """Stands for a kernel, and runs the last program of each launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        last = tuple(size - 1 for size in (*grid, 1, 1)[:3])

        def launch(**arguments):
            def set_last(builder, *_):
                builder.grid_idx = last

            with mock.patch.object(interpreter.InterpreterBuilder, "set_grid_idx", set_last):
                self.kernel[(1,)](**arguments)

        return launch


@pytest.fixture(autouse=True)
def last_programs(monkeypatch):
    try:
        np.empty(18 * 2**30, dtype=np.uint8)
    except MemoryError:
        pytest.skip("no 18 GiB of address space")
    monkeypatch.undo()  # so that torch.empty touches no memory
    for module in (down, down_input_gradient, down_weight_gradient, few_rows, partial_sums, up, up_backward):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, LastProgram(getattr(module, name)))


def plan_for(monkeypatch, multiprocessors):
    """The more multiprocessors, the shorter the sum of a program."""
    target = dataclasses.replace(targets.STAND_IN, multiprocessors=multiprocessors)
    monkeypatch.setattr(targets, "target_of", lambda device: target)


def parts_instead_of_sums(monkeypatch, module):
    monkeypatch.setattr(module, "sum_parts", lambda parts, dtypes: list(parts))


def tall(rows, cols, dtype):
    """Random in the last rows, elsewhere the zeros of untouched memory, which torch.zeros would touch."""
    tensor = torch.from_numpy(np.zeros((rows, cols), dtype=str(dtype).removeprefix("torch.")))
    tensor[-END:] = torch.randn(END, cols).to(dtype)
    return tensor


def assert_end(result, exact):
    torch.testing.assert_close(result.double(), exact, rtol=2e-3, atol=2e-3 * float(exact.abs().max()))


def test_up():
    t, lora_b, base = tall(LONG, RANK, FP32), randn(520, RANK, FP16), tall(LONG, 520, FP16)
    y = up.add_up(base, t, lora_b, 0.5)
    assert y.numel() > 2**31
    exact = base[-END:].double() + 0.5 * t[-END:].double() @ lora_b.double().T
    assert_end(y[-END:, -8:], exact[:, -8:])


def test_up_of_siblings(monkeypatch):
    """y past 2^31, and the third part of t."""
    rank, siblings = 256, [DownProjection(randn(256, 1, FP16))]
    t = tall(3 * LONG, rank, FP32).view(3, LONG, rank)
    t[:2, -END:] = torch.randn(2, END, rank)
    assert t.stride(0) * 2 > 2**31
    monkeypatch.setattr(few_rows, "down_parts", lambda *arguments: [t])
    lora_b = randn(520, rank, FP16)
    (y,) = few_rows.low_rank_siblings(tall(LONG, 1, FP16), siblings, [UpProjection(lora_b, 0.5)], None, FP16)
    assert y.numel() > 2**31
    assert_end(y[-END:, -8:], 0.5 * t[:, -END:].double().sum(0) @ lora_b[-8:].double().T)


def test_input_gradient():
    u, lora_a = tall(LONG, RANK, FP32), randn(RANK, 520, FP16)
    pair = [DownGradients(u, lora_a, FP16, lambda_) for lambda_ in (0.25, 0.0)]
    dx, dh = down_input_gradient.down_input_gradient(pair, dtype=FP16, residual_dtype=FP16)
    exact = (u[-END:].double() @ lora_a.double())[:, -8:]
    assert_end(dx[-END:, -8:], 1.75 * exact)
    assert_end(dh[-END:, -8:], 0.25 * exact)


def test_down():
    """t past 2^31, and d behind it."""
    x, h0, lora_a = tall(LONG, 72, FP16), tall(LONG, 72, FP16), randn(RANK, 72, FP16)
    ((t, d),) = down.down_siblings(x, [DownProjection(lora_a, 0.25, difference=True)], h0)
    assert t.numel() > 2**31
    x, h0, last = x[-END:].double(), h0[-END:].double(), slice(-128, None)  # the last tile of the rank
    assert_end(t[-END:, last], (0.75 * x + 0.25 * h0) @ lora_a[last].double().T)
    assert_end(d[-END:, last], (h0 - x) @ lora_a[last].double().T)


def test_weight_gradient(monkeypatch):
    plan_for(monkeypatch, 2**20)
    parts_instead_of_sums(monkeypatch, down_weight_gradient)
    u, x = tall(LONG, RANK, FP32), tall(LONG, 72, FP16)
    (partial,) = down_weight_gradient.down_weight_gradient([DownGradients(u, None, FP16)], x)
    assert partial.numel() > 2**31
    exact = u[-END:].double().T @ x[-END:].double()
    assert_end(partial[-1, -128:, -8:], exact[-128:, -8:])


@pytest.mark.parametrize(
    ("rows", "columns", "multiprocessors"), [(LONG, 16898, 4096 * 34 // 2), (2**20 + 70, 8194, 2**22)]
)
def test_both_gradients_of_up(rows, columns, multiprocessors, monkeypatch):
    """In one pass: the parts of u past 2^31, or those of dB. Of the last tile's 512 columns there are two."""
    plan_for(monkeypatch, multiprocessors)
    parts_instead_of_sums(monkeypatch, up_backward)
    plan = up_backward.plan
    launch = up_backward_plan.launch_of_both

    def one_pass(M, N, r, *rest):
        chosen = plan(M, N, r, *rest)
        both = launch(M, N, r, chosen.dot_u, chosen.dot_grad_b, 2, targets.target_of(None))
        return dataclasses.replace(chosen, both=both)

    monkeypatch.setattr(up_backward, "plan", one_pass)
    grad_y, t, lora_b = randn(rows, columns, FP16, "expanded"), tall(rows, 16, FP32), randn(columns, 16, FP16)
    ((u, grad_b, _),) = up_backward.up_backward_siblings([UpGradients(grad_y, t, lora_b, 0.5)])
    assert max(u.numel(), grad_b.numel()) > 2**31
    assert_end(u[-1, -END:], 0.5 * grad_y[-END:, -2:].double() @ lora_b[-2:].double())
    assert_end(grad_b[-1, -2:], 0.5 * grad_y[-END:, -2:].double().T @ t[-END:].double())


def test_each_gradient_of_up(monkeypatch):
    """In two passes: u past 2^31, and t for dB."""
    plan_for(monkeypatch, 2**20)
    parts_instead_of_sums(monkeypatch, up_backward)
    grad_y, t, lora_b = tall(LONG, 24, FP16), tall(LONG, RANK, FP32), randn(24, RANK, FP16)
    ((u, grad_b, _),) = up_backward.up_backward_siblings([UpGradients(grad_y, t, lora_b, 0.5)])
    assert_end(u[-1, -END:, -128:], 0.5 * grad_y[-END:].double() @ lora_b[:, -128:].double())
    assert_end(grad_b[-1, :, -128:], 0.5 * grad_y[-END:].double().T @ t[-END:, -128:].double())


def test_sum_of_parts():
    parts = torch.empty(2, 2**31 + 70)
    parts[:, -70:] = torch.randn(2, 70)
    (total,) = partial_sums.sum_parts([parts], [FP32])
    assert_end(total[-70:], parts[:, -70:].double().sum(0))

"""The traffic benchmark's count of each launch against what the interpreter launches, loads, stores and multiplies."""

import dataclasses
import sys
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="triton is not installed")

import triton
from inputs import BF16, FP16, FP32
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.counting import counted
from benchmarks.launch_traffic import recorded_launches
from sibo_triton.kernels import targets
from sibo_triton.kernels.down import down_siblings
from sibo_triton.kernels.down_input_gradient import down_input_gradient
from sibo_triton.kernels.down_weight_gradient import down_weight_gradient
from sibo_triton.kernels.few_rows import low_rank_siblings
from sibo_triton.kernels.siblings import DownGradients, DownProjection, UpGradients, UpProjection
from sibo_triton.kernels.up_backward import up_backward_siblings
from sibo_triton.ops import LoraArguments, add_lora, lora_linear, lora_linear_group

SM_90 = targets.KNOWN["sm_90"]  # with many multiprocessors, sums are cut into parts
M, K, N = 80, 200, 270


class Interpreted:
    """What the interpreter's programs do, summed for each launch."""

    def __init__(self, target=SM_90):
        self.target = target
        self.launches = []  # as modelled
        self.done = []  # [loaded, stored, flops]
        self.programs = []

    def begin(self, launch):
        self.launches.append(launch)
        self.done.append([0, 0, 0])
        self.programs.append(set())

    def __enter__(self):
        builder = interpreter.InterpreterBuilder
        load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
        place = builder.set_grid_idx

        def bytes_of(pointers, mask):
            lanes = np.broadcast_to(mask.data, pointers.data.shape).sum()
            return int(lanes) * pointers.get_element_ty().primitive_bitwidth // 8

        def counted_load(self_, pointers, mask, *rest):
            self.done[-1][0] += bytes_of(pointers, mask)
            return load(self_, pointers, mask, *rest)

        def counted_store(self_, pointers, value, mask, *rest):
            self.done[-1][1] += bytes_of(pointers, mask)
            return store(self_, pointers, value, mask, *rest)

        def counted_dot(self_, a, b, *rest):
            self.done[-1][2] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
            return dot(self_, a, b, *rest)

        def counted_place(self_, *indices):
            self.programs[-1].add(indices)
            return place(self_, *indices)

        patches = [
            mock.patch.object(builder, "create_masked_load", counted_load),
            mock.patch.object(builder, "create_masked_store", counted_store),
            mock.patch.object(builder, "create_dot", counted_dot),
            mock.patch.object(builder, "set_grid_idx", counted_place),
            mock.patch.object(targets, "target_of", lambda device: self.target),
            recorded_launches(self.begin, run=True),
        ]
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self.stack.__exit__(*error)

    def assert_as_modelled(self):
        assert self.launches
        for launch, done, programs in zip(self.launches, self.done, self.programs, strict=True):
            assert [launch.loaded, launch.written, launch.flops] == done, launch
            assert len(programs) == np.prod(launch.grid), launch


def layer_inputs(dtype, adapter_dtype, r, learns):
    """x, h0, W0, A, B, b_B, lambda and a seed."""
    x, h0, weight = (torch.randn(*shape).to(dtype) for shape in ((M, K), (M, K), (N, K)))
    a, b, bias = (torch.randn(*shape).to(adapter_dtype) for shape in ((r, K), (N, r), (N,)))
    lambda_, seed = torch.tensor([0.3]), torch.tensor([5])
    for tensor in (x, a, b, bias) + ((h0, lambda_) if learns else ()):
        tensor.requires_grad_()
    return x, h0, weight, a, b, bias, lambda_, seed


def run_layer(x, h0, weight, a, b, bias, lambda_, seed, mixes, dropout_p):
    h0, lambda_ = (h0, lambda_) if mixes else (None, 0.0)
    y = lora_linear(x, weight, None, a, b, 2.0, h0, lambda_, dropout_p, seed, bias)
    y.backward(torch.ones_like(y))


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "r", "mixes", "dropout_p", "learns"),
    [
        (BF16, BF16, 16, False, 0.0, False),
        (BF16, BF16, 16, True, 0.0, False),
        (BF16, FP32, 5, True, 0.05, False),
        (BF16, FP32, 16, True, 0.05, True),
        (FP16, FP16, 40, True, 0.0, True),
        (BF16, BF16, 130, True, 0.05, False),
        (FP32, FP32, 70, True, 0.0, False),
    ],
)
def test_a_layer(dtype, adapter_dtype, r, mixes, dropout_p, learns):
    """Forward and backward: the launches on fake tensors are those that the interpreter makes, with all their bytes."""
    inputs = layer_inputs(dtype, adapter_dtype, r, learns)
    with Interpreted() as interpreted:
        run_layer(*inputs, mixes, dropout_p)
    interpreted.assert_as_modelled()
    with FakeTensorMode() as mode, counted(SM_90) as operations:
        run_layer(*(mode.from_tensor(tensor) for tensor in inputs), mixes, dropout_p)
    assert [of for of in operations if of.grid is not None] == interpreted.launches


@pytest.mark.parametrize(("adapter_dtype", "dropout_p"), [(BF16, 0.0), (FP32, 0.05)])
def test_siblings(adapter_dtype, dropout_p):
    """Likewise of q, k and v, of which two mix: what they share is launched, and counted, once."""
    x, h0 = (torch.randn(M, K).to(BF16).requires_grad_() for _ in range(2))
    layers = []
    for n, r, mixes in ((N, 16, True), (40, 16, True), (40, 4, False)):
        weight, a, b = (torch.randn(*shape) for shape in ((n, K), (r, K), (n, r)))
        layer = {
            "weight": weight.to(BF16),
            "lora_a": a.to(adapter_dtype).requires_grad_(),
            "lora_b": b.to(adapter_dtype).requires_grad_(),
            "dropout_seed": torch.tensor([n]),
        }
        layers.append(layer | ({"initial_residual": h0, "lambda_": 0.3} if mixes else {}))

    def run(x, layers):
        group = lora_linear_group(
            x, [LoraArguments(**layer, bias=None, scaling=2.0, dropout_p=dropout_p) for layer in layers]
        )
        ys = [group.output(i) for i in range(len(layers))]
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])

    with Interpreted() as interpreted:
        run(x, layers)
    interpreted.assert_as_modelled()
    with FakeTensorMode() as mode, counted(SM_90) as operations:
        fake_layers = [
            {name: value if isinstance(value, float) else mode.from_tensor(value) for name, value in layer.items()}
            for layer in layers
        ]
        run(mode.from_tensor(x), fake_layers)  # of one tensor, as h0, always the same fake one
    assert [of for of in operations if of.grid is not None] == interpreted.launches


def test_a_base_output_of_any_layer():
    x, h0, weight, a, b, bias, lambda_, seed = layer_inputs(BF16, FP32, 16, False)
    with Interpreted() as interpreted:
        add_lora(torch.randn(M, N).to(BF16), x, a, b, torch.tensor([2.0]), h0, lambda_, 0.1, seed, bias)
    assert [of.name for of in interpreted.launches][-1] == "up_kernel"
    interpreted.assert_as_modelled()


@pytest.mark.parametrize(("mixes", "dropout_p"), list(product((False, True), (0.0, 0.05))))
def test_siblings_and_a_gradient_to_add_to(mixes, dropout_p):
    x, h0, _, _, _, _, lambda_, seed = layer_inputs(BF16, BF16, 16, False)
    shares = lambda_ if mixes else 0.0
    with Interpreted() as interpreted, torch.no_grad():
        down_siblings(x, [DownProjection(torch.randn(r, K), shares, dropout_p, seed) for r in (3, 200, 16)], h0)
        own = DownGradients(torch.randn(M, 16), torch.randn(16, K), BF16, shares, dropout_p, seed)
        down_input_gradient([own], dtype=BF16, base=torch.zeros(M, K, dtype=BF16))
    interpreted.assert_as_modelled()


def test_siblings_of_few_rows():
    x, h0, *_ = layer_inputs(BF16, BF16, 16, False)
    siblings = [DownProjection(torch.randn(r, K), share) for r, share in ((3, 0.3), (70, torch.tensor([0.1])))]
    ups = [
        UpProjection(torch.randn(N, 3), 2.0),
        UpProjection(torch.randn(40, 70), torch.tensor([0.5]), torch.randn(40)),
    ]
    with Interpreted() as interpreted:
        low_rank_siblings(x[:5], siblings, ups, h0[:5], BF16)
    assert [of.name for of in interpreted.launches] == ["down_kernel", "up_siblings_kernel"]
    interpreted.assert_as_modelled()


@pytest.mark.parametrize(
    ("mixes", "dropout_p", "ranks"),
    [(False, 0.0, (3, 200, 16)), (False, 0.05, (3, 16, 24)), (True, 0.0, (3, 16, 24)), (True, 0.05, (3, 200, 16))],
)
def test_gradients_of_siblings(mixes, dropout_p, ranks):
    """One of them neither mixes nor drops."""
    x, h0, _, _, _, _, lambda_, seed = layer_inputs(BF16, BF16, 16, False)
    with Interpreted() as interpreted, torch.no_grad():
        ups = [
            UpGradients(torch.randn(M, n), torch.randn(M, r), torch.randn(n, r), 2.0)
            for n, r in zip((N, 40, 40), ranks, strict=True)
        ]
        gradients = up_backward_siblings([up._replace(grad_dtype=BF16) for up in ups])
        siblings = [
            DownGradients(u, torch.randn(u.shape[1], K), FP32, lambda_ if mixes else 0.0, dropout_p, seed, BF16)
            for u, *_ in gradients
        ]
        siblings[1] = siblings[1]._replace(lambda_=0.0, dropout_p=0.0)
        down_weight_gradient(siblings, x, h0)
        down_input_gradient(siblings, dtype=BF16, residual_dtype=BF16 if mixes else None)
    interpreted.assert_as_modelled()


@pytest.mark.parametrize("ranks", [(16,), (8, 40), (16, 3, 24)])
def test_a_program_that_goes_through_several_tiles_of_rows(ranks):
    """Under dropout, where there are more tiles than a few multiprocessors want; of three siblings A is loaded anew."""
    few = dataclasses.replace(SM_90, multiprocessors=1)
    siblings = [
        DownGradients(torch.randn(900, r), torch.randn(r, 70), FP32, 0.3, 0.1, torch.tensor([r]), None) for r in ranks
    ]
    with Interpreted(few) as interpreted:
        down_input_gradient(siblings, dtype=BF16, residual_dtype=BF16)
    interpreted.assert_as_modelled()
    (launch,) = interpreted.launches
    assert launch.grid[0] < triton.cdiv(900, 64)

"""The operations on the kernels: the cases of tests/op_cases.py, whose other runs are on plain PyTorch."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from bottleneck_cases import (
    BOTTLENECK_CASES,
    assert_beside_a_linear_as_good_as_the_definition,
    assert_pair_as_good_as_the_definition,
)
from bottleneck_cases import assert_as_good_as_the_definition as assert_bottleneck_as_good
from bottleneck_cases import name_of as name_of_bottleneck
from captured import Captured
from group_cases import GROUPS, assert_group_as_good_as_the_definition, make_group, outputs_of_group, results_of
from op_cases import CASES, WANTABLE, OpCase, assert_as_good_as_the_definition, make, name_of

from sibo_triton import reference
from sibo_triton.kernels.launching import forget_launches
from sibo_triton.kernels.precision import INTERPRETED
from sibo_triton.ops import backend_for, lora_linear

pytestmark = pytest.mark.gpu

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

#: In bfloat16 of the interpreter, which cuts off where a GPU rounds to nearest: twice the rounding.
MARGINS = {FP32: 3e-6, FP16: 3e-4, BF16: 4e-3 if INTERPRETED else 5e-4}


def test_they_run_on_the_kernels(device, monkeypatch):
    """What the other tests here rely on."""
    assert backend_for(torch.device(device, 0 if device == "cuda" else None), [FP32]).name == "triton"
    forget_launches()
    monkeypatch.setattr("sibo_triton.kernels.down.down_kernel", None)
    with pytest.raises(TypeError):
        lora_linear(**make(CASES[0], device))
    forget_launches()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_values_and_gradients_are_as_good_as_the_definitions(case, device):
    assert_as_good_as_the_definition(case, device, MARGINS[case.dtype])


@pytest.mark.parametrize("case", BOTTLENECK_CASES, ids=name_of_bottleneck)
def test_bottleneck_values_and_gradients_are_as_good_as_the_definitions(case, device):
    assert_bottleneck_as_good(case, device, MARGINS[case.dtype])


@pytest.mark.parametrize("case", [case for case in BOTTLENECK_CASES if case.out_features], ids=name_of_bottleneck)
def test_a_bottleneck_beside_a_linear_is_as_good_as_the_definition(case, device):
    assert_beside_a_linear_as_good_as_the_definition(case, device, MARGINS[case.dtype])


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(FP32, FP32), (BF16, FP32), (BF16, BF16)])
@pytest.mark.parametrize("in_series", [True, False])
def test_two_bottlenecks_that_share_x_are_as_good_as_the_definition(in_series, dtype, adapter_dtype, device):
    assert_pair_as_good_as_the_definition(in_series, dtype, adapter_dtype, device, MARGINS[dtype])


def test_a_large_layer(device):
    tokens, width = ((70,), 96) if INTERPRETED else ((4, 1024), 2048)
    case = OpCase(tokens, width, width, 16, BF16, FP32, "learnable", 0.05, bias=True, wants=WANTABLE)
    assert_as_good_as_the_definition(case, device, MARGINS[BF16])


def test_gradients_repeat_bitwise(device):
    arguments = make(OpCase((130,), 200, 96, 16, BF16, FP32, "learnable", 0.1, wants=WANTABLE), device)
    tensors = [value for value in arguments.values() if getattr(value, "requires_grad", False)]
    grad_y = torch.randn(130, 96, device=device).to(BF16)
    first, *others = (
        torch.autograd.grad(lora_linear(**arguments), tensors, grad_y) for _ in range(2 if INTERPRETED else 20)
    )
    assert all(all(map(torch.equal, first, other)) for other in others)


def test_a_training_step_in_a_graph(device):
    """Captured, the operation draws another mask in each replay."""
    arguments = make(OpCase((130,), 200, 96, 16, BF16, FP32, "learnable", wants=WANTABLE), device)
    wanted = {name: value for name, value in arguments.items() if getattr(value, "requires_grad", False)}
    grad_y = torch.randn(130, 96, device=device).to(BF16)

    def step(seed=None):
        seed = reference.draw_seed(device) if seed is None else seed
        y = lora_linear(**arguments | {"dropout_p": 0.3, "dropout_seed": seed})
        gradients = torch.autograd.grad(y, list(wanted.values()), grad_y)
        return {"seed": seed, "y": y.detach()} | dict(zip(wanted, gradients, strict=True))

    captured, seeds = Captured(step, device), set()
    for _ in range(3):
        results = captured.replay()
        again = step(results["seed"].clone())
        assert all(torch.equal(results[name], again[name]) for name in again)
        seeds.add(int(results["seed"]))
    assert len(seeds) == 3


@pytest.mark.parametrize("name", GROUPS)
def test_layers_that_share_x(name, device):
    dtype = GROUPS[name][0].dtype
    assert_group_as_good_as_the_definition(GROUPS[name], device, margin=MARGINS[dtype])


def test_gradients_of_layers_that_share_x_repeat_bitwise(device):
    layers = make_group(GROUPS["bf16, fp32 adapters, dropout"], device)
    grads_y = [torch.randn(70, layer["weight"].shape[0], device=device).to(BF16) for layer in layers]
    first, *others = (results_of(outputs_of_group, layers, grads_y) for _ in range(2 if INTERPRETED else 20))
    assert all(all(torch.equal(first[name], other[name]) for name in first) for other in others)

"""LoRA's operations on the CPU: values and gradients, the choice of what computes, and what is refused."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    BF16,
    CASES,
    FP32,
    FP64,
    WANTABLE,
    OpCase,
    assert_as_good_as_the_definition,
    in_dtype,
    make,
    name_of,
    operations,
)

from sibo_triton.ops import BACKEND_VARIABLE, Choice, backend_for, dispatch, lora_linear, small


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_values_and_gradients_are_as_good_as_the_definitions(case):
    assert_as_good_as_the_definition(case)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_float64_gives_the_definition(case):
    """Where no rounding hides anything."""
    assert_as_good_as_the_definition(dataclasses.replace(case, dtype=FP64, adapter_dtype=None))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20)),
    wants=st.sets(st.sampled_from(WANTABLE)).map(tuple),
    mixes=st.sampled_from(["no", "number", "tensor", "learnable"]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    biases=st.tuples(st.booleans(), st.booleans()),
    on_base=st.booleans(),
)
def test_any_shape_and_any_gradients_that_are_wanted(tokens, sizes, wants, mixes, dropout_p, biases, on_base):
    k, n, r = sizes
    rest = {"mixes": mixes, "dropout_p": dropout_p, "bias": biases[0], "lora_bias": biases[1], "on_base": on_base}
    assert_as_good_as_the_definition(OpCase(tokens, k, n, r, FP64, wants=wants, **rest))


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p, on_base):
    case = OpCase((3,), 5, 4, 2, FP64, mixes="learnable", dropout_p=dropout_p, bias=True, lora_bias=True)
    case = dataclasses.replace(case, on_base=on_base, wants=WANTABLE)
    operation, _ = operations(case)
    arguments = make(case)
    arguments["lambda_"] = torch.tensor([0.3], dtype=FP64, requires_grad=True)
    names = [name for name, value in arguments.items() if getattr(value, "requires_grad", False)]
    assert len(names) == (7 if on_base else 8)

    def of_tensors(*tensors):
        return operation(**arguments | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(of_tensors, [arguments[name] for name in names])


# --- Few elements, on a CPU


@pytest.fixture
def small_layers(monkeypatch):
    """What a user's small layers run."""
    calls = []
    original = small.low_rank
    monkeypatch.setattr(small, "low_rank", lambda *arguments: calls.append(1) or original(*arguments))
    monkeypatch.setattr(small, "ELEMENTS", 2**20)
    return calls


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_small_layers_are_as_good_as_the_definition(case, small_layers):
    assert_as_good_as_the_definition(case)
    assert_as_good_as_the_definition(dataclasses.replace(case, dtype=FP64, adapter_dtype=None))
    assert len(small_layers) == 2


@pytest.mark.parametrize("on_base", [False, True])
def test_small_layers_under_autocast_round_as_the_definition_does(on_base, small_layers):
    arguments = make(OpCase(mixes="learnable", dropout_p=0.3, bias=True, on_base=on_base))
    operation, definition = operations(OpCase(on_base=on_base))
    with torch.autocast("cpu", dtype=BF16):
        found, expected = operation(**arguments), definition(**arguments)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert small_layers


@pytest.mark.parametrize("elements", [-1, 2**20])
def test_what_is_made_without_gradients_may_be_written_into_with_them(elements, monkeypatch):
    monkeypatch.setattr(small, "ELEMENTS", elements)
    x, weight, lora_a, lora_b = (torch.randn(shape) for shape in ((2, 3, 8), (4, 8), (2, 8), (4, 2)))
    with torch.no_grad():
        y = lora_linear(x, weight, None, lora_a, lora_b, 1.0)
    y.mul_(torch.ones(4, requires_grad=True)).sum().backward()


def test_a_scaling_in_a_tensor_is_not_rounded_with_t():
    """0.3 in bfloat16 is 0.3008: an error of one sign in every element."""
    arguments = make(OpCase((70,), 256, 128, 4, BF16, mixes="no"))
    arguments |= {"scaling": torch.tensor([0.3]), "weight": torch.zeros(128, 256, dtype=BF16), "bias": None}
    found, exact = (lora_linear(**given).double() for given in (arguments, in_dtype(arguments, FP64)))
    assert abs(float((found * exact).sum() / exact.square().sum()) - 1) < 5e-4


# --- The choice of what computes


def test_the_backend_is_chosen_in_one_place_and_said(monkeypatch):
    cpu = torch.device("cpu")
    choice = backend_for(cpu, [FP32])
    assert choice.name == "torch" and "cpu" in choice.reason and not choice.is_fallback
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert backend_for(cpu, [FP32]).name == "reference"
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="SIBO_TRITON_BACKEND=triton, but the tensors are on cpu"):
        lora_linear(**make(OpCase()))
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="'cuda' is no backend: set it to one of auto, triton, torch, reference"):
        lora_linear(**make(OpCase()))


@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_without_the_kernels_the_reason_is_said_once(compiled, monkeypatch):
    monkeypatch.setattr("sibo_triton.ops.dispatch._choose", lambda *_: Choice("torch", "triton is not there", True))
    monkeypatch.setattr(dispatch, "_said", set())
    operation = torch.compile(lora_linear, backend="eager") if compiled else lora_linear
    with pytest.warns(UserWarning, match="plain PyTorch on this GPU .* because triton is not there") as record:
        for _ in range(3):
            operation(**make(OpCase()))
    assert len(record) == 1


def test_what_stands_between_a_gpu_and_the_kernels(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    dispatch._choose.cache_clear()
    old = backend_for(gpu, [FP32])
    assert (old.name, old.is_fallback) == ("torch", True) and "T4 has compute capability 7.5" in old.reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    dispatch._choose.cache_clear()
    assert backend_for(gpu, [BF16, FP32]).name == "triton"
    wide = backend_for(gpu, [FP32, FP64])
    assert (wide.name, wide.is_fallback) == ("torch", True) and "do not take torch.float64" in wide.reason
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: None)
    dispatch._choose.cache_clear()
    assert "triton is not installed" in backend_for(gpu, [FP32]).reason
    dispatch._choose.cache_clear()


TWO = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"weight has shape \[40, 47\], but \[40, 48\] fits", {"weight": torch.zeros(40, 47)}),
        (ValueError, r"x is torch.float32 and weight torch.bfloat16", {"weight": torch.zeros(40, 48, dtype=BF16)}),
        (ValueError, r"lora_a has shape \[4, 3\], but \[r, 48\] fits x", {"lora_a": torch.zeros(4, 3)}),
        (ValueError, r"lora_b has shape \[40, 3\], but \[N, 4\] fits lora_a", {"lora_b": torch.zeros(40, 3)}),
        (ValueError, "lora_a is torch.float32 and lora_b torch.bfloat16", {"lora_b": torch.zeros(40, 4, dtype=BF16)}),
        (ValueError, "initial_residual is None, but lambda_ is", {"initial_residual": None}),
        (ValueError, r"initial_residual has shape \[9, 48\]", {"initial_residual": torch.zeros(9, 48)}),
        (ValueError, "lambda_ is 1.5: it must lie in", {"lambda_": 1.5}),
        (ValueError, "dropout_p is 1.0: it must lie in", {"dropout_p": 1.0}),
        (ValueError, "dropout_p is 0.5, but no seed was given", {"dropout_p": 0.5, "dropout_seed": None}),
        (ValueError, r"lora_bias has shape \[4\], but \[40\] fits lora_b", {"lora_bias": torch.zeros(4)}),
        (ValueError, "scaling requires grad", {"scaling": torch.ones(1, requires_grad=True)}),
        (ValueError, r"scaling is a torch.float32 tensor of shape \[40\]", {"scaling": torch.ones(40)}),
        (ValueError, r"bias has shape \[1\], but \[40\] fits weight", {"bias": torch.zeros(1)}),
        (ValueError, "x is torch.float32 and bias torch.float64", {"bias": torch.zeros(40, dtype=FP64)}),
        (ValueError, "lora_a is torch.float32 and lora_bias torch.float64", {"lora_bias": torch.zeros(40, dtype=FP64)}),
        (TypeError, "dropout_seed is 3: pass a tensor", {"dropout_p": 0.5, "dropout_seed": 3}),
        (ValueError, r"dropout_seed is a torch.int64 tensor of shape \[2\]", {"dropout_p": 0.5, "dropout_seed": TWO}),
    ],
)
@pytest.mark.parametrize("elements", [-1, 2**20])
def test_wrong_arguments_are_named(error, message, arguments, elements, monkeypatch):
    monkeypatch.setattr(small, "ELEMENTS", elements)
    with pytest.raises(error, match=message):
        lora_linear(**make(OpCase()) | arguments)

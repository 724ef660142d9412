"""The bottleneck operation on the CPU: values and gradients, and what is refused."""

import dataclasses

import pytest
import torch
from bottleneck_cases import (
    BOTTLENECK_CASES,
    WANTABLE,
    BottleneckCase,
    assert_as_good_as_the_definition,
    assert_beside_a_linear_as_good_as_the_definition,
    assert_pair_as_good_as_the_definition,
    make,
    name_of,
    wanted_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BF16, FP32, FP64

from sibo_triton import reference
from sibo_triton.ops import add_bottleneck
from sibo_triton.reference import ACTIVATIONS


@pytest.mark.parametrize("case", BOTTLENECK_CASES, ids=name_of)
def test_values_and_gradients_are_as_good_as_the_definitions(case):
    assert_as_good_as_the_definition(case)


@pytest.mark.parametrize("case", BOTTLENECK_CASES, ids=name_of)
def test_float64_gives_the_definition(case):
    """Where no rounding hides anything."""
    assert_as_good_as_the_definition(dataclasses.replace(case, dtype=FP64, adapter_dtype=None))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple),
    sizes=st.tuples(st.integers(1, 40), st.none() | st.integers(1, 40), st.integers(1, 20)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    wants=st.sets(st.sampled_from(WANTABLE)).map(tuple),
    mixes=st.sampled_from(["no", "number", "tensor", "learnable"]),
    scaling=st.sampled_from(["number", "learnable"]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    biases=st.booleans(),
)
def test_any_shape_and_any_gradients_that_are_wanted(tokens, sizes, activation, wants, **options):
    assert_as_good_as_the_definition(BottleneckCase(tokens, *sizes, activation, FP64, wants=wants, **options))


@pytest.mark.parametrize("out_features", [None, 4])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradcheck(activation, out_features):
    case = BottleneckCase(
        (3,), 5, out_features, 2, activation, FP64, None, "learnable", "learnable", 0.3, wants=WANTABLE
    )
    arguments = make(case)
    for name in ("lambda_", "scaling"):
        arguments[name] = arguments[name].detach().double().requires_grad_()
    names = list(wanted_of(arguments))
    assert len(names) == (8 if out_features is None else 9)

    def of_tensors(*tensors):
        changed = arguments | dict(zip(names, tensors, strict=True))
        if out_features is None:
            changed["base"] = changed["x"]
        return add_bottleneck(**changed)

    assert torch.autograd.gradcheck(of_tensors, [arguments[name] for name in names])


def test_a_scaling_of_zero_learns():
    """Its gradient is not taken from what it has multiplied."""
    arguments = make(BottleneckCase(dtype=FP64, scaling="learnable", wants=WANTABLE))
    arguments["scaling"] = torch.zeros(1, requires_grad=True)
    gradients = []
    for operation in (add_bottleneck, reference.add_bottleneck):
        gradients.append(torch.autograd.grad(operation(**arguments).square().sum(), arguments["scaling"])[0])
    assert gradients[0].abs() > 1
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", [case for case in BOTTLENECK_CASES if case.out_features], ids=name_of)
@pytest.mark.parametrize("wide", [True, False])
def test_beside_a_linear_it_is_as_good_as_the_definition(case, wide):
    case = dataclasses.replace(case, dtype=FP64, adapter_dtype=None) if wide else case
    assert_beside_a_linear_as_good_as_the_definition(case)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(FP64, FP64), (FP32, FP32), (BF16, FP32), (BF16, BF16)])
@pytest.mark.parametrize("in_series", [True, False])
def test_two_that_share_x_are_as_good_as_the_definition(in_series, dtype, adapter_dtype):
    assert_pair_as_good_as_the_definition(in_series, dtype, adapter_dtype)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"base has shape \[2, 8, 48\] and x \[2, 9, 48\]", {"base": torch.zeros(2, 8, 48)}),
        (r"down_weight has shape \[8, 47\], but \[bottleneck, 48\] fits x", {"down_weight": torch.zeros(8, 47)}),
        (r"up_weight has shape \[47, 8\], but \[48, 8\] fits", {"up_weight": torch.zeros(47, 8)}),
        ("down_weight is torch.float32 and up_weight torch.bfloat16", {"up_weight": torch.zeros(48, 8, dtype=BF16)}),
        (r"down_bias has shape \[9\], but \[8\] fits", {"down_bias": torch.zeros(9)}),
        (r"down_weight is torch.float32 and up_bias torch.bfloat16", {"up_bias": torch.zeros(48, dtype=BF16)}),
        ("initial_residual is None, but lambda_ is", {"initial_residual": None}),
        (r"initial_residual has shape \[9, 48\]", {"initial_residual": torch.zeros(9, 48)}),
        ("lambda_ is 1.5: it must lie in", {"lambda_": 1.5}),
        ("dropout_p is 1.0: it must lie in", {"dropout_p": 1.0}),
        ("dropout_p is 0.5, but no seed was given", {"dropout_p": 0.5, "dropout_seed": None}),
        (r"scaling is a torch.float32 tensor of shape \[2\]", {"scaling": torch.ones(2)}),
        ("activation='mish' is not known: choose one of gelu", {"activation": "mish"}),
    ],
)
def test_wrong_arguments_are_named(message, arguments):
    with pytest.raises(ValueError, match=message):
        add_bottleneck(**make(BottleneckCase()) | arguments)

"""Layers that share x as one operation, against the definition of each."""

from dataclasses import replace

import pytest
import torch
from group_cases import (
    GROUPS,
    SHARED,
    arguments_of,
    assert_group_as_good_as_the_definition,
    make_group,
    outputs_of_group,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FP64, WANTABLE, OpCase

from sibo_triton import reference
from sibo_triton.ops import BACKEND_VARIABLE, group, lora_linear_group, small


@pytest.mark.parametrize("name", GROUPS)
def test_values_and_gradients_are_as_good_as_the_definitions(name):
    assert_group_as_good_as_the_definition(GROUPS[name])


@pytest.mark.parametrize("name", GROUPS)
def test_float64_gives_the_definition(name):
    """Where no rounding hides anything."""
    assert_group_as_good_as_the_definition([replace(of, dtype=FP64, adapter_dtype=None) for of in GROUPS[name]])


@pytest.mark.parametrize("name", ["nothing", "nothing, few rows", "nothing, few rows, dropout"])
def test_outputs_that_are_made_when_they_are_needed(name, monkeypatch):
    monkeypatch.setattr(group, "FEW_BYTES", -1)
    monkeypatch.setattr(group, "FEW_ROWS", -1)
    assert_group_as_good_as_the_definition(GROUPS[name])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_layers_in_any_order(data):
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple))
    k, count = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 4))
    shared = {"tokens": tokens, "in_features": k, "dtype": FP64}
    cases = [
        OpCase(
            **shared,
            out_features=data.draw(st.integers(1, 20)),
            rank=data.draw(st.integers(1, 12)),
            mixes=data.draw(st.sampled_from(["no", "number", "tensor", "learnable"])),
            dropout_p=data.draw(st.sampled_from([0.0, 0.0, 0.3])),
            bias=data.draw(st.booleans()),
            lora_bias=data.draw(st.booleans()),
            wants=data.draw(st.sets(st.sampled_from([name for name in WANTABLE if name != "base"])).map(tuple)),
        )
        for _ in range(count)
    ]
    order = data.draw(st.permutations(range(count)))[: data.draw(st.integers(0, count))]
    assert_group_as_good_as_the_definition(cases, order=order)


@pytest.mark.parametrize("first_mixes", [True, False])
def test_h0_alone_gets_its_gradient_where_not_all_mix(first_mixes):
    mixes = ("number", "no") if first_mixes else ("no", "number")
    cases = [OpCase((70,), 130, 96, 4, FP64, mixes=of, wants=("initial_residual", "lora_a")) for of in mixes]
    assert_group_as_good_as_the_definition(cases)


def test_what_is_not_finite_in_h0_reaches_only_the_layers_that_mix():
    cases = GROUPS["plain and mixing"]
    layers = make_group(cases)
    with torch.no_grad():
        layers[1]["initial_residual"][3] = float("nan")
        plain, *mixing = outputs_of_group(layers)
    assert plain.isfinite().all()
    for y in mixing:
        assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


def test_gradcheck():
    cases = [replace(of, dtype=FP64, tokens=(3,), in_features=5) for of in GROUPS["plain and mixing, dropout"]]
    layers = make_group(cases)
    leaves = {}
    for i, layer in enumerate(layers):
        if isinstance(layer["lambda_"], torch.Tensor):
            layer["lambda_"] = layer["lambda_"].detach().double().requires_grad_()
        for name, value in layer.items():
            if getattr(value, "requires_grad", False):
                leaves[name if name in SHARED else (i, name)] = value

    def call(*tensors):
        changed = [dict(layer) for layer in layers]
        for key, tensor in zip(leaves, tensors, strict=True):
            if key in SHARED:
                for layer in changed:
                    layer[key] = tensor if layer[key] is not None else None
            else:
                changed[key[0]][key[1]] = tensor
        return tuple(outputs_of_group(changed))

    assert torch.autograd.gradcheck(call, list(leaves.values()))


def test_where_layers_must_run_alone(monkeypatch):
    layers = make_group(GROUPS["alike"])
    x, layers = layers[0]["x"], arguments_of(layers)
    assert lora_linear_group(x, layers) is not None
    other = [layers[0], layers[1]._replace(initial_residual=torch.zeros_like(x))]
    assert lora_linear_group(x, other) is None
    with monkeypatch.context() as patch:
        patch.setattr(small, "ELEMENTS", x.numel())
        assert lora_linear_group(x, layers) is None
    with monkeypatch.context() as patch:
        patch.setenv(BACKEND_VARIABLE, "reference")
        assert lora_linear_group(x, layers) is None


def test_wrong_arguments_are_named():
    layers = make_group(GROUPS["alike"])
    x, layers = layers[0]["x"], arguments_of(layers)
    with pytest.raises(ValueError, match=r"weight has shape \[40, 47\]"):
        lora_linear_group(x, [layers[0], layers[1]._replace(weight=layers[1].weight[:, 1:])])
    with pytest.raises(ValueError, match="no seed was given"):
        lora_linear_group(x, [layers[0], layers[1]._replace(dropout_p=0.1, dropout_seed=None)])


def test_several_seeds_are_those_of_as_many_calls():
    torch.manual_seed(5)
    at_once = reference.draw_seeds(3)
    torch.manual_seed(5)
    assert [int(seed) for seed in at_once] == [int(reference.draw_seed()) for _ in range(3)]
    assert all(seed.shape == (1,) and seed.dtype == torch.int64 for seed in at_once)
    assert len({seed.data_ptr() % 16 for seed in at_once}) == 1

"""Bottleneck adapters whose modules get the same x share their passes over it; parallel ones also the frozen linear's.

How siblings meet is LoRA's (`test_siblings.py`); here is what these layers do of their own.
"""

import copy

import pytest
import torch
from adapter_models import base_model, hooks_on, residual_hooks_on
from bottleneck_models import adapter, build
from tiny_models import token_inputs

from sibo_triton import explain
from sibo_triton.bottleneck import layer as layer_file
from sibo_triton.layers import siblings
from sibo_triton.ops import torch_backend

PLACEMENTS = {"series": {}, "parallel": {"placement": "parallel"}}


@pytest.fixture
def passes(monkeypatch):
    """How many adapters each pass over x served, forward and backward."""
    seen = []
    for name, place in (("down_activated_siblings", 1), ("down_backward_siblings", 0)):
        original = getattr(torch_backend, name)
        count = lambda *args, original=original, place=place: seen.append(len(args[place])) or original(*args)  # noqa: E731
        monkeypatch.setattr(torch_backend, name, count)
    return seen


def model_with(**options):
    torch.manual_seed(0)
    return build(base_model().double(), default=adapter(**options)).train()


def results(model):
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(**token_inputs()).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("more", [{}, {"adapter_dropout": 0.2}, {"sibo_learnable": True, "scaling": "learnable"}])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_same_numbers_as_alone(placement, more, passes):
    model = model_with(**PLACEMENTS[placement], **more)
    alone = copy.deepcopy(model)
    for module in alone.modules():
        siblings.detach_siblings(module)
    found = results(model)
    assert set(passes) == {2}  # gate_proj and up_proj
    passes.clear()
    expected = results(alone)
    assert set(passes) == {1} and found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-12 + 1e-10 * float(value.abs().max()), rtol=0, msg=name)


def test_a_recompute_groups_as_its_forward_did(passes):
    expected = results(model_with(adapter_dropout=0.2))
    model = model_with(adapter_dropout=0.2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    passes.clear()
    found = results(model)
    assert set(passes) == {2}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=0, msg=name)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_several_adapters_and_rows_of_their_own_run_apart(placement, passes):
    torch.manual_seed(0)
    own = PLACEMENTS[placement]
    model = build(base_model().double(), one=adapter(0.3, **own), two=adapter(0.1, **own))
    model.base_model.set_adapter(["one", "two"])
    passes.clear()
    with torch.no_grad():
        model(**token_inputs())
    assert set(passes) == {1}
    passes.clear()
    inputs = token_inputs()
    with torch.no_grad():
        model(**inputs, adapter_names=["one", "two"] * (len(inputs["input_ids"]) // 2))
    assert set(passes) == {1}


def test_a_linear_that_is_more_than_its_weight_runs_by_its_own_forward(monkeypatch):
    calls = []
    original = layer_file.bottleneck_linear
    monkeypatch.setattr(layer_file, "bottleneck_linear", lambda *a, **k: calls.append(1) or original(*a, **k))
    model = model_with(placement="parallel", target_modules=["up_proj"])
    expected = results(model)
    assert calls and {row.runs for row in explain(model)} == {"fused"}
    calls.clear()
    seen = []
    for layer in (module for name, module in model.named_modules() if name.endswith("up_proj")):
        layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(
        UserWarning, match="the frozen layer and its adapter run apart, because its base layer has hooks"
    ):
        found = results(model)
    assert not calls and seen
    assert {(row.runs, row.runs_reason.split(";")[0]) for row in explain(model)} == {
        ("adapter", "its base layer has hooks")
    }
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("changed", ["down.default.weight", "down.default.bias", "lambda.default.logit_bias"])
def test_what_is_changed_between_siblings_counts(changed, placement):
    """It was read when the first of them was called."""
    model = model_with(**PLACEMENTS[placement], sibo_learnable=True)
    alone = copy.deepcopy(model)
    for module in alone.modules():
        siblings.detach_siblings(module)
    logits, inputs = [], token_inputs()
    for each in (model, alone):
        first = each.get_base_model().model.layers[0].mlp
        parameter = first.up_proj.get_parameter(f"sibo_adapter_{changed}")

        def write(*_, parameter=parameter):
            parameter.add_(0.1)

        first.gate_proj.register_forward_hook(write)
        with torch.no_grad():
            logits.append(each(**inputs).logits)
    torch.testing.assert_close(*logits, atol=1e-10, rtol=0)


def test_explain_names_them():
    assert "share passes over their input: gate_proj + up_proj." in str(explain(model_with()))
    behind = model_with(side="output", target_modules=["down_proj"])
    assert "share passes" not in str(explain(behind))
    both_behind = model_with(value=0.0, side="output", target_modules=["gate_proj", "up_proj"])
    assert "share passes" not in str(explain(both_behind)) and residual_hooks_on(both_behind) == hooks_on(both_behind)
    hooked = model_with(placement="parallel")
    for name, module in hooked.named_modules():
        if name.endswith("proj.base_layer"):
            module.register_forward_hook(lambda *_: None)
    assert "share passes" not in str(explain(hooked))

"""How the tests look at a refusal: the ways of adding an adapter, and the check that the model stayed as it was."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import randomise_adapters

from sibo_triton import SiboLoraConfig

TARGETS = ("q_proj", "o_proj", "down_proj")


def fingerprint(model, inputs):
    """Everything that a refusal could have changed in a model, by name."""
    found = {}
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if "hook" in key and isinstance(value, dict)}
        others = {key: repr(value) for key, value in vars(module).items() if not is_torchs(key) and key != "config"}
        found[f"module {name!r}"] = (id(module), type(module), module.training, hooks, others)
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = (id(parameter), parameter.requires_grad, parameter.dtype)
    found["transformers' flag"] = getattr(model, "_hf_peft_config_loaded", False)
    with torch.no_grad():
        outputs = model(**inputs)
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    return found, {"output": logits, **{name: tensor.clone() for name, tensor in model.state_dict().items()}}


def is_torchs(name):
    flag = "_hf_peft_config_loaded"  # the class's until it is set: looked at with getattr
    return name in ("_parameters", "_buffers", "_modules", flag) or "hook" in name


def assert_as_it_was(model, inputs, before):
    found, tensors = fingerprint(model, inputs)
    changed = {name for name in found.keys() | before[0].keys() if found.get(name) != before[0].get(name)}
    assert not changed, {name: (before[0].get(name), found.get(name)) for name in sorted(changed)[:3]}
    assert list(tensors) == list(before[1]), sorted(tensors.keys() ^ before[1].keys())
    unequal = [name for name in tensors if not torch.equal(tensors[name], before[1][name])]
    assert unequal == [], unequal


# --- The four ways in. Each prepares a model and returns it with the call that adds an adapter.


def through_get_peft_model(model):
    return model, lambda config: get_peft_model(model, config)


def through_add_adapter(model):
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), adapter_name="plain")
    randomise_adapters(peft_model)

    def add(config):
        peft_model.add_adapter("new", config)
        peft_model.set_adapter("new")
        return peft_model

    return peft_model, add


def through_inject_adapter_in_model(model):
    return model, lambda config: inject_adapter_in_model(config, model)


def through_transformers(model):
    def add(config):
        model.add_adapter(config)
        return model

    return model, add


def through_transformers_beside_a_plain_adapter(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), adapter_name="plain")
    randomise_adapters(model)

    def add(config):
        model.add_adapter(config, adapter_name="new")
        return model

    return model, add


WAYS = [
    through_get_peft_model,
    through_add_adapter,
    through_inject_adapter_in_model,
    through_transformers,
    through_transformers_beside_a_plain_adapter,
]


def assert_refused(way, build, options, message, inputs):
    model, add = way(build())
    before = fingerprint(model, inputs)
    with pytest.raises(ValueError, match=message):
        add(SiboLoraConfig(**{"r": 2, "sibo_lambda": 0.3, "target_modules": list(TARGETS), **options}))
    assert_as_it_was(model, inputs, before)

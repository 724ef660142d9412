"""An adapter of either kind, switched off and taken out: the base model is what it was."""

import pytest
import torch
from adapter_models import base_model, close, different, hooks_on, oracle_of, output, sibo
from bottleneck_models import Oracle, adapter, randomise
from peft import get_peft_model
from tiny_models import randomise_adapters, token_inputs

pytestmark = pytest.mark.oldest


def lora(base, config):
    model = get_peft_model(base, config)
    randomise_adapters(model)
    return model


#: A config, a model with random weights, and what it is compared with.
KINDS = {
    "lora": (sibo, lora, lambda model, config: oracle_of(model, default=config)),
    "bottleneck": (
        adapter,
        lambda base, config: randomise(get_peft_model(base, config)),
        lambda model, config: Oracle(model, {"default": config}),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_disable_adapter_gives_the_base_model_and_enabling_brings_it_back(kind):
    config, adapted, _ = KINDS[kind]
    base, inputs = base_model(), token_inputs()
    expected = output(base, inputs)
    model = adapted(base, config())
    mixed = output(model, inputs)
    assert different(mixed, expected)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), expected)
    assert torch.equal(output(model, inputs), mixed)
    model.base_model.disable_adapter_layers()
    assert torch.equal(output(model, inputs), expected)
    model.base_model.enable_adapter_layers()
    assert torch.equal(output(model, inputs), mixed)


@pytest.mark.parametrize("kind", KINDS)
def test_unload_gives_back_the_base_model(kind):
    config, adapted, oracle = KINDS[kind]
    base, inputs = base_model(), token_inputs()
    expected, modules = output(base, inputs), [(name, id(module)) for name, module in base.named_modules()]
    model = adapted(base, config())
    model.add_adapter("embedding", config(sibo_source="embedding"))
    assert different(output(model, inputs), expected)
    unloaded = model.unload()
    assert unloaded is base and hooks_on(unloaded) == []
    assert [(name, id(module)) for name, module in unloaded.named_modules()] == modules
    assert torch.equal(output(unloaded, inputs), expected)
    again = adapted(unloaded, config(0.5))
    close(output(again, inputs), output(oracle(again, config(0.5)), inputs))

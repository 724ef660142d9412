"""Tiny models with named adapters, the oracle for each, and how the tests compare the two.

The oracle is a second model with plain LoRA adapters and the same weights. Hooks written here catch what enters its
first block and mix it in front of the LoRA path (in front of its dropout); nothing of sibo_triton runs in it.
"""

from __future__ import annotations

import copy

import torch
from oracle import mix_by_hooks
from peft import LoraConfig, get_peft_model
from tiny_models import llama, randomise_adapters

from sibo_triton import SiboLoraConfig
from sibo_triton.layers import siblings

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj"]  # of which q and v share their input
MIXING = ("q_proj", "v_proj", "up_proj")


def base_model(build=llama):
    """A tiny model whose blocks write as much as its embeddings: at their initial 0.02 a wrong h0 would hardly show."""
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.0 if "embed" in name or "shared" in name else 0.2)
    return model


def sibo(value=0.3, **options):
    return SiboLoraConfig(**{"r": 4, "target_modules": TARGETS, "sibo_lambda": value, **options})


def plain(**options):
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, **options})


def build(base=None, **configs):
    """A model (default: a tiny Llama) with an adapter for each keyword, all random; the first is active."""
    names = list(configs)
    model = get_peft_model(base_model() if base is None else base, configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    randomise_adapters(model)
    return model.eval()


def lora_layers(model, adapter):
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_A", {}):
            yield name, module


def oracle_of(model, **configs):
    """A stock PEFT model with the weights of `model` and hooks that mix, by the lambdas of `configs`."""
    twin = None
    for name, config in configs.items():
        options = {key: value for key, value in vars(config).items() if key in LoraConfig.__dataclass_fields__}
        options = {key: value for key, value in options.items() if key not in ("peft_type", "peft_version")}
        stock = LoraConfig(**copy.deepcopy(options))
        if twin is None:
            twin = get_peft_model(llama(), stock, adapter_name=name)
        else:
            twin.add_adapter(name, stock)
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if "sibo_lambda" not in key})
    twin.train(model.training)
    for name, config in configs.items():
        value = getattr(config, "sibo_lambda", 0.0)
        if value:
            layers = lora_layers(twin.get_base_model(), name)
            mixing = [layer_name for layer_name, _ in layers if layer_name.endswith(MIXING)]
            mix_by_hooks(twin.get_base_model(), value, mixing, name)
    return twin


def without_mixing(model):
    """The same adapters at lambda = 0: what a test's output must differ from."""
    zero = copy.deepcopy(model)
    found = 0
    for name, buffer in zero.named_buffers():
        if "sibo_lambda" in name and "gate" not in name:
            buffer.zero_()
            found += 1
    assert found
    return zero


def output(model, inputs, **kwargs):
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], **kwargs).logits


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def different(one, other):
    return (one - other).abs().max() > 1e-2


def residual_hooks_on(model):
    """Without those by which siblings meet, which a plain adapter has too."""
    return [hook for hook in hooks_on(model) if not isinstance(hook, siblings._SiblingHook)]


def hooks_on(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks", "_state_dict_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in vars(module)[kind].values()]

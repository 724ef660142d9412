"""LoRA's options, dtypes and devices keep their meaning under SIBO, against stock PEFT with mixing hooks."""

import copy

import pytest
import torch
from adapter_models import (
    MIXING,
    TARGETS,
    base_model,
    build,
    close,
    different,
    gradients,
    lora_layers,
    oracle_of,
    output,
    plain,
    sibo,
    without_mixing,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import ARCHITECTURES, randomise_adapters, token_inputs
from torch import nn
from transformers import LlamaForCausalLM

from sibo_triton import SiboLoraConfig, reference

# --- Options of LoRA

OPTIONS = {
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 32}},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 6},
    "lora_bias": {"lora_bias": True},
    "layers_to_transform": {"layers_to_transform": [1, 2]},
    "modules_to_save": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "LoRA on embeddings": {"target_modules": [*TARGETS, "embed_tokens"]},
    "trainable tokens": {"trainable_token_indices": [5, 6, 7]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_lora_keep_their_meaning(case):
    """Outputs and every gradient: those of trained embeddings hold what goes through h0."""
    config = sibo(0.4, **OPTIONS[case])
    model, inputs = build(default=config), token_inputs()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.normal_(0.0, 0.5)  # what is trained beside LoRA differs from the base model's
            elif name.endswith("lora_B.default.bias"):
                parameter.normal_()
    if "trainable_token_indices" in OPTIONS[case]:
        inputs["input_ids"][:, 1:4] = torch.tensor([5, 6, 7])
    oracle = oracle_of(model, default=config)
    close(output(model, inputs), output(oracle, inputs))
    assert different(output(model, inputs), output(without_mixing(model), inputs))
    found, expected = gradients(model, inputs), gradients(oracle, inputs)
    assert found.keys() == expected.keys()
    for name in found:
        close(found[name], expected[name])


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_biases_train_as_in_lora(kind):
    """On a model that has biases."""
    architecture = ARCHITECTURES["opt"]
    options = {"r": 2, "target_modules": ["q_proj", "out_proj"], "bias": kind}
    model, inputs = get_peft_model(architecture.build(), SiboLoraConfig(**options, sibo_lambda=0.3)), token_inputs()
    randomise_adapters(model)
    stock = get_peft_model(architecture.build(), LoraConfig(**options))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in stock.named_parameters() if p.requires_grad]
    assert any(name.endswith("bias") for name in trainable)
    assert set(gradients(model, inputs)) == set(trainable)


class DropoutOfTheDefinition(nn.Module):
    """In the place of nn.Dropout: the mask is the definition's, its seed drawn from the generator at each call."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return reference.dropout(x, self.p, reference.draw_seed()) if self.training else x


def test_dropout_acts_on_the_mix_with_seeds_from_the_generator():
    config = sibo(0.4, lora_dropout=0.5)
    model, inputs = build(default=config).train(), token_inputs()
    oracle = oracle_of(model, default=config)
    for _, layer in lora_layers(oracle, "default"):
        hooks = layer.lora_dropout["default"]._forward_pre_hooks  # those that mix
        layer.lora_dropout["default"] = DropoutOfTheDefinition(0.5)
        layer.lora_dropout["default"]._forward_pre_hooks.update(hooks)
    outputs = []
    for seed in range(3):
        for each in (model, oracle):
            torch.manual_seed(seed)
            outputs.append(output(each, inputs))
        close(outputs[-2], outputs[-1])
    assert different(outputs[0], outputs[2])  # the mask is drawn anew
    torch.manual_seed(3)
    found = gradients(model, inputs)
    torch.manual_seed(3)
    expected = gradients(oracle, inputs)
    assert found.keys() == expected.keys() and all(gradient.any() for gradient in found.values())
    for name in found:
        close(found[name], expected[name])
    assert torch.equal(output(model.eval(), inputs), output(model, inputs))  # none in evaluation


# --- Dtypes and devices


def test_autocast_and_a_bfloat16_base_mix_as_the_oracle_does():
    config = sibo(0.3)
    model, inputs = build(default=config), token_inputs()
    oracle = oracle_of(model, default=config)
    exact = output(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = output(model, inputs), output(oracle, inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert different(output(without_mixing(model), inputs), exact)
    assert (found.float() - exact).abs().max() < (output(without_mixing(model), inputs) - exact).abs().max() / 4

    halves = model.to(torch.bfloat16)
    lambdas = [buffer for name, buffer in halves.named_buffers() if "sibo_lambda" in name]
    assert len(lambdas) == 9 and all(
        value.dtype == torch.float32 and value.item() == torch.tensor(0.3) for value in lambdas
    )
    assert (output(halves, inputs).float() - exact).abs().max() < 0.2


def test_fp32_adapters_on_a_bfloat16_base_as_peft_makes_them():
    config, inputs = sibo(0.3), token_inputs()
    base = base_model().to(torch.bfloat16)
    expected = output(base, inputs)
    model = get_peft_model(base, config)
    assert torch.equal(output(model, inputs), expected)  # B is zero
    randomise_adapters(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    twin = get_peft_model(copy.deepcopy(model).unload(), plain())
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if "sibo_lambda" not in key})
    seen = {}
    blocks = twin.base_model.model.model.layers
    blocks[0].register_forward_pre_hook(lambda _, args: seen.update(h0=args[0]))
    for name, layer in lora_layers(twin, "default"):
        if name.endswith(MIXING):
            layer.lora_dropout["default"].register_forward_pre_hook(
                lambda _, args: (0.7 * args[0] + 0.3 * seen["h0"].float(),)
            )
    found, by_peft = output(model, inputs), output(twin, inputs)
    exact = output(twin.float(), inputs)  # the same weights: they are 16-bit numbers
    error, error_of_peft = (float((each - exact).norm() / exact.norm()) for each in (found, by_peft))
    assert 1e-4 < error <= 1.1 * error_of_peft < 0.05  # both round in 16 bits, not at the same places
    assert different(output(model, inputs), output(without_mixing(model), inputs))


def test_device_map(tmp_path):
    config = sibo(0.3)
    model, inputs = build(default=config), token_inputs()
    expected = output(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", device_map={"": "cpu"})
    assert torch.equal(output(loaded, inputs), expected)
    assert different(expected, output(without_mixing(loaded), inputs))


def test_the_initial_residual_follows_its_input_to_another_device():
    """`device_map` over several devices moves what blocks read: here to the meta device, the only other one."""
    model, inputs = build(default=sibo(0.3)), token_inputs()
    layer = model.base_model.model.model.layers[2].self_attn.q_proj
    seen = []

    class Elsewhere(nn.Module):
        def forward(self, hidden_states):
            seen.append(meta(hidden_states.to("meta")))
            return layer(hidden_states)

    meta = copy.deepcopy(layer).to("meta")
    meta.sibo_sites = layer.sibo_sites  # a copy has an h0 of its own: this one is to see the model's
    model.base_model.model.model.layers[2].self_attn.q_proj = Elsewhere()
    output(model, inputs)
    assert seen[0].device.type == "meta" and seen[0].shape == (2, 6, 32)

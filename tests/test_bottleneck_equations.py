"""Each equation of the bottleneck adapter in a model, against hooks that write it down (bottleneck_models.py)."""

import pytest
import torch
from adapter_models import base_model, close, different, output, residual_hooks_on
from bottleneck_models import (
    ACTIVATIONS,
    LLAMA_DEFAULT,
    PARALLEL,
    SERIES_INPUT,
    SERIES_OUTPUT,
    Oracle,
    adapter,
    adapter_gradients,
    build,
    layers_of,
    oracle_gradients,
)
from tiny_models import ARCHITECTURES, token_inputs

from sibo_triton import explain

pytestmark = pytest.mark.oldest

EQUATIONS = {"series, input": SERIES_INPUT, "series, output": SERIES_OUTPUT, "parallel": PARALLEL}


def assert_computes(model, oracle, inputs):
    """The same outputs and the same gradients of everything that trains, and not those of the frozen model."""
    expected = output(oracle, inputs)
    close(output(model, inputs), expected)
    with model.disable_adapter():
        assert different(output(model, inputs), expected)
    found = adapter_gradients(model, inputs)
    assert found and all(".sibo_adapter_" in name for name in found)
    for name, gradient in oracle_gradients(oracle, inputs, found).items():
        close(found[name], gradient)
        assert gradient.abs().sum() > 0, name
    return found


@pytest.mark.parametrize("equation", EQUATIONS)
def test_an_equation_and_its_gradients(equation):
    config = adapter(**EQUATIONS[equation])
    model, inputs = build(default=config), token_inputs()
    mixing = config.target_modules
    assert set(mixing) == ({"down_proj", "o_proj"} if config.side == "output" else set(LLAMA_DEFAULT))
    found = assert_computes(model, Oracle(model, {"default": config}, mixing), inputs)
    assert len(found) == 6 * 4
    without = Oracle(model, {"default": adapter(0.0, **EQUATIONS[equation])}, mixing)
    assert different(output(without, inputs), output(model, inputs))  # lambda is seen


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(activation):
    config = adapter(activation=activation)
    model = build(default=config)
    assert_computes(model, Oracle(model, {"default": config}), token_inputs())


@pytest.mark.parametrize("equation", EQUATIONS)
def test_lambda_0_is_the_plain_adapter(equation):
    config = adapter(0, **EQUATIONS[equation])
    model = build(default=config)
    assert not any("lambda" in name for name in model.state_dict())
    assert residual_hooks_on(model) == []
    assert_computes(model, Oracle(model, {"default": config}), token_inputs())


def test_learnable_lambda_and_scaling_get_their_gradients():
    config = adapter(sibo_learnable=True, scaling="learnable", adapter_bias=False)
    model = build(default=config)
    found = assert_computes(model, Oracle(model, {"default": config}), token_inputs())
    assert sum("lambda" in name for name in found) == sum("scaling" in name for name in found) == 6


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("gpt2", ["mlp.c_fc"]),  # a Conv1D
        ("gptj", ["fc_in"]),
        ("bloom", ["dense_h_to_4h"]),
        ("bert", ["intermediate.dense"]),
        ("t5", ["wi"]),
        ("llava", ["fc1", "gate_proj", "up_proj"]),
    ],
)
def test_other_architectures(name, default):
    architecture = ARCHITECTURES[name]
    config = adapter()
    model, inputs = build(base_model(architecture.build), default=config), architecture.inputs()
    assert {next(end for end in default if layer.endswith(end)) for layer in layers_of(model)} == set(default)
    rows = explain(model)
    assert rows and all(row.mixes for row in rows)
    oracle = Oracle(model, {"default": config}, default)
    with torch.no_grad():
        close(model(**inputs).logits, oracle(**inputs).logits)
    found = adapter_gradients(model, inputs)
    for key, gradient in oracle_gradients(oracle, inputs, found).items():
        close(found[key], gradient)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"mixtral"}))
def test_default_targets_are_the_feed_forward_linears_that_read_the_stream(name):
    expected = {
        "llama": LLAMA_DEFAULT, "mistral": LLAMA_DEFAULT, "qwen3": LLAMA_DEFAULT, "gemma3": LLAMA_DEFAULT,
        "gpt2": ("c_fc",), "gptj": ("fc_in",), "bloom": ("dense_h_to_4h",), "opt": ("fc1",),
        "bert": ("intermediate.dense",), "roberta": ("intermediate.dense",), "vit": ("fc1",), "t5": ("wi",),
        "bart": ("fc1",), "llava": ("fc1", *LLAMA_DEFAULT),
    }[name]  # fmt: skip
    for attention in ("sdpa", "eager"):
        base = ARCHITECTURES[name].build()
        base.set_attn_implementation(attention)
        config = adapter()
        build(base, default=config)
        assert config.target_modules == set(expected), attention


def test_a_model_without_linears_in_its_feed_forward_says_so():
    with pytest.raises(ValueError, match="No linear of a feed-forward network.*MixtralForCausalLM.*target_modules"):
        build(ARCHITECTURES["mixtral"].build(), default=adapter())


def test_the_embedding_as_source():
    """GPT-2 adds positions before the first block: the two sources differ."""
    inputs = token_inputs()
    outputs = []
    for source in ("block_input", "embedding"):
        torch.manual_seed(0)
        base = base_model(ARCHITECTURES["gpt2"].build)
        config = adapter(sibo_source=source)
        model = build(base, default=config)
        outputs.append(output(model, inputs))
    oracle = Oracle(model, {"default": config}, ["c_fc"])
    embedding = oracle.base.transformer.wte
    embedding.register_forward_hook(lambda _, args, out: oracle.h0.__setitem__("transformer.h", out))
    oracle.base.transformer.h[0]._forward_pre_hooks.clear()
    close(outputs[1], output(oracle, inputs))
    assert different(*outputs)


def test_named_targets_that_cannot_mix_get_a_plain_adapter():
    config = adapter(target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
    model = build(default=config)
    assert_computes(model, Oracle(model, {"default": config}, ("q_proj", "up_proj")), token_inputs())


def test_sibo_target_modules_chooses_among_the_targets():
    config = adapter(sibo_target_modules=["up_proj"])
    model = build(default=config)
    assert_computes(model, Oracle(model, {"default": config}, ("up_proj",)), token_inputs())


# --- Sub-layers


@pytest.mark.parametrize("options", [PARALLEL, {"placement": "series", "side": "output"}], ids=["parallel", "output"])
def test_sub_layers_keep_their_tuples_and_attributes(options):
    """self_attn returns a tuple, and gets its hidden states by keyword; mlp returns a tensor."""
    config = adapter(target_modules=["mlp", "self_attn"], **options)
    model, inputs = build(default=config), token_inputs()
    block = model.base_model.model.model.layers[0]
    assert block.self_attn.head_dim == 8 and block.mlp.gate_proj.in_features == 32
    assert_computes(model, Oracle(model, {"default": config}, ("mlp", "self_attn")), inputs)
    model.set_attn_implementation("eager")
    assert len(model(**inputs, output_attentions=True).attentions) == 3


def test_a_sub_layer_gets_no_adapter_in_front_of_it():
    with pytest.raises(ValueError, match=r"mlp is a LlamaMLP, not a linear layer.*placement='parallel'"):
        build(default=adapter(target_modules=["mlp"]))


# --- The output side


def test_the_output_side_refuses_what_is_not_as_wide():
    message = (
        r"None of the 6 adapter targets can mix.*returns 48 features, and .*model\.layers has 32.*down projections"
    )
    with pytest.raises(ValueError, match=message):
        build(default=adapter(side="output"))
    message = r"side='output': .*gate_proj returns 48 features.*has 32.*sibo_target_modules"
    with pytest.raises(ValueError, match=message):
        build(default=adapter(side="output", target_modules=["gate_proj", "down_proj"]))
    message = r"sibo_target_modules asks for .*up_proj, which cannot mix: it returns 48.*a plain adapter"
    with pytest.raises(ValueError, match=message):
        build(default=adapter(side="output", target_modules=["up_proj", "down_proj"], sibo_target_modules=["up_proj"]))


def test_the_output_side_mixes_what_is_named_and_leaves_the_others_plain():
    config = adapter(side="output", target_modules=["up_proj", "down_proj"], sibo_target_modules=["down_proj"])
    model = build(default=config)
    assert_computes(model, Oracle(model, {"default": config}, ("down_proj",)), token_inputs())


def test_on_the_output_side_cross_attention_keys_do_not_mix():
    """They are as wide, and of other tokens."""
    options = {"side": "output", "target_modules": ["EncDecAttention.k", "wo"]}
    model = build(base_model(ARCHITECTURES["t5"].build), default=adapter(**options))
    by_name = {row.module.removeprefix("base_model.model."): row for row in explain(model)}
    key = by_name["decoder.block.0.layer.1.EncDecAttention.k"]
    assert not key.mixes and key.reason == "reads another stack's stream (encoder.block)"
    assert by_name["decoder.block.0.layer.2.DenseReluDense.wo"].mixes


# --- Dropout


def test_dropout_acts_on_the_mix_in_training_only():
    config = adapter(adapter_dropout=0.5)
    model, inputs = build(default=config), token_inputs()
    expected = output(Oracle(model, {"default": config}), inputs)
    close(output(model, inputs), expected)
    model.train()
    torch.manual_seed(3)
    first = output(model, inputs)
    assert different(first, expected)
    assert different(output(model, inputs), first)
    torch.manual_seed(3)
    assert torch.equal(output(model, inputs), first)


def test_a_fresh_adapter_is_the_base_model_unless_it_starts_as_berts():
    from peft import get_peft_model

    inputs = token_inputs()
    for init, same in ((True, True), ("bert", False)):
        base = base_model()
        expected = output(base, inputs)
        model = get_peft_model(base, adapter(init_weights=init, placement="parallel"))
        assert torch.equal(output(model, inputs), expected) is same
        layer = next(iter(layers_of(model).values()))
        deviation = layer.sibo_adapter_down["default"].weight.std()
        assert (0.01 < deviation < 0.03) is not same
        assert layer.sibo_adapter_down["default"].bias.abs().sum() == 0

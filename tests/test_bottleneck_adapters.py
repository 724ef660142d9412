"""Several bottleneck adapters in one model: switched, added up, in one batch, disabled, deleted, unloaded."""

import copy

import pytest
import torch
from adapter_models import base_model, close, different, hooks_on, output, residual_hooks_on
from bottleneck_models import (
    LLAMA_DEFAULT,
    PARALLEL,
    SERIES_INPUT,
    Oracle,
    adapter,
    adapter_gradients,
    build,
    layers_of,
    randomise,
)
from peft import LoraConfig, get_peft_model
from refusals import assert_as_it_was, fingerprint
from tiny_models import ARCHITECTURES, token_inputs
from torch import nn

from sibo_triton import SiboAdapterConfig, SiboLoraConfig, explain

pytestmark = pytest.mark.oldest

DOWN = {"side": "output", "target_modules": ["down_proj"]}
CONFIGS = {
    "mild": lambda: adapter(0.1),
    "strong": lambda: adapter(0.7, **PARALLEL, activation="gelu", bottleneck_size=3),
    "plain": lambda: adapter(0.0),
    "behind": lambda: adapter(0.4, **DOWN),
}
MIXING = (*LLAMA_DEFAULT, "down_proj")


def several(*names):
    configs = {name: CONFIGS[name]() for name in names or CONFIGS}
    return build(**configs), configs


def test_each_adapter_has_its_own_weights_lambda_and_equation():
    model, configs = several()
    inputs, outputs = token_inputs(), []
    for name in configs:
        model.set_adapter(name)
        outputs.append(output(model, inputs))
        close(outputs[-1], output(Oracle(model, {name: configs[name]}, MIXING), inputs))
    assert all(different(one, other) for i, one in enumerate(outputs) for other in outputs[:i])


@pytest.mark.parametrize("names", [["mild", "plain"], ["plain", "strong"], ["behind", "mild", "strong"]])
def test_several_active_adapters_add_up(names):
    """In any order: each reads what the others have not changed."""
    model, configs = several()
    inputs = token_inputs()
    model.base_model.set_adapter(names)
    found = output(model, inputs)
    model.base_model.set_adapter(names[::-1])
    close(output(model, inputs), found)
    assert len(adapter_gradients(model, inputs)) == sum(len(layers_of(model, name)) for name in names) * 4

    expected = copy.deepcopy(model.get_base_model())  # the sum, by the layers' own forward with one adapter at a time
    for layer in (module for module in expected.modules() if hasattr(module, "sibo_adapter_options")):
        layer.forward = one_by_one(layer, names)
    close(output(expected, inputs), found)


def one_by_one(layer, names):
    """The branches of each adapter alone, added to what the frozen linear returns for x or the changed x."""
    own = [name for name in names if name in layer.sibo_adapter_options]
    add = type(layer)._add_branch

    def forward(x):
        in_front = [name for name in own if layer.sibo_adapter_options[name].in_front]
        changed = x + sum(add(layer, name, x, x) - x for name in in_front)
        z = layer.base_layer(changed)
        behind = [name for name in own if name not in in_front]
        reads = {name: z if layer.sibo_adapter_options[name].reads_output else x for name in behind}
        return z + sum(add(layer, name, z, reads[name]) - z for name in behind)

    return forward


# --- One batch


ROWS = ["mild", "__base__", "strong", "mild", "behind", "plain", "strong"]


@pytest.mark.parametrize("rows", [ROWS, ROWS[::-1], ["mild"] * 3, ["__base__", "__base__"]])
def test_a_mixed_batch_gives_each_row_its_adapter(rows):
    model, configs = several()
    inputs = token_inputs(batch=len(rows))
    found = output(model, inputs, adapter_names=rows)
    for row, name in enumerate(rows):
        alone = {"input_ids": inputs["input_ids"][row : row + 1]}
        if name == "__base__":
            with model.disable_adapter():
                expected = output(model, alone)
        else:
            model.set_adapter(name)
            expected = output(model, alone)
        close(found[row : row + 1], expected)


def test_generating_with_adapter_names_and_beams():
    model, _ = several()
    inputs = token_inputs(batch=3)["input_ids"]
    rows = ["mild", "__base__", "behind"]
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    found = model.generate(input_ids=inputs, adapter_names=rows, **options)
    for row, name in enumerate(rows):
        if name != "__base__":
            model.set_adapter(name)
            assert torch.equal(found[row], model.generate(input_ids=inputs[row : row + 1], **options)[0])
    assert not any("adapter_names" in repr(hook) for hook in hooks_on(model))


def test_a_mixed_batch_of_an_encoder_and_decoder_with_beams():
    config = adapter()
    model = build(base_model(ARCHITECTURES["t5"].build), one=config)
    inputs = torch.randint(3, 50, (2, 6))
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    found = model.generate(input_ids=inputs, adapter_names=["one", "__base__"], **options)
    assert torch.equal(found[0], model.generate(input_ids=inputs[:1], **options)[0])


def test_what_a_mixed_batch_refuses():
    model, _ = several()
    inputs = token_inputs(batch=2)
    with pytest.raises(ValueError, match="non-existing adapter.*typo"):
        model(**inputs, adapter_names=["mild", "typo"])
    with pytest.raises(ValueError, match="adapter_names has 3 entries, but a layer got an input of 2 rows"):
        model(**inputs, adapter_names=["mild", "mild", "strong"])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(**inputs, adapter_names=["mild", "strong"])
    assert not any("adapter_names" in repr(hook) for hook in hooks_on(model))


# --- Switching on and off


def test_set_adapter_moves_what_is_trainable():
    options = {"sibo_learnable": True, "scaling": "learnable"}
    model = build(one=adapter(**options), other=adapter(**options), fixed=adapter())

    def trainable():
        return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}

    def count():
        return sum(p.requires_grad for p in model.parameters())

    assert (trainable(), count()) == ({"one"}, 6 * 6)
    model.set_adapter("other")
    assert (trainable(), count()) == ({"other"}, 6 * 6)
    model.set_adapter("fixed")
    assert (trainable(), count()) == ({"fixed"}, 6 * 4)
    status = model.get_model_status()
    assert status.active_adapters == ["fixed"] and status.adapter_model_type == "SiboAdapterModel"
    assert status.requires_grad == {"one": False, "other": False, "fixed": True}


def test_modules_to_save_are_trained_beside_the_adapter():
    model = build(default=adapter(modules_to_save=["lm_head"]))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head.modules_to_save.default" in name for name in names)
    assert all("lm_head" in name or ".sibo_adapter_" in name for name in names)


# --- Deleting, unloading


def test_deleting_one_of_two_leaves_the_other_right_and_the_last_takes_the_hooks_off():
    model, configs = several("mild", "strong", "plain")
    inputs = token_inputs()
    model.delete_adapter("mild")
    model.set_adapter("strong")
    close(output(model, inputs), output(Oracle(model, {"strong": configs["strong"]}), inputs))
    assert hooks_on(model)
    model.delete_adapter("strong")
    assert residual_hooks_on(model) == [] and not any("lambda" in name for name in model.state_dict())
    model.set_adapter("plain")
    close(output(model, inputs), output(Oracle(model, {"plain": configs["plain"]}), inputs))
    assert {row.adapter for row in explain(model)} == {"plain"}


def test_an_adapter_of_a_deleted_ones_name_is_a_new_one():
    model, _ = several("mild", "plain")
    model.delete_adapter("mild")
    config = adapter(0.0, bottleneck_size=9)
    model.add_adapter("mild", config)
    randomise(model)
    model.set_adapter("mild")
    inputs = token_inputs()
    close(output(model, inputs), output(Oracle(model, {"mild": config}), inputs))
    assert not any(row.mixes for row in explain(model))


def test_transformers_add_and_delete_adapter():
    model, inputs = base_model(), token_inputs()
    expected = output(model, inputs)
    for name, value in (("one", 0.3), ("two", 0.6)):
        model.add_adapter(adapter(value), adapter_name=name)
    randomise(model)
    assert different(output(model, inputs), expected) and hooks_on(model)
    model.disable_adapters()
    assert torch.equal(output(model, inputs), expected)
    model.enable_adapters()
    model.delete_adapter("one")
    assert hooks_on(model)
    model.delete_adapter("two")
    assert hooks_on(model) == []
    assert torch.equal(output(model, inputs), expected)


@pytest.mark.parametrize("value", [0.3, 0.0])
@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True),
        lambda model: model.merge_adapter(["default"]),
        lambda model: next(iter(layers_of(model).values())).merge(),
    ],
)
def test_merging_is_refused_before_anything_is_touched(merge, value):
    model, inputs = build(default=adapter(value)), token_inputs()
    before = fingerprint(model, inputs)
    with pytest.raises(ValueError, match="Cannot merge adapter 'default': a bottleneck adapter is not linear.*unload"):
        merge(model)
    assert_as_it_was(model, inputs, before)


def test_combining_is_refused():
    model, _ = several("mild", "plain")
    with pytest.raises(ValueError, match="cannot be combined into one"):
        model.base_model.add_weighted_adapter(["mild", "plain"], [0.5, 0.5], "sum")


# --- Other methods, other models


def test_lora_and_bottleneck_adapters_in_one_model_on_different_modules():
    """As transformers allows it; both bind the same initial residual."""
    model, inputs = base_model(), token_inputs()
    model.add_adapter(SiboLoraConfig(r=4, target_modules=["q_proj"], sibo_lambda=0.3), adapter_name="lora")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model.add_adapter(adapter(), adapter_name="adapter")
    hooks = len(hooks_on(model))
    model.set_adapter(["lora", "adapter"])
    assert sorted({(row.adapter, row.method, row.mixes) for row in explain(model)}) == [
        ("adapter", "adapter", True),
        ("lora", "LoRA", True),
    ]
    model.delete_adapter("lora")
    assert len(hooks_on(model)) == hooks
    randomise(model)
    close(output(model, inputs), output(Oracle(model, {"adapter": adapter()}), inputs))


def test_a_module_with_an_adapter_of_another_method_is_refused():
    model, inputs = base_model(), token_inputs()
    model.add_adapter(LoraConfig(r=4, target_modules=["up_proj"]), adapter_name="lora")
    before = fingerprint(model, inputs)
    with (
        pytest.warns(UserWarning, match="Already found"),
        pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj has an adapter of another method already \(Linear\)"),
    ):
        model.add_adapter(adapter(), adapter_name="adapter")
    assert_as_it_was(model, inputs, before)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("names 'up_prj', which match no module that adapter targets", {"sibo_target_modules": ["up_prj"]}),
        ("asks for lm_head, which cannot mix: it lies outside", {"sibo_target_modules": ["lm_head"]}),
        ("asks for .*o_proj, which cannot mix: it is not fed by", {"sibo_target_modules": ["o_proj"]}),
        ("None of the 3 adapter targets can mix", {"target_modules": ["o_proj"]}),
        ("Target modules .*nothing.* not found", {"target_modules": ["nothing"]}),
        ("sibo_blocks names 'blocks'", {"sibo_blocks": ["blocks"]}),
        ("embed_tokens is a Embedding, not a linear layer", {"target_modules": ["embed_tokens", "up_proj"]}),
    ],
)
def test_a_refused_adapter_leaves_the_model_as_it_was(message, options):
    model, inputs = base_model(), token_inputs()
    config = adapter(**{"target_modules": ["up_proj", "o_proj", "lm_head"], **options})
    before = fingerprint(model, inputs)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config)
    assert_as_it_was(model, inputs, before)
    peft_model = build(model, first=adapter())
    before = fingerprint(peft_model, inputs)
    with pytest.raises(ValueError, match=message):
        peft_model.add_adapter("second", config)
    assert list(peft_model.peft_config) == ["first"]
    assert_as_it_was(peft_model, inputs, before)


def test_torch_s_multihead_attention_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    config = SiboAdapterConfig(target_modules=["out_proj"], sibo_lambda=0)
    with pytest.raises(ValueError, match="attention.out_proj is read by torch's MultiheadAttention"):
        get_peft_model(Model(), config)


def test_a_plain_adapter_needs_no_transformer():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    peft_model = build(model, default=SiboAdapterConfig(target_modules=["0"], sibo_lambda=0, bottleneck_size=3))
    x = torch.randn(5, 4)
    layer = peft_model.base_model.model[0]
    down, up = layer.sibo_adapter_down["default"], layer.sibo_adapter_up["default"]
    changed = x + torch.tanh(x @ down.weight.T) @ up.weight.T
    close(peft_model(x), model[2](model[1](layer.base_layer(changed))))
    close(layer(x[0]), layer.base_layer(changed[0]))  # one row alone
    with pytest.raises(TypeError, match="An adapter on a Linear got no hidden states .* but torch.int64"):
        layer(torch.ones(2, 4, dtype=torch.long))


def test_hooks_on_the_adapter_s_modules_are_called_and_it_says_so():
    config = adapter(scaling="learnable", adapter_dropout=0.2)
    model, inputs = build(default=config), token_inputs()
    expected, gradients = output(model, inputs), adapter_gradients(model, inputs)
    calls = []
    layer = layers_of(model)["model.layers.1.mlp.up_proj"]
    layer.sibo_adapter_up["default"].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.up_proj: .*one by one, because sibo_adapter_up has hooks"):
        close(output(model, inputs), expected)
    assert calls == [1]
    for name, gradient in adapter_gradients(model, inputs).items():
        close(gradient, gradients[name])
    row = next(row for row in explain(model) if row.module.endswith("layers.1.mlp.up_proj"))
    assert (row.runs, row.runs_reason) == ("modules", "sibo_adapter_up has hooks")
    model.train()
    torch.manual_seed(1)
    by_modules = output(model, inputs)
    layer.sibo_adapter_up["default"]._forward_hooks.clear()
    torch.manual_seed(1)
    close(output(model, inputs), by_modules)  # the same mask


def test_explain_lists_the_layers():
    model = build(default=adapter(0.25, target_modules=["up_proj", "o_proj"]))
    text = str(explain(model))
    lines = [line.split() for line in text.splitlines()]
    assert ["model.layers.*.mlp.up_proj", "3", "default", "SIBO-adapter", "0.25"] in [line[:5] for line in lines]
    assert ["model.layers.*.self_attn.o_proj", "3", "default", "adapter"] in [line[:4] for line in lines]
    assert "3 of 6 adapter layers mix in the initial residual." in text
    assert "6 run the adapter fused, beside their frozen layer, in plain PyTorch" in text


def test_series_input_is_the_default():
    assert SERIES_INPUT.items() <= vars(SiboAdapterConfig()).items()


SUB_LAYERS = [{"placement": "parallel", "target_modules": ["mlp"]}, {"side": "output", "target_modules": ["self_attn"]}]


@pytest.mark.parametrize("options", SUB_LAYERS)
def test_sub_layers_are_unloaded(options):
    model, inputs = build(default=adapter(0.3, **options)), token_inputs()
    with model.disable_adapter():
        expected = output(model, inputs)
    assert different(output(model, inputs), expected)
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == base_model().state_dict().keys() and residual_hooks_on(unloaded) == []
    close(output(unloaded, inputs), expected)


@pytest.mark.parametrize("options", SUB_LAYERS)
def test_sub_layers_give_their_adapters_device_and_dtype(options):
    model = get_peft_model(base_model().bfloat16(), adapter(0.3, **options), autocast_adapter_dtype=False)
    model.add_adapter("two", adapter(0.3, **options), autocast_adapter_dtype=False)
    for name in ("default", "two"):
        for layer in layers_of(model, name).values():
            assert (
                layer.sibo_adapter_down[name].weight.dtype == layer.sibo_adapter_up[name].weight.dtype == torch.bfloat16
            )
            assert layer._get_base_layer_device_and_dtype(layer.base_layer) == (torch.device("cpu"), torch.bfloat16)


def test_adapters_inside_of_one_another_are_refused():
    """A wrapped sub-layer renames the weights below it: they could not be loaded any more."""
    around = adapter(0.3, **SUB_LAYERS[0])
    model, inputs = build(default=adapter(0.3, target_modules=["gate_proj"])), token_inputs()
    before = fingerprint(model, inputs)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp holds gate_proj, which have adapters already"):
        model.add_adapter("around", around)
    assert_as_it_was(model, inputs, before)
    base = base_model()
    before = fingerprint(base, inputs)
    with pytest.raises(ValueError, match=r"mlp.up_proj lies inside of model.layers.0.mlp, which has an adapter"):
        get_peft_model(base, adapter(0.3, placement="parallel", target_modules=["up_proj", "mlp"]))
    assert_as_it_was(base, inputs, before)
    model = build(default=around)
    before = fingerprint(model, inputs)
    with pytest.raises(ValueError, match="outside of mlp, which have adapters as a whole. Name the modules"):
        model.add_adapter("inside", adapter(0.3))
    assert_as_it_was(model, inputs, before)

"""`accelerate` fuses plain LoRA adapters and changes nothing else; `restore` leaves no trace of it."""

import copy
import pickle
import warnings

import pytest
import torch
from adapter_models import base_model, close, gradients, lora_layers, output, plain, sibo
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, llama, randomise_adapters, token_inputs
from torch import nn
from transformers import LlamaForCausalLM

from sibo_triton import SiboLoraConfig, accelerate, accelerate_all, explain, reference, restore
from sibo_triton.lora.layer import FusedLinear

ALL = {"target_modules": "all-linear"}


def plain_model(**options):
    model = get_peft_model(base_model(), plain(**{**ALL, **options}))
    randomise_adapters(model)
    return model.eval()


def runs(model):
    return {row.runs for row in explain(model)}


def traces(model):
    """All that is ours on a model, or could be: classes, attributes, hooks."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return {
        name: (type(module), sorted(module.__dict__), [list(module.__dict__[hooks]) for hooks in names])
        for name, module in model.named_modules()
    }


@pytest.mark.oldest
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_bias": False, "rank_pattern": {"k_proj": 2}}], ids=str
)
def test_outputs_and_gradients_differ_by_rounding(options):
    model = plain_model(**options)
    inputs = token_inputs()
    expected, expected_gradients = output(model, inputs), gradients(model, inputs)
    assert accelerate(model) is model
    assert runs(model) == {"fused"}
    found, found_gradients = output(model, inputs), gradients(model, inputs)
    close(found, expected)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        close(found_gradients[name], gradient)


@pytest.mark.oldest
def test_restore_is_bit_for_bit():
    model, inputs = plain_model(), token_inputs()
    expected, before = output(model, inputs), traces(model)
    accelerate(model)
    assert traces(model) != before
    output(model, inputs)
    assert restore(model) is model
    assert traces(model) == before
    assert torch.equal(output(model, inputs), expected)
    assert runs(model) == {"PEFT"}


def test_dropout_draws_the_definitions_mask():
    model, inputs = plain_model(lora_dropout=0.3), token_inputs()
    twin = copy.deepcopy(model).train()
    accelerate(model).train()

    class Drop(nn.Module):
        def forward(self, x):
            return reference.dropout(x, 0.3, reference.draw_seed())

    for _, layer in lora_layers(twin, "default"):
        layer.lora_dropout["default"] = Drop()
    torch.manual_seed(3)
    expected = twin(**inputs).logits
    torch.manual_seed(3)
    close(model(**inputs).logits, expected)
    assert not torch.allclose(model(**inputs).logits, expected, atol=1e-3)  # another forward, another mask


@pytest.mark.oldest
def test_files_are_those_of_plain_lora(tmp_path):
    model, inputs = plain_model(), token_inputs()
    model.save_pretrained(tmp_path / "plain")
    accelerate(model).save_pretrained(tmp_path / "accelerated")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "accelerated"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("plain", "accelerated")]
    assert configs[0] == configs[1]
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "accelerated")
    assert runs(loaded) == {"PEFT"}
    loaded.base_model.model.load_state_dict(model.base_model.model.state_dict())
    close(output(accelerate(loaded), inputs), output(model, inputs))
    assert runs(loaded) == {"fused"}


@pytest.mark.oldest
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_pefts_bit_for_bit(safe):
    model, inputs = plain_model(), token_inputs()
    twin = accelerate(copy.deepcopy(model))
    for each in (model, twin):
        each.merge_adapter(safe_merge=safe)
    assert torch.equal(output(model, inputs), output(twin, inputs))
    for each in (model, twin):
        each.unmerge_adapter()
    for name, weight in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], weight), name
    assert runs(twin) == {"fused"}
    merged, other = model.merge_and_unload(safe_merge=safe), twin.merge_and_unload(safe_merge=safe)
    assert traces(merged) == traces(other)
    assert torch.equal(output(merged, inputs), output(other, inputs))


@pytest.mark.oldest
def test_everything_else_goes_to_peft():
    model, inputs = plain_model(), token_inputs()
    model.add_adapter("other", plain(r=2, lora_alpha=5))
    randomise_adapters(model)
    model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "both", combination_type="cat")
    twin = accelerate(copy.deepcopy(model))
    batch = {"adapter_names": ["default", "__base__"]}
    with twin.disable_adapter(), model.disable_adapter():
        assert torch.equal(output(model, inputs), output(twin, inputs))
    close(output(model, inputs, **batch), output(twin, inputs, **batch))
    for names in ("other", ["default", "other"], "both"):
        for each in (model, twin):
            each.base_model.set_adapter(names)
        close(output(model, inputs), output(twin, inputs))
    for each in (model, twin):
        each.delete_adapter("both")
        each.delete_adapter("default")
        each.set_adapter("other")
    close(output(model, inputs), output(twin, inputs))
    assert {row.adapter: row.runs for row in explain(twin)} == {"other": "fused"}
    for each in (model, twin):
        each.delete_adapter("other")
    assert not any(type(module) is FusedLinear for module in twin.modules())


def test_only_the_adapters_that_are_named():
    model = plain_model()
    model.add_adapter("other", plain(**ALL))
    accelerate(model, ["other"])
    assert {(row.adapter, row.runs) for row in explain(model)} == {("default", "PEFT"), ("other", "fused")}
    restore(model)
    assert runs(model) == {"PEFT"}
    model.add_adapter("third", plain(**ALL))
    accelerate(accelerate(model))
    assert runs(model) == {"fused"}
    model.add_adapter("fourth", plain(**ALL))
    assert {row.runs for row in explain(model) if row.adapter == "fourth"} == {"PEFT"}


def test_what_is_more_than_lora_is_left_alone_and_listed():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], use_dora=False))
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True))
    dora = {name: type(layer.lora_variant["dora"]) for name, layer in lora_layers(model, "dora")}
    accelerate(model)
    found = {(row.module.rpartition(".")[2], row.adapter): (row.runs, row.runs_reason) for row in explain(model)}
    assert found["q_proj", "dora"] == ("PEFT", "DoraLinear is more than LoRA")
    assert found["embed_tokens", "default"] == ("PEFT", "LoRA on a Embedding")
    assert found["q_proj", "default"][0] == "fused"
    assert {name: type(layer.lora_variant["dora"]) for name, layer in lora_layers(model, "dora")} == dora
    restore(model)
    assert {name: type(layer.lora_variant["dora"]) for name, layer in lora_layers(model, "dora")} == dora


@pytest.mark.oldest
def test_other_base_layers_keep_their_own_forward():
    """GPT-2's are Conv1D: the frozen layer runs as ever, and the adapter is one operation."""
    gpt2 = ARCHITECTURES["gpt2"]
    model = get_peft_model(gpt2.build(), LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)).eval()
    randomise_adapters(model)
    inputs = token_inputs()
    expected = output(model, inputs)
    accelerate(model)
    assert runs(model) == {"adapter"}
    close(output(model, inputs), expected)
    expected = model.merge_and_unload()
    assert not any(isinstance(module, LoraLinear) for module in expected.modules())


def test_beside_a_sibo_adapter():
    model = plain_model()
    model.add_adapter("sibo", sibo(0.3, **ALL))
    randomise_adapters(model)
    inputs = token_inputs()
    model.set_adapter("sibo")
    mixed = output(model, inputs)
    accelerate(model)
    assert torch.equal(output(model, inputs), mixed)
    restore(model)
    assert torch.equal(output(model, inputs), mixed)
    assert {(row.adapter, row.runs) for row in explain(model)} == {("default", "PEFT"), ("sibo", "fused")}
    model.delete_adapter("sibo")
    assert not any(type(module) is FusedLinear for module in model.modules())


def test_lambda_0_is_plain_lora():
    model = get_peft_model(base_model(), SiboLoraConfig(r=4, sibo_lambda=0, **ALL))
    assert runs(model) == {"PEFT"}
    assert runs(accelerate(model)) == {"fused"}


@pytest.mark.oldest
def test_a_model_of_transformers():
    model = base_model()
    model.add_adapter(plain(**ALL))
    randomise_adapters(model)
    inputs = token_inputs()
    expected = output(model, inputs)
    close(output(accelerate(model), inputs), expected)
    assert runs(model) == {"fused"}
    model.delete_adapter("default")
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies(make_copy):
    model, inputs = accelerate(plain_model()), token_inputs()
    twin = make_copy(model)
    assert torch.equal(output(twin, inputs), output(model, inputs))
    restore(model)
    assert runs(twin) == {"fused"} and runs(model) == {"PEFT"}


def test_a_module_that_is_no_transformer():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), LoraConfig(r=2, target_modules=["0", "2"])
    )
    randomise_adapters(model)
    x = torch.randn(3, 4)
    expected = model(x)
    close(accelerate(model)(x), expected)
    assert runs(model) == {"fused"}


@pytest.fixture
def all_to_come():
    accelerate_all()
    yield
    accelerate_all(False)


@pytest.mark.oldest
def test_all_adapters_to_come(all_to_come, tmp_path):
    model = plain_model()
    assert runs(model) == {"fused"}
    model.add_adapter("other", plain(**ALL))
    assert runs(model) == {"fused"}
    model.save_pretrained(tmp_path)
    assert runs(PeftModel.from_pretrained(base_model(), tmp_path)) == {"fused"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=True)
        loaded(**token_inputs())
    assert not [of for of in said if "one by one" in str(of.message)]  # nor in the trial run, with weights on meta
    by_transformers = base_model()
    by_transformers.load_adapter(tmp_path)
    assert runs(by_transformers) == {"fused"}
    accelerate_all(False)
    assert runs(plain_model()) == {"PEFT"}
    assert runs(model) == {"fused"}  # what is there stays


def test_what_cannot_be_accelerated_is_refused_by_name():
    with pytest.raises(TypeError, match="got str"):
        accelerate("model")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRA layers"):
        accelerate(llama())
    with pytest.raises(ValueError, match="No LoRA adapter is named oter; there are default"):
        accelerate(plain_model(), ["oter"])
    with pytest.raises(ValueError, match="No LoRA adapter is named oter; there are default"):
        restore(plain_model(), "oter")
    with pytest.raises(ValueError, match="adapter_names is empty"):
        accelerate(plain_model(), [])


def test_some_adapters_of_a_model():
    model = plain_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    accelerate(model, "other")
    assert set(layer.lora_variant) == {"other"}
    accelerate(model, ["default"])
    restore(model, "other")
    assert set(layer.lora_variant) == {"default"} and type(layer) is FusedLinear
    restore(model)
    assert not layer.lora_variant and type(layer) is not FusedLinear


def test_layers_that_run_alone_because_the_trial_run_failed_are_named():
    class NeedsMore(LlamaForCausalLM):
        def forward(self, input_ids, needed, **kwargs):
            return super().forward(input_ids, **kwargs)

    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    model = get_peft_model(NeedsMore(llama().config), config)
    model.base_model.model.model.forward = None  # nor can the part that holds the blocks be run
    with pytest.warns(UserWarning, match="Which layers get the same input was not found.*NeedsMore.*model.layers: "):
        accelerate(model)


def test_x_lora_is_refused(tmp_path):
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path)})
    base = llama()
    config.hidden_size = base.config.hidden_size
    base.config.use_cache = False
    model = get_peft_model(base, config)
    with pytest.raises(ValueError, match="X-LoRA"):
        accelerate(model)
    base = llama()
    base.config.use_cache = False
    accelerate_all()
    try:
        model = get_peft_model(base, config)
    finally:
        accelerate_all(False)
    assert runs(model) == {"PEFT"}


@pytest.mark.oldest
def test_that_nothing_could_be_accelerated_is_said():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.warns(UserWarning, match="changed nothing: .*q_proj, adapter 'default': DoraLinear is more than LoRA"):
        accelerate(model)
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="changed nothing: .*embed_tokens, adapter 'default': LoRA on a Embedding"):
        accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        accelerate(get_peft_model(llama(), sibo(0.3)))  # fused already
        accelerate(plain_model())


@pytest.mark.oldest
def test_conversion_to_lora_is_offered_as_before():
    model = plain_model()
    before = {name: layer.supports_lora_conversion() for name, layer in lora_layers(model, "default")}
    assert before and all(before.values())
    accelerate(model)
    assert {name: layer.supports_lora_conversion() for name, layer in lora_layers(model, "default")} == before

"""Backends, and ways of running adapters, that would compute plain LoRA whatever the adapter is: refused."""

import importlib.util
import inspect
import sys
import types
from pathlib import Path

import peft.import_utils
import pytest
import torch
from peft import ArrowConfig, LoraConfig, PeftMixedModel, XLoraConfig, create_arrow_model, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from refusals import (
    assert_as_it_was,
    fingerprint,
    through_get_peft_model,
    through_inject_adapter_in_model,
    through_transformers,
)
from tiny_models import llama, randomise_adapters, token_inputs
from torch import nn

from sibo_triton import SiboLoraConfig, explain
from sibo_triton.lora.peft_layers import dispatches_variants

# --- Backends whose LoRA layers never look at `lora_variant`


class Quantised(nn.Linear):
    """Stands for a layer of a quantisation library."""


class IgnoresVariants(nn.Module, LoraLayer):
    """A PEFT layer as AWQ, AQLM, EETQ, TE and Megatron have it: plain LoRA whatever the adapter is."""

    def __init__(self, base_layer, adapter_name, config, r=0, lora_alpha=1, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x):
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                result = result + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return result


class LooksAtVariants(IgnoresVariants):
    """As bitsandbytes' layers, which split mixed batches in a method of their own."""

    def forward(self, x, adapter_names=None):
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names=adapter_names)
        result = self.base_layer(x)
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.lora_variant:
                result = self.lora_variant[name].forward(self, active_adapter=name, x=x, result=result)
        return result

    def _mixed_batch_forward(self, x, *, adapter_names):
        result = self.base_layer(x)
        for name in set(adapter_names) & set(self.lora_A):
            rows = [row for row, its_name in enumerate(adapter_names) if its_name == name]
            if name in self.lora_variant:
                part = self.lora_variant[name].forward(self, active_adapter=name, x=x[rows], result=result[rows])
                result[rows] = part
        return result


class IgnoresVariantsInMixedBatches(LooksAtVariants):
    """As HQQ's layers."""

    def _mixed_batch_forward(self, x, *, adapter_names):
        result = self.base_layer(x)
        for name in set(adapter_names) & set(self.lora_A):
            rows = [row for row, its_name in enumerate(adapter_names) if its_name == name]
            result[rows] += self.lora_B[name](self.lora_A[name](x[rows])) * self.scaling[name]
        return result


def quantised_llama():
    model = llama()
    for block in model.model.layers:
        old = block.self_attn.q_proj
        block.self_attn.q_proj = Quantised(old.in_features, old.out_features, bias=False)
        block.self_attn.q_proj.weight = old.weight
    return model


@pytest.mark.parametrize("way", [through_get_peft_model, through_inject_adapter_in_model, through_transformers])
@pytest.mark.parametrize("requested", [None, ["q_proj"]])
def test_a_backend_that_ignores_variants_is_refused(way, requested):
    inputs = token_inputs()
    model, add = way(quantised_llama())
    before = fingerprint(model, inputs)
    config = SiboLoraConfig(r=2, target_modules=["q_proj", "k_proj"], sibo_lambda=0.3, sibo_target_modules=requested)
    config._register_custom_module({Quantised: IgnoresVariants})
    message = (
        r"model\.layers\.0\.self_attn\.q_proj is a IgnoresVariants.*computes plain LoRA whatever the adapter is.*"
        r"left out silently.*Use another quantisation \(bitsandbytes.*or peft\.LoraConfig"
    )
    with pytest.raises(ValueError, match=message):
        add(config)
    assert_as_it_was(model, inputs, before)


def test_a_backend_that_ignores_variants_may_stay_plain_lora():
    config = SiboLoraConfig(r=2, target_modules=["q_proj", "k_proj"], sibo_lambda=0.3, sibo_target_modules=["k_proj"])
    config._register_custom_module({Quantised: IgnoresVariants})
    model = get_peft_model(quantised_llama(), config)
    assert {row.module.rpartition(".")[2] for row in explain(model) if row.mixes} == {"k_proj"}


def test_a_backend_that_looks_at_variants_mixes():
    inputs, outputs = token_inputs(), []
    for value in (0.0, 0.3):
        torch.manual_seed(5)
        config = SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=value)
        config._register_custom_module({Quantised: LooksAtVariants})
        model = get_peft_model(quantised_llama(), config)
        randomise_adapters(model)
        with torch.no_grad():
            outputs.append(model(**inputs).logits)
    assert not torch.allclose(*outputs)


def quantised_peft_model(layer_class):
    config = SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0.3)
    config._register_custom_module({Quantised: layer_class})
    model = get_peft_model(quantised_llama(), config, adapter_name="sibo").eval()
    randomise_adapters(model)
    return model, token_inputs()["input_ids"]


def test_a_backend_with_mixed_batches_of_its_own_mixes_in_them():
    model, ids = quantised_peft_model(LooksAtVariants)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["__base__", "sibo"]).logits
        torch.testing.assert_close(mixed[1], model(input_ids=ids).logits[1])
        with model.disable_adapter():
            assert not torch.allclose(mixed[1], model(input_ids=ids).logits[1])


def test_a_backend_that_ignores_variants_in_mixed_batches_only_is_refused_there():
    model, ids = quantised_peft_model(IgnoresVariantsInMixedBatches)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        message = (
            r"model\.layers\.0\.self_attn\.q_proj is a IgnoresVariantsInMixedBatches.*adapter 'sibo' of a mixed batch.*"
            "plain LoRA.*one adapter at a time"
        )
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, adapter_names=["__base__", "sibo"])
        model(input_ids=ids, adapter_names=["__base__", "__base__"])
        assert torch.equal(model(input_ids=ids).logits, before)


def peft_layer_class(module_name, class_name, monkeypatch):
    """A LoRA layer class of PEFT, from a private copy of its module that believes its backend is installed."""
    backends = {
        "aqlm": "QuantizedLinear", "eetq": "EetqLinear", "hqq.core.quantize": "HQQLinear", "hqq": "", "hqq.core": "",
        "bitsandbytes": "", "transformer_engine": "",
    }  # fmt: skip
    for name, attribute in backends.items():
        module = types.ModuleType(name)
        if attribute:
            setattr(module, attribute, type(attribute, (nn.Module,), {}))
        monkeypatch.setitem(sys.modules, name, module)
    for name in dir(peft.import_utils):
        if name.startswith("is_") and name.endswith("_available"):
            monkeypatch.setattr(peft.import_utils, name, lambda: True)
    path = Path(lora.__path__[0]) / f"{module_name}.py"
    if not path.exists():
        pytest.skip(f"this PEFT has no {module_name} layers")
    spec = importlib.util.spec_from_file_location(f"peft.tuners.lora._copy_of_{module_name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, class_name)


@pytest.mark.parametrize(
    ("module_name", "class_name", "expected"),
    [
        ("awq", "AwqLoraLinear", False),
        ("aqlm", "AqlmLoraLinear", False),
        ("eetq", "EetqLoraLinear", False),
        ("te", "TeLinear", False),
        ("tp_layer", "LoraParallelLinear", False),
        ("layer", "Linear", True),
        ("bnb", "Linear4bit", True),
        ("bnb", "Linear8bitLt", True),
        ("gptq", "GPTQLoraLinear", True),
        ("hqq", "HqqLoraLinear", True),
        ("torchao", "TorchaoLoraLinear", True),
        ("inc", "IncLoraLinear", True),
    ],
)
def test_which_backends_of_peft_look_at_variants(module_name, class_name, expected, monkeypatch):
    layer_class = peft_layer_class(module_name, class_name, monkeypatch)
    layer = layer_class.__new__(layer_class)  # only its class is looked at
    assert dispatches_variants(layer) is expected
    assert ("lora_variant" in inspect.getsource(layer_class.forward)) is expected  # by another way of looking


# --- Other ways of running adapters


def test_peft_mixed_model_is_refused(tmp_path):
    inputs = token_inputs()
    config = SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0.3)
    message = "Adapter '(default|new)' is a SIBO adapter, which PeftMixedModel would run as plain LoRA.*mixed=False"
    model = llama()
    before = fingerprint(model, inputs)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config, mixed=True)
    assert_as_it_was(model, inputs, before)

    saved = get_peft_model(llama(), config)
    randomise_adapters(saved)
    saved.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftMixedModel.from_pretrained(model, str(tmp_path))
    assert_as_it_was(model, inputs, before)

    mixed = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
    randomise_adapters(mixed)
    before = fingerprint(mixed, inputs)
    with pytest.raises(ValueError, match=message):
        mixed.add_adapter("new", config)
    assert list(mixed.peft_config) == ["default"]
    assert_as_it_was(mixed, inputs, before)
    with pytest.raises(ValueError, match=message):
        mixed.load_adapter(str(tmp_path), "new")
    assert list(mixed.peft_config) == ["default"]
    assert_as_it_was(mixed, inputs, before)
    mixed.add_adapter("new", SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0))  # plain LoRA is welcome


@pytest.mark.parametrize("folders", [("sibo",), ("plain", "sibo"), ("plain",)])
@pytest.mark.parametrize("general", ["plain", "sibo"])
def test_arrow_s_experts_may_not_mix(tmp_path, folders, general):
    configs = {
        "sibo": SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0.3, task_type="CAUSAL_LM"),
        "plain": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }
    for name, config in configs.items():
        get_peft_model(llama(), config).save_pretrained(tmp_path / name)
    paths = [str(tmp_path / name) for name in folders]

    def create():
        config = ArrowConfig(top_k=1, use_gks=True)
        return create_arrow_model(llama(), paths, config, general_adapter_paths=[str(tmp_path / general)])

    if "sibo" not in (*folders, general):
        create()(**token_inputs())
        return
    with pytest.raises(ValueError, match="is a SIBO adapter, which the router 'arrow_router'.*plain LoRA experts"):
        create()


def test_a_model_with_sibo_adapters_is_left_as_it_was_where_a_router_is_refused():
    model = get_peft_model(llama(), SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0.3))
    inputs = token_inputs()
    before = fingerprint(model, inputs)
    arrow = ArrowConfig()
    arrow.task_adapter_names = ["default"]
    router = LoraConfig(r=2, target_modules=["q_proj"], arrow_config=arrow)
    with pytest.raises(ValueError, match="'default' is a SIBO adapter, which the router 'router'"):
        model.add_adapter("router", router)
    assert list(model.peft_config) == ["default"]
    assert_as_it_was(model, inputs, before)


@pytest.mark.parametrize("folders", [("sibo",), ("plain", "sibo"), ("sibo", "plain")])
def test_x_lora_is_refused(tmp_path, folders):
    inputs = token_inputs()
    configs = {
        "sibo": SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0.3, task_type="CAUSAL_LM"),
        "plain": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }
    for name in folders:
        get_peft_model(llama(), configs[name]).save_pretrained(tmp_path / name)
    model = llama()
    model.config.use_cache = False
    before = fingerprint(model, inputs)

    def x_lora(*names):
        adapters = {str(number): str(tmp_path / name) for number, name in enumerate(names)}
        config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=adapters)
        return get_peft_model(model, config)

    with pytest.raises(
        ValueError, match="is a SIBO adapter, which X-LoRA cannot use.*plain LoRA adapters.*sibo_lambda=0"
    ):
        x_lora(*folders)
    assert_as_it_was(model, inputs, before)
    if "plain" in folders:
        x_lora("plain")(**inputs)

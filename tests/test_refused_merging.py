"""Merging, converting and combining a SIBO adapter is refused and changes nothing; plain ones beside it still merge."""

import pytest
import torch
from peft import LoraConfig, convert_to_lora, get_peft_model
from peft.tuners.lora import intruders
from peft.tuners.lora.layer import LoraLayer
from refusals import TARGETS, assert_as_it_was, fingerprint
from tiny_models import llama, randomise_adapters, token_inputs

from sibo_triton import SiboLoraConfig, explain


def merged_models():
    """A model with a plain and a SIBO adapter, both active, and its inputs. A layer that does not mix comes first."""
    targets = ["q_proj", "v_proj", "o_proj"]
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets), adapter_name="plain")
    model.add_adapter(
        "sibo", SiboLoraConfig(r=2, target_modules=targets, sibo_lambda=0.3, sibo_target_modules=["v_proj"])
    )
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    randomise_adapters(model)
    model.base_model.set_adapter(["plain", "sibo"])
    return model.eval(), token_inputs()


def v_proj(model, block=0):
    return model.base_model.model.model.layers[block].self_attn.v_proj


MERGES = {
    "merge_adapter": lambda m: m.merge_adapter(),
    "merge_adapter, safe": lambda m: m.merge_adapter(safe_merge=True),
    "merge_adapter by name": lambda m: m.merge_adapter(["sibo"]),
    "merge_adapter by keyword": lambda m: m.merge_adapter(adapter_names=["plain", "sibo"]),
    "tuner's merge_adapter": lambda m: m.base_model.merge_adapter(["plain", "sibo"]),
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "merge_and_unload, safe": lambda m: m.merge_and_unload(safe_merge=True),
    "merge_and_unload by name": lambda m: m.merge_and_unload(adapter_names=["plain", "sibo"]),
    "merge_and_unload, positional": lambda m: m.merge_and_unload(False, False, ["plain", "sibo"]),
    "layer.merge": lambda m: v_proj(m).merge(),
    "layer.merge, safe": lambda m: v_proj(m).merge(safe_merge=True),
    "layer.merge by name": lambda m: v_proj(m, 1).merge(adapter_names=["sibo"]),
    "layer.get_delta_weight, by hand": lambda m: v_proj(m).get_delta_weight("sibo"),
    "layer.merge, plain first": lambda m: v_proj(m).merge(adapter_names=["plain", "sibo"]),
}


@pytest.mark.parametrize("how", MERGES)
def test_no_merge_of_a_sibo_adapter_changes_any_layer(how):
    model, inputs = merged_models()
    before = fingerprint(model, inputs)
    message = r"Cannot merge .*v_proj.*reads the initial residual.*Keep the adapter unmerged.*GRPO.*use_vllm=False"
    with pytest.raises(ValueError, match=message):
        MERGES[how](model)
    assert_as_it_was(model, inputs, before)
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraLayer))


def test_the_error_names_the_adapter_and_the_module():
    model, _ = merged_models()
    with pytest.raises(ValueError, match=r"Cannot merge adapter 'sibo' \(model\.layers\.0\.self_attn\.v_proj mixes\)"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_proj.*'sibo'"):
        v_proj(model, 1).merge()


@pytest.mark.parametrize(("learnable", "value"), [(False, 0.3), (False, 1.0), (True, 0.3)])
def test_layers_of_a_transformers_model_are_not_merged_either(learnable, value):
    model = llama()
    model.add_adapter(SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=value, sibo_learnable=learnable))
    randomise_adapters(model)
    inputs = token_inputs()
    before = fingerprint(model, inputs)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            with pytest.raises(ValueError, match="Cannot merge"):
                module.merge()
    assert_as_it_was(model, inputs, before)


def test_the_plain_adapter_beside_merges_alone_by_its_name():
    model, inputs = merged_models()
    with torch.no_grad():
        both = model(**inputs).logits
        model.set_adapter("plain")
        unmerged = model(**inputs).logits
        model.base_model.set_adapter(["plain", "sibo"])
        weight = v_proj(model).get_base_layer().weight.clone()

        model.merge_adapter(["plain"])
        assert not torch.equal(v_proj(model).get_base_layer().weight, weight)
        torch.testing.assert_close(model(**inputs).logits, unmerged, atol=1e-5, rtol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(**inputs).logits, both, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(both, unmerged, atol=1e-2)


def test_merge_and_unload_of_the_plain_adapter_alone_leaves_no_hooks():
    model, inputs = merged_models()
    with torch.no_grad():
        model.set_adapter("plain")
        expected = model(**inputs).logits
        base = model.merge_and_unload(adapter_names=["plain"])
        torch.testing.assert_close(base(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(module, LoraLayer) for module in base.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_a_sibo_config_with_lambda_0_merges():
    inputs = token_inputs()
    model = get_peft_model(llama(), SiboLoraConfig(r=2, target_modules=list(TARGETS), sibo_lambda=0)).eval()
    randomise_adapters(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, expected, atol=1e-5, rtol=1e-4)


def test_conversion_to_lora_is_refused():
    """By PEFT, which asks the layers; PEFT 0.19 would have given weights that compute something else."""
    model, _ = merged_models()
    layer = v_proj(model)
    assert layer.supports_lora_conversion("plain") is True and layer.supports_lora_conversion("sibo") is False
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2, adapter_name="sibo")
    convert_to_lora(model, rank=2, adapter_name="plain")


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "magnitude_prune"])
@pytest.mark.parametrize("adapters", [["sibo"], ["plain", "sibo"]])
def test_weighted_adapters_are_refused(combination, adapters):
    model, inputs = merged_models()
    before = fingerprint(model, inputs)
    message = r"Cannot combine adapter 'sibo' \(model\.layers\.0\.self_attn\.v_proj mixes\).*Activate several"
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, [1.0] * len(adapters), "both", combination_type=combination, density=0.5)
    assert sorted(model.peft_config) == ["other", "plain", "sibo"]
    assert_as_it_was(model, inputs, before)


def test_plain_adapters_still_combine_beside_a_sibo_adapter():
    model, inputs = merged_models()
    model.delete_adapter("other")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    randomise_adapters(model)
    model.add_weighted_adapter(["plain", "other"], [0.5, 2.0], "both", combination_type="cat")
    model.set_adapter("both")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert not any(row.mixes for row in explain(model) if row.adapter == "both")


def test_reducing_intruder_dimensions_is_refused():
    model, inputs = merged_models()
    before = fingerprint(model, inputs)
    with pytest.raises(
        ValueError, match=r"intruder dimensions of adapter 'sibo' \(.*layers\.0\.self_attn\.v_proj mixes"
    ):
        intruders.reduce_intruder_dimension(model, "sibo")
    assert_as_it_was(model, inputs, before)
    intruders.reduce_intruder_dimension(model, "plain", logging_sink=None)

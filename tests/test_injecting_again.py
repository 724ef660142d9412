"""Injecting where an adapter of that name was, or from a config that was saved: as for the first time."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny_models import llama, llama_with, randomise_adapters

from sibo_triton import SiboLoraConfig, explain

pytestmark = [pytest.mark.oldest, pytest.mark.filterwarnings("ignore:What feeds modules")]


@pytest.mark.parametrize("second", ["sibo", "plain", "folder"])
def test_injecting_again_under_the_same_name_replaces_the_adapter(second: str, tmp_path) -> None:
    torch.manual_seed(0)
    base = llama().eval()
    old = get_peft_model(base, SiboLoraConfig(r=4, target_modules=["q_proj", "up_proj"], sibo_lambda=0.4))
    randomise_adapters(old)
    old.save_pretrained(tmp_path)
    ids = torch.ones(1, 4, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if second == "folder":
            model = PeftModel.from_pretrained(base, tmp_path)
            torch.testing.assert_close(model(ids).logits, old.eval()(ids).logits)
            return
        kind = SiboLoraConfig if second == "sibo" else LoraConfig
        model = get_peft_model(base, kind(r=2, target_modules=["q_proj", "up_proj"])).eval()
    assert {row.mixes for row in explain(model)} == {second == "sibo"}
    for row in explain(model):
        assert row.lambda_ == (pytest.approx(0.1) if second == "sibo" else None)
    with model.disable_adapter():
        expected = model(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)  # fresh: B is zero
    hooks = sum(len(module._forward_pre_hooks) for module in base.modules())
    assert (hooks > 0) == (second == "sibo")


@pytest.mark.parametrize("first", ["sibo", "plain"])
def test_a_refusal_under_an_existing_name_leaves_that_adapter(first: str, tmp_path) -> None:
    torch.manual_seed(0)
    base = llama().eval()
    kind = SiboLoraConfig if first == "sibo" else LoraConfig
    old = get_peft_model(base, kind(r=4, target_modules=["q_proj", "up_proj"])).eval()
    randomise_adapters(old)
    ids = torch.ones(1, 4, dtype=torch.long)
    before, config = old(ids).logits, old.peft_config["default"]
    with warnings.catch_warnings(), pytest.raises(ValueError, match="o_proj"):
        warnings.simplefilter("ignore")
        get_peft_model(base, SiboLoraConfig(target_modules=["o_proj"], sibo_target_modules=["o_proj"]))
    assert old.peft_config["default"] is config
    assert torch.equal(old(ids).logits, before)
    old.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama_with(base), tmp_path)(ids).logits, before)


def test_a_saved_config_as_a_template_is_searched_and_checked_like_a_new_one(tmp_path) -> None:
    get_peft_model(llama(), SiboLoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.target_modules = {"q_proj", "k_proj", "o_proj"}
    mixing = {row.module.rpartition(".")[2] for row in explain(get_peft_model(llama(), config)) if row.mixes}
    assert mixing == {"q_proj", "k_proj"}
    config = PeftConfig.from_pretrained(tmp_path)
    config.target_modules, config.sibo_target_modules = {"o_proj"}, ["o_proj"]
    with pytest.raises(ValueError, match="o_proj, which cannot mix"):
        get_peft_model(llama(), config)

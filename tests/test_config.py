"""`SiboLoraConfig` as a dataclass and as a PEFT config: options, copies, and what is written to adapter_config.json."""

import copy
import dataclasses
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config

from sibo_triton import SiboLoraConfig

pytestmark = pytest.mark.oldest

SIBO_OPTIONS = ("sibo_lambda", "sibo_learnable", "sibo_target_modules", "sibo_source", "sibo_blocks")


def lora_options(config):
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig)}


def test_defaults():
    config = SiboLoraConfig()
    assert [getattr(config, name) for name in SIBO_OPTIONS] == [0.1, False, None, "block_input", None]


def test_everything_that_lora_config_takes_keeps_its_meaning():
    options = {
        "r": 3, "lora_alpha": 5, "target_modules": ["a", "b"], "lora_dropout": 0.25, "bias": "all", "use_rslora": True,
        "rank_pattern": {"a": 2}, "modules_to_save": ["head"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    assert lora_options(SiboLoraConfig(**options, sibo_lambda=0.3)) == lora_options(LoraConfig(**options))
    assert SiboLoraConfig(**options).peft_type is PeftType.LORA  # what hotswap, Trainer and TRL look at


def test_repr_names_every_option():
    text = repr(SiboLoraConfig(r=4, sibo_lambda=0.25, sibo_blocks=["model.layers"]))
    assert text.startswith("SiboLoraConfig(") and "r=4" in text
    assert "sibo_lambda=0.25, sibo_learnable=False, sibo_target_modules=None, sibo_source='block_input'" in text
    assert "sibo_blocks=['model.layers']" in text


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), dataclasses.replace]
)
def test_a_copy_is_equal_and_of_the_same_class(clone):
    config = SiboLoraConfig(r=4, target_modules=["q_proj"], sibo_lambda=0.3, sibo_learnable=True, sibo_blocks=["h"])
    twin = clone(config)
    assert twin is not config and type(twin) is SiboLoraConfig and twin == config
    assert twin.to_dict() == config.to_dict()
    assert twin != SiboLoraConfig(
        r=4, target_modules=["q_proj"], sibo_lambda=0.4, sibo_learnable=True, sibo_blocks=["h"]
    )


def test_deepcopy_shares_no_list():
    config = SiboLoraConfig(sibo_target_modules=["q_proj"], sibo_blocks=["h"])
    twin = copy.deepcopy(config)
    twin.sibo_target_modules.append("k_proj")
    twin.sibo_blocks.append("g")
    assert (config.sibo_target_modules, config.sibo_blocks) == (["q_proj"], ["h"])


def test_replace_validates_what_it_replaces():
    config = SiboLoraConfig(sibo_lambda=0.3)
    assert dataclasses.replace(config, sibo_lambda=0.2).sibo_lambda == 0.2
    with pytest.raises(ValueError, match="sibo_lambda must lie in"):
        dataclasses.replace(config, sibo_lambda=1.2)


@pytest.mark.parametrize("value", [0, 1, 0.3, np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_lambda_is_any_real_number_in_the_unit_interval(value):
    config = SiboLoraConfig(sibo_lambda=value)
    assert type(config.sibo_lambda) is float and config.sibo_lambda == float(value)  # also writable as JSON


@pytest.mark.parametrize("value", [-1e-9, 1.0000001, 2, float("inf"), -float("inf"), float("nan")])
def test_lambda_outside_of_the_unit_interval_is_refused(value):
    with pytest.raises(ValueError, match=r"sibo_lambda must lie in \[0, 1\], got .*0 is the plain method"):
        SiboLoraConfig(sibo_lambda=value)


@pytest.mark.parametrize("value", ["0.1", None, True, False, torch.tensor(0.1), [0.1], 1j])
def test_lambda_that_is_not_a_number_is_refused(value):
    with pytest.raises(TypeError, match=r"sibo_lambda must be a number in \[0, 1\], got .*of type"):
        SiboLoraConfig(sibo_lambda=value)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0])
def test_learnable_lambda_cannot_start_where_a_sigmoid_never_is(value):
    with pytest.raises(ValueError, match="sibo_learnable=True .*strictly between 0 and 1.*sigmoid.*Choose a start"):
        SiboLoraConfig(sibo_lambda=value, sibo_learnable=True)
    assert SiboLoraConfig(sibo_lambda=value).sibo_lambda == value  # not learnable, it is fine


@pytest.mark.parametrize("name", ["sibo_target_modules", "sibo_blocks"])
@pytest.mark.parametrize(
    ("value", "kept"), [(None, None), (["b", "a"], ["b", "a"]), (("b", "a"), ["b", "a"]), ({"b", "a"}, ["a", "b"])]
)
def test_lists_of_names_are_kept_as_lists(name, value, kept):
    assert getattr(SiboLoraConfig(**{name: value}), name) == kept


def test_a_string_is_a_pattern_for_targets_and_one_name_for_blocks():
    config = SiboLoraConfig(sibo_target_modules=r".*\.q_proj", sibo_blocks="model.layers")
    assert config.sibo_target_modules == r".*\.q_proj"
    assert config.sibo_blocks == ["model.layers"]


@pytest.mark.parametrize("name", ["sibo_target_modules", "sibo_blocks"])
@pytest.mark.parametrize("value", [3, [3], ["a", None], {"a": 1}])
def test_names_of_another_type_are_refused(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a list of module names"):
        SiboLoraConfig(**{name: value})


@pytest.mark.parametrize("name", ["sibo_target_modules", "sibo_blocks"])
@pytest.mark.parametrize("value", [[], (), set()])
def test_an_empty_list_of_names_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is empty.*None for the default.*sibo_lambda=0"):
        SiboLoraConfig(**{name: value})


@pytest.mark.parametrize("value", ["input", "", None, 3, ["block_input"]])
def test_an_unknown_source_is_refused(value):
    with pytest.raises(ValueError, match="sibo_source must be 'block_input' or 'embedding', got"):
        SiboLoraConfig(sibo_source=value)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="sibo_lamda"):
        SiboLoraConfig(sibo_lamda=0.1)


def test_the_file_has_a_type_of_its_own_and_reads_back_as_what_it_was(tmp_path):
    config = SiboLoraConfig(
        r=4, target_modules=["q_proj"], sibo_lambda=0.3, sibo_learnable=True, sibo_target_modules=["q_proj"],
        sibo_source="embedding", sibo_blocks=["model.layers"],
    )  # fmt: skip
    config.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "SIBO_LORA"
    assert [written[name] for name in SIBO_OPTIONS] == [0.3, True, ["q_proj"], "embedding", ["model.layers"]]
    for loader in (PeftConfig, LoraConfig, SiboLoraConfig):
        loaded = loader.from_pretrained(str(tmp_path))
        assert type(loaded) is SiboLoraConfig and loaded == config
        assert loaded.to_dict() == config.to_dict()
    assert get_peft_config(config.to_dict()) == config


def test_a_loaded_config_keeps_lambda_to_the_last_bit(tmp_path):
    value = 0.1 + 0.2  # 0.30000000000000004
    SiboLoraConfig(sibo_lambda=value).save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).sibo_lambda == value


def test_unknown_keys_in_the_file_warn_as_peft_does_and_the_rest_is_read(tmp_path):
    SiboLoraConfig(r=4, sibo_lambda=0.3).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['of_the_future'\] for class SiboLoraConfig"):
        loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is SiboLoraConfig and (loaded.r, loaded.sibo_lambda) == (4, 0.3)


@pytest.mark.parametrize("value", [1.5, float("nan"), "0.1", None])
def test_a_file_with_a_bad_lambda_does_not_load(tmp_path, value):
    SiboLoraConfig(sibo_lambda=0.3).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sibo_lambda": value}))
    with pytest.raises((TypeError, ValueError), match="sibo_lambda must"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_lambda_0_writes_the_file_of_plain_lora_byte_for_byte(tmp_path):
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_dora": True}
    SiboLoraConfig(**options, sibo_lambda=0).save_pretrained(str(tmp_path / "sibo"))
    LoraConfig(**options).save_pretrained(str(tmp_path / "lora"))
    assert [p.name for p in (tmp_path / "sibo").iterdir()] == ["adapter_config.json"]  # no card either
    files = [(tmp_path / name / "adapter_config.json").read_bytes() for name in ("sibo", "lora")]
    assert files[0] == files[1]
    assert type(PeftConfig.from_pretrained(str(tmp_path / "sibo"))) is LoraConfig


def test_a_config_says_nothing_when_it_is_made():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SiboLoraConfig(r=4, target_modules=["q_proj"], sibo_lambda=0.3)


def test_every_option_has_a_help_text_as_those_of_lora_config_have():
    assert [
        f.name for f in dataclasses.fields(SiboLoraConfig) if not f.metadata.get("help") and f.name in SIBO_OPTIONS
    ] == []

"""`SiboAdapterConfig` as a dataclass and as a PEFT config, and the type that it adds to PEFT's registry."""

import copy
import dataclasses
import enum
import json
import pickle
import warnings

import peft
import pytest
import torch
from peft import PeftConfig, PeftMixedModel, PeftType, TaskType, get_peft_config
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from tiny_models import llama

import sibo_triton
from sibo_triton import SiboAdapterConfig
from sibo_triton.bottleneck.model import SiboAdapterModel

pytestmark = pytest.mark.oldest

DEFAULTS = {
    "bottleneck_size": 256, "activation": "tanh", "placement": "series", "side": "input", "adapter_dropout": 0.0,
    "scaling": 1.0, "target_modules": None, "init_weights": True, "adapter_bias": False, "sibo_lambda": 0.1,
    "sibo_learnable": False, "sibo_target_modules": None, "sibo_source": "block_input", "sibo_blocks": None,
}  # fmt: skip


def test_defaults():
    config = SiboAdapterConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_the_paper_s_settings_can_be_said():
    config = SiboAdapterConfig(target_modules=["gate_proj", "up_proj"], init_weights="bert", adapter_dropout=0.05)
    assert config.target_modules == {"gate_proj", "up_proj"} and config.mixes


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), dataclasses.replace]
)
def test_a_copy_is_equal_and_of_the_same_class(clone):
    config = SiboAdapterConfig(bottleneck_size=8, target_modules=["a"], scaling="learnable", sibo_learnable=True)
    twin = clone(config)
    assert twin is not config and type(twin) is SiboAdapterConfig and twin == config
    assert twin.peft_type is PeftType.SIBO_ADAPTER
    assert twin != SiboAdapterConfig(bottleneck_size=9, target_modules=["a"], scaling="learnable", sibo_learnable=True)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "bottleneck_size must be an integer, got 8.0", {"bottleneck_size": 8.0}),
        (TypeError, "bottleneck_size must be an integer, got True", {"bottleneck_size": True}),
        (ValueError, "bottleneck_size must be at least 1, got 0", {"bottleneck_size": 0}),
        (ValueError, "activation='mish' is not known: choose one of gelu", {"activation": "mish"}),
        (ValueError, "placement must be 'series' or 'parallel', got 'serial'", {"placement": "serial"}),
        (ValueError, "side must be 'input' or 'output', got 'left'", {"side": "left"}),
        (ValueError, "side='output' is for placement='series'", {"placement": "parallel", "side": "output"}),
        (TypeError, r"adapter_dropout must be a number in \[0, 1\), got '0.1'", {"adapter_dropout": "0.1"}),
        (ValueError, r"adapter_dropout must lie in \[0, 1\), got 1.0", {"adapter_dropout": 1.0}),
        (ValueError, r"adapter_dropout must lie in \[0, 1\), got nan", {"adapter_dropout": float("nan")}),
        (TypeError, "scaling must be a number or 'learnable', got 'learned'", {"scaling": "learned"}),
        (TypeError, "scaling must be a number or 'learnable', got True", {"scaling": True}),
        (ValueError, "scaling must be finite and not 0", {"scaling": 0}),
        (ValueError, "scaling must be finite and not 0", {"scaling": float("inf")}),
        (TypeError, "adapter_bias must be True or False, got 'all'", {"adapter_bias": "all"}),
        (ValueError, r"init_weights must be True .* or 'bert' .*, got False", {"init_weights": False}),
        (ValueError, "init_weights must be True", {"init_weights": "mam_adapter"}),
        (TypeError, "target_modules must be a list of module names or a pattern, got 3", {"target_modules": 3}),
        (ValueError, r"sibo_lambda must lie in \[0, 1\], got 1.5", {"sibo_lambda": 1.5}),
        (TypeError, r"sibo_lambda must be a number", {"sibo_lambda": torch.tensor(0.1)}),
        (ValueError, "sibo_learnable=True needs a sibo_lambda strictly", {"sibo_learnable": True, "sibo_lambda": 0}),
        (ValueError, "sibo_source must be 'block_input' or 'embedding'", {"sibo_source": "input"}),
        (ValueError, "sibo_blocks is empty.*sibo_lambda=0 for a plain adapter", {"sibo_blocks": []}),
        (ValueError, "sibo_target_modules='all-linear' would ask", {"sibo_target_modules": "all-linear"}),
        (ValueError, "Invalid task type", {"task_type": "TALK"}),
        (TypeError, "bottleneck_sise", {"bottleneck_sise": 8}),
    ],
)
def test_a_wrong_option_is_named(error, message, options):
    with pytest.raises(error, match=message):
        SiboAdapterConfig(**options)


def test_options_that_were_set_since_are_checked_at_injection():
    config = SiboAdapterConfig(bottleneck_size=4)
    config.placement = "beside"
    with pytest.raises(ValueError, match="placement must be"):
        SiboAdapterModel(llama(), config, "default")


def test_the_file_reads_back_as_what_it_was(tmp_path):
    config = SiboAdapterConfig(
        bottleneck_size=8, activation="gelu", placement="parallel", adapter_dropout=0.1, scaling="learnable",
        target_modules=["b", "a"], init_weights="bert", adapter_bias=True, sibo_lambda=0.1 + 0.2, sibo_learnable=True,
        sibo_target_modules=["a"], sibo_source="embedding", sibo_blocks="model.layers", task_type=TaskType.CAUSAL_LM,
    )  # fmt: skip
    config.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "SIBO_ADAPTER" and sorted(written["target_modules"]) == ["a", "b"]
    for loader in (PeftConfig, SiboAdapterConfig):
        loaded = loader.from_pretrained(str(tmp_path))
        assert type(loaded) is SiboAdapterConfig and loaded == config
    assert get_peft_config(config.to_dict()) == config
    card = (tmp_path / "README.md").read_text()
    assert "## SIBO adapter" in card and "import sibo_triton" in card and "bottleneck adapter" in card


def test_a_config_says_nothing_when_it_is_made_and_every_option_has_a_help_text():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SiboAdapterConfig(bottleneck_size=4)
    own = {field.name: field for field in dataclasses.fields(SiboAdapterConfig)}
    assert [name for name in DEFAULTS if not own[name].metadata.get("help")] == []


# --- the registry


def test_the_type_is_a_member_of_peft_s_enum_like_the_others():
    member = PeftType.SIBO_ADAPTER
    assert isinstance(member, PeftType) and isinstance(member, str) and member == "SIBO_ADAPTER"
    assert (member.name, member.value) == ("SIBO_ADAPTER", "SIBO_ADAPTER")
    assert PeftType("SIBO_ADAPTER") is member and PeftType["SIBO_ADAPTER"] is member
    assert member in list(PeftType) and PeftType.__members__["SIBO_ADAPTER"] is member and member in PeftType
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    assert str(member) == str(PeftType.LORA).replace("LORA", "SIBO_ADAPTER")
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "SIBO_ADAPTER")
    assert hash(member) == hash(copy.copy(member)) and {member: 1}["SIBO_ADAPTER"] == 1
    assert len(set(PeftType)) == len(list(PeftType)) and json.dumps(member) == '"SIBO_ADAPTER"'


def test_what_peft_and_transformers_look_up():
    member = PeftType.SIBO_ADAPTER
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is SiboAdapterConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SiboAdapterModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == SiboAdapterModel.prefix == member.value.lower() + "_"
    assert member not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    with pytest.raises(ValueError, match="'SIBO_ADAPTER' is not compatible with the `PeftMixedModel`"):
        PeftMixedModel(llama(), SiboAdapterConfig())


def test_registering_again_does_no_harm():
    before = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    sibo_triton.register()
    assert (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before


def test_peft_still_offers_no_other_way():
    """If this fails PEFT has changed: `registration._register_method` may do without writing into its enum."""
    assert isinstance(PeftType, enum.EnumMeta)
    with pytest.raises(ValueError, match="Unknown PEFT type UNHEARD_OF, please add an entry to peft.utils.peft_types"):
        peft.utils.register_peft_method(name="unheard_of", config_cls=SiboAdapterConfig, model_cls=SiboAdapterModel)

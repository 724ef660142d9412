"""Options that make LoRA another method, change the base weights or are no values: refused, with the way out."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from peft.tuners import lora
from refusals import TARGETS, assert_as_it_was, fingerprint, through_add_adapter, through_get_peft_model
from tiny_models import llama, token_inputs

from sibo_triton import SiboLoraConfig
from sibo_triton.options import validate_lambda


def sub_config(name, **options):
    """A nested config of PEFT, where the installed version has it."""
    for module in (lora, lora.config, __import__("peft")):
        if hasattr(module, name):
            return getattr(module, name)(**options)
    pytest.skip(f"this PEFT has no {name}")


VARIANTS: dict[str, Callable[[], object]] = {
    "use_dora": lambda: True,
    "use_qalora": lambda: True,
    "alora_invocation_tokens": lambda: [1, 2],
    "arrow_config": lambda: sub_config("ArrowConfig"),
    "use_bdlora": lambda: sub_config("BdLoraConfig", target_modules_bd_a=["q_proj"], nblocks=2),
    "velora_config": lambda: sub_config("VeloraConfig"),
    "monteclora_config": lambda: sub_config("MontecloraConfig"),
    "kasa_config": lambda: sub_config("KasaConfig"),
}


def marked_variants():
    return [
        field.name for field in SiboLoraConfig.__dataclass_fields__.values() if field.metadata.get("is_lora_variant")
    ]


def test_the_table_of_variants_is_complete():
    assert set(marked_variants()) <= set(VARIANTS), "this PEFT has a variant that the tests do not know"


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_lora_are_refused(name):
    if name not in SiboLoraConfig.__dataclass_fields__:
        pytest.skip(f"this PEFT has no {name}")
    value = VARIANTS[name]()
    with pytest.raises(
        ValueError, match=rf"{name} cannot be combined with sibo_lambda=0\.3.*Drop {name}, or use peft.LoraConfig"
    ):
        SiboLoraConfig(sibo_lambda=0.3, task_type="CAUSAL_LM", **{name: value})
    with pytest.raises(ValueError, match=f"{name} cannot be combined"):
        SiboLoraConfig(sibo_lambda=0.3, sibo_learnable=True, task_type="CAUSAL_LM", **{name: value})
    plain = SiboLoraConfig(sibo_lambda=0, task_type="CAUSAL_LM", **{name: value})  # plain LoRA may be anything
    assert getattr(plain, name)


CHANGING_INITS = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "of_the_future"]


@pytest.mark.parametrize("init", CHANGING_INITS)
def test_initialisations_that_change_what_a_fresh_adapter_gives_are_refused(init, monkeypatch):
    options = {"init_lora_weights": init}
    if init == "loftq":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # PEFT asks for scipy first
        options["loftq_config"] = {"loftq_bits": 4}
    message = rf"init_lora_weights='{init}'.*sibo_lambda=0\.3.*Use init_lora_weights=True.*or peft.LoraConfig"
    with pytest.raises(ValueError, match=message):
        SiboLoraConfig(sibo_lambda=0.3, **options)
    assert SiboLoraConfig(sibo_lambda=0, **options).init_lora_weights == init


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_initialisations_that_keep_the_base_output_are_accepted(init):
    """So is a fresh adapter under each of them the base model, mixed or not."""
    model, inputs = llama(), token_inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        config = SiboLoraConfig(r=2, target_modules=list(TARGETS), sibo_lambda=0.3, init_lora_weights=init)
        torch.testing.assert_close(get_peft_model(model, config)(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_layer_replication_is_refused():
    with pytest.raises(
        ValueError, match="layer_replication cannot be combined with SIBO.*share modules.*Drop layer_replication"
    ):
        SiboLoraConfig(sibo_lambda=0.3, layer_replication=[(0, 2), (1, 3)])
    assert SiboLoraConfig(sibo_lambda=0, layer_replication=[(0, 2), (1, 3)]).layer_replication


@pytest.mark.parametrize("way", [through_get_peft_model, through_add_adapter])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("sibo_lambda", float("nan"), r"sibo_lambda must lie in \[0, 1\], got nan"),
        ("sibo_lambda", 1.5, r"sibo_lambda must lie in \[0, 1\], got 1\.5"),
        ("sibo_lambda", "0.1", "sibo_lambda must be a number"),
        ("sibo_source", "inputs", "sibo_source must be"),
        ("use_dora", True, "use_dora cannot be combined"),
        ("init_lora_weights", "olora", "init_lora_weights='olora'"),
    ],
)
def test_an_option_that_was_set_after_the_config_was_made_is_checked_too(way, option, value, message):
    inputs = token_inputs()
    model, add = way(llama())
    before = fingerprint(model, inputs)
    config = SiboLoraConfig(r=2, target_modules=["q_proj"], sibo_lambda=0.3)
    setattr(config, option, value)
    with pytest.raises((TypeError, ValueError), match=message):
        add(config)
    assert_as_it_was(model, inputs, before)


@pytest.mark.parametrize("value", ["0.1", None, True, torch.tensor(0.1), [0.1]])
def test_validate_lambda_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match="sibo_lambda must be a number"):
        validate_lambda(value)

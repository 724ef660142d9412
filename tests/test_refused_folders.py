"""Adapter folders whose lambda is missing or unusable: refused by every loader, which leaves the model as it was."""

import io
import logging
import re
from contextlib import contextmanager

import pytest
import torch
import transformers
from adapter_folders import (
    KINDS,
    TARGETS,
    assert_unchanged,
    everything_about,
    lambda_values,
    logits_of,
    make_up_weights,
    read_weights,
    save_adapter,
    sibo_config,
    with_config,
    with_weights,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.oldest

BROKEN = "model.layers.1.mlp.up_proj"  # one module of several, not the first
KEY = f"base_model.model.{BROKEN}.lora_sibo_lambda."


def removed(entry):
    return lambda tensors: tensors.pop(KEY + entry)


def put(entry, value):
    return lambda tensors: tensors.__setitem__(KEY + entry, torch.as_tensor(value))


def all_removed(tensors):
    for name in [name for name in tensors if "sibo" in name]:
        del tensors[name]


# kind, what is done to the weights, what the error says beside the tensor's name
DEFECTS = {
    "missing": ("fixed", removed("weight"), "missing"),
    "all missing": ("fixed", all_removed, "missing"),
    "NaN": ("fixed", put("weight", [float("nan")]), "nan"),
    "infinite": ("fixed", put("weight", [float("inf")]), "inf"),
    "scalar": ("fixed", put("weight", 0.3), r"shape \[\]"),
    "two values": ("fixed", put("weight", [0.3, 0.3]), r"shape \[2\]"),
    "matrix": ("fixed", put("weight", [[0.3]]), r"shape \[1, 1\]"),
    "negative": ("fixed", put("weight", [-0.1]), r"-0\.1\d*, outside of \[0, 1\]"),
    "above 1": ("fixed", put("weight", [1.5]), r"1\.5, outside of \[0, 1\]"),
    "logit missing": ("learnable", removed("logit_bias"), "missing"),
    "gate missing": ("learnable", removed("gate"), "missing"),
    "logit NaN": ("learnable", put("logit_bias", [float("nan")]), "nan"),
    "logit of another shape": ("learnable", put("logit_bias", [[0.3]]), r"shape \[1, 1\]"),
    "gate above 1": ("learnable", put("gate", [2.0]), r"2\.0, outside of \[0, 1\]"),
    "fixed instead of learnable": (
        "learnable",
        lambda tensors: (all_removed(tensors), put("weight", [0.3])(tensors)),
        "missing",
    ),
}


def plain_first(case):
    model = get_peft_model(case.base(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    make_up_weights(model)
    return model


def sibo_first(case):
    """With lambdas and mixing modules of its own, and one block list's hooks that a second adapter would share."""
    model = get_peft_model(case.base(), sibo_config("fixed", target_modules=["q_proj", "down_proj"], sibo_lambda=0.5))
    make_up_weights(model, seed=1)
    return model


def injected_first(case):
    model = case.base()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), "first")
    make_up_weights(model)
    return model


def nothing(case):
    return None


# what the folder is loaded onto, and how
LOADERS = {
    "from_pretrained": (lambda case: case.base(), lambda m, d: PeftModel.from_pretrained(m, d)),
    "from_pretrained, low_cpu_mem_usage": (
        lambda case: case.base(),
        lambda m, d: PeftModel.from_pretrained(m, d, low_cpu_mem_usage=True),
    ),
    "from_pretrained, is_trainable": (
        lambda case: case.base(),
        lambda m, d: PeftModel.from_pretrained(m, d, is_trainable=True),
    ),
    "from_pretrained, ignore_mismatched_sizes": (
        lambda case: case.base(),
        lambda m, d: PeftModel.from_pretrained(m, d, ignore_mismatched_sizes=True),
    ),
    "AutoPeftModel": (nothing, lambda m, d: AutoPeftModelForCausalLM.from_pretrained(d)),
    "AutoModel": (nothing, lambda m, d: AutoModelForCausalLM.from_pretrained(d)),
    "load_adapter beside plain LoRA": (plain_first, lambda m, d: m.load_adapter(d, "second")),
    "load_adapter beside SIBO": (sibo_first, lambda m, d: m.load_adapter(d, "second")),
    "load_adapter, low_cpu_mem_usage": (plain_first, lambda m, d: m.load_adapter(d, "second", low_cpu_mem_usage=True)),
    "load_adapter, is_trainable": (sibo_first, lambda m, d: m.load_adapter(d, "second", is_trainable=True)),
    "transformers' load_adapter": (lambda case: case.base(), lambda m, d: m.load_adapter(d)),
    "transformers' load_adapter, ignore_mismatched_sizes": (
        lambda case: case.base(),
        lambda m, d: m.load_adapter(d, ignore_mismatched_sizes=True),
    ),
    "transformers' load_adapter beside plain LoRA": (injected_first, lambda m, d: m.load_adapter(d, "second")),
}


@contextmanager
def logged_by_transformers():
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    transformers.logging.add_handler(handler)
    try:
        yield text
    finally:
        transformers.logging.remove_handler(handler)


# every defect in the two ways in which weights reach the tensors, and the main ones in the rest
CASES = [
    (loader, defect)
    for loader in LOADERS
    for defect in DEFECTS
    if loader in ("from_pretrained", "transformers' load_adapter")
    or defect in ("missing", "NaN", "two values", "logit missing")
]


@pytest.mark.parametrize("loader, defect", CASES)
def test_a_folder_without_usable_lambdas_is_refused_and_leaves_no_trace(saved, loader, defect, tmp_path):
    kind, change, words = DEFECTS[defect]
    case = saved[kind]
    folder = with_weights(case.folder, tmp_path / "broken", change)
    prepare, load = LOADERS[loader]
    model = prepare(case)
    before = None if model is None else everything_about(model, case.input_ids)

    with pytest.raises((ValueError, RuntimeError)) as raised, logged_by_transformers() as report:
        load(model, folder)

    text = str(raised.value)
    if "ignore_mismatched_sizes` to `False`" in text:  # transformers' own, which points to its report
        text, words = text + report.getvalue(), "MISMATCH"
    elif "ignore_mismatched_sizes" in loader:
        words = f"{words}|missing"  # dropped before it is loaded
    assert re.search(r"model\.layers\.\S+\.lora_sibo_lambda", text), text
    assert re.search(words, text), text
    if "all" not in defect and "instead" not in defect:
        assert BROKEN in text
    if before is not None:
        assert_unchanged(before, everything_about(model, case.input_ids))


def test_the_error_tells_the_way_out(saved, tmp_path):
    folder = with_weights(saved["fixed"].folder, tmp_path / "broken", removed("weight"))
    with pytest.raises(ValueError, match=r"(?s)without its lambda.*save_pretrained.*peft\.LoraConfig"):
        PeftModel.from_pretrained(saved["fixed"].base(), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_refusal_the_same_model_takes_the_whole_folder(saved, kind, tmp_path):
    case = saved[kind]
    broken = with_weights(case.folder, tmp_path / "broken", all_removed)
    base, injected, tuned = case.base(), case.base(), plain_first(case)
    for load in (
        lambda folder: PeftModel.from_pretrained(base, folder),
        lambda folder: injected.load_adapter(folder),
        lambda folder: tuned.load_adapter(folder, "second"),
    ):
        with pytest.raises(ValueError, match="lora_sibo_lambda"):
            load(broken)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, case.folder), case.input_ids), case.logits)
    injected.load_adapter(case.folder)
    assert torch.equal(logits_of(injected, case.input_ids), case.logits)
    tuned.load_adapter(case.folder, "second")
    tuned.set_adapter("second")
    assert torch.equal(logits_of(tuned.eval(), case.input_ids), case.logits)


@pytest.mark.parametrize("origin", ["get_peft_model", "config from a file", "from_pretrained"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_folder_leaves_the_adapter_of_that_name_as_it_was(saved, kind, origin, tmp_path):
    """Trainer's resume loads onto the adapter that is there."""
    case = saved[kind]
    if origin == "from_pretrained":
        model = PeftModel.from_pretrained(case.base(), case.folder, is_trainable=True)
    else:
        from_file = origin == "config from a file"
        config = PeftConfig.from_pretrained(case.folder) if from_file else sibo_config(kind)
        model = get_peft_model(case.base(), config)
        make_up_weights(model, seed=3)
    model.eval()
    before = everything_about(model, case.input_ids)
    folder = with_weights(case.folder, tmp_path / "broken", all_removed)
    with pytest.raises(ValueError, match="lora_sibo_lambda"):
        model.load_adapter(folder, "default", is_trainable=True)
    assert_unchanged(before, everything_about(model, case.input_ids))


def test_other_failures_to_load_leave_no_trace_either(saved, tmp_path):
    case = saved["fixed"]

    def narrow(tensors):
        name = next(name for name in tensors if "lora_A" in name)
        tensors[name] = tensors[name][:, :-1].contiguous()

    cut = with_weights(case.folder, tmp_path / "cut", narrow)
    empty = with_config(case.folder, tmp_path / "empty")
    (empty / "adapter_model.safetensors").unlink()
    for folder in (cut, empty):
        for prepare, load in (LOADERS["from_pretrained"], LOADERS["load_adapter beside SIBO"]):
            model = prepare(case)
            before = everything_about(model, case.input_ids)
            with pytest.raises((ValueError, RuntimeError, OSError)):
                load(model, folder)
            assert_unchanged(before, everything_about(model, case.input_ids))


def test_a_refusal_leaves_no_trace_in_embeddings_and_modules_to_save(saved, tmp_path):
    options = {"target_modules": [*TARGETS, "embed_tokens"], "modules_to_save": ["lm_head"]}
    case = save_adapter(tmp_path / "good", saved["fixed"].base_folder, "fixed", **options)
    broken = with_weights(case.folder, tmp_path / "broken", put("weight", [float("nan")]))
    for model in (case.base(), PeftModel.from_pretrained(case.base(), case.folder)):
        before = everything_about(model, case.input_ids)
        with pytest.raises(ValueError, match="lora_sibo_lambda"):
            if isinstance(model, PeftModel):
                model.load_adapter(broken, "second")
            else:
                PeftModel.from_pretrained(model, broken)
        assert_unchanged(before, everything_about(model, case.input_ids))
    model.load_adapter(case.folder, "second")
    model.set_adapter("second")
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


# --- a SIBO adapter is never read as plain LoRA, nor one module of it


@pytest.mark.parametrize("kind", KINDS)
def test_a_sibo_folder_is_refused_by_a_plain_lora_adapter_of_that_name(saved, kind):
    case = saved[kind]
    config = LoraConfig(r=4, target_modules=list(TARGETS))
    with pytest.raises(ValueError, match=r"lora_sibo_lambda[\s\S]*SiboLoraConfig"):
        get_peft_model(case.base(), config).load_adapter(case.folder, "default")
    with pytest.raises(ValueError, match=r"lora_sibo_lambda[\s\S]*SiboLoraConfig"):
        PeftModel.from_pretrained(case.base(), case.folder, config=config)
    model = case.base()
    model.add_adapter(config)
    with pytest.raises(ValueError, match=r"lora_sibo_lambda[\s\S]*SiboLoraConfig"):
        model.load_adapter(case.folder, "default", hotswap=True)


def test_a_config_that_names_fewer_modules_than_the_weights_is_refused(saved, tmp_path):
    case = saved["fixed"]
    folder = with_config(case.folder, tmp_path / "fewer", sibo_target_modules=["q_proj"])
    for prepare, load in LOADERS.values():
        model = prepare(case)
        with pytest.raises(ValueError, match=r"mlp\.up_proj\.lora_sibo_lambda"):
            load(model, folder)


def test_a_plain_lora_folder_is_refused_by_a_sibo_adapter_of_that_name(saved, tmp_path):
    case = saved["fixed"]
    get_peft_model(case.base(), LoraConfig(r=4, target_modules=list(TARGETS))).save_pretrained(tmp_path)
    assert not any("sibo" in name for name in read_weights(tmp_path))
    model = PeftModel.from_pretrained(case.base(), case.folder)
    with pytest.raises(ValueError, match="lora_sibo_lambda.* is missing"):
        model.load_adapter(tmp_path, "default")
    assert lambda_values(model) == case.lambdas
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


def test_weights_given_as_a_state_dict_are_checked_too(saved):
    case = saved["fixed"]
    tensors = {n.removeprefix("base_model.model."): t for n, t in read_weights(case.folder).items() if "sibo" not in n}
    model: nn.Module = case.base()
    before = everything_about(model, case.input_ids)
    with pytest.raises(ValueError, match="lora_sibo_lambda.* is missing"):
        model.load_adapter(peft_config=sibo_config("fixed"), adapter_state_dict=tensors)
    assert_unchanged(before, everything_about(model, case.input_ids))

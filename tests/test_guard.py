"""The guard in a saved SIBO adapter: stock PEFT stops at it wherever it would make plain LoRA of the weights, and here
nothing is seen of it."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from accelerate.utils import fsdp_utils
from adapter_folders import (
    KINDS,
    TARGETS,
    assert_unchanged,
    everything_about,
    lambda_values,
    logits_of,
    make_up_weights,
    read_weights,
    sibo_config,
    with_weights,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, VOCAB, WIDTH
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from sibo_triton import SiboLoraConfig
from sibo_triton.saving.saved_weights import with_guard

pytestmark = pytest.mark.oldest

GUARD = "base_model.model.model.layers.0.input_layernorm.weight"


def guards_in(tensors):
    return [name for name, tensor in tensors.items() if tensor.numel() == 0]


def drop_guard(tensors):
    for name in guards_in(tensors):
        del tensors[name]


# --- without sibo_triton, in a fresh process

STOCK_TARGETS = {"llama": TARGETS, "gpt2": ("c_attn", "c_fc", "attn.c_proj")}  # the first mixes, the last does not


def stock_arguments(architecture, root):
    """A SIBO adapter and a plain one, saved: what the session is told of an architecture."""
    ARCHITECTURES[architecture].build().save_pretrained(root / "base")
    options = {"r": 4, "target_modules": list(STOCK_TARGETS[architecture]), "task_type": "CAUSAL_LM"}
    for name, config in (("sibo", SiboLoraConfig(**options, sibo_lambda=0.3)), ("plain", LoraConfig(**options))):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), config)
        make_up_weights(model)
        model.save_pretrained(root / name)
        if name == "sibo":
            trained(model, root / "trained", max_steps=1, save_steps=1)
    folders = [root / "base", root / "sibo", root / "trained" / "checkpoint-1", root / "plain"]
    return [architecture, *folders, ",".join(options["target_modules"])]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What stock PEFT and transformers make of the weights of a SIBO adapter, by architecture and way of loading."""
    root = tmp_path_factory.mktemp("stock")
    arguments = [argument for of in STOCK_TARGETS for argument in stock_arguments(of, root / of)]
    command = [sys.executable, Path(__file__).with_name("guard_session.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def trained(model, folder, **options):
    rows = torch.randint(3, 50, (4, 6)).tolist()
    arguments = TrainingArguments(str(folder), report_to=[], disable_tqdm=True, use_cpu=True, **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    return trainer


# ways that fail by what else they look at: the type in the config, or a name that is not in the model
OTHERWISE_LOUD = {
    "transformers, hotswap": "SIBO_LORA",
    "hotswap": "SIBO_LORA",
    "hotswap, state dict": "unexpected keys",
}
# not the guard's affair: the user asks for it; what was saved is plain LoRA
LET_THROUGH = ("ignore_mismatched_sizes", "a plain adapter")
# what transformers 5.17 and PEFT 0.19 do with *any* adapter's weights: their names with a prefix match nothing
LOADS_NOTHING = {
    ("llama", "set_peft_model_state_dict, injected"),
    ("gpt2", "set_peft_model_state_dict, injected"),
    ("gpt2", "transformers, config"),
    ("gpt2", "transformers, hotswap, config"),
}


@pytest.mark.parametrize("architecture", STOCK_TARGETS)
def test_stock_peft_makes_plain_lora_of_a_sibo_adapter_in_no_way(stock, architecture):
    results = stock[architecture]
    oldest = peft.__version__.startswith("0.19.")
    for way, result in results.items():
        if way in LET_THROUGH:
            continue
        if way in OTHERWISE_LOUD:
            assert OTHERWISE_LOUD[way] in result, way
        elif oldest and (architecture, way) in LOADS_NOTHING:
            assert result == "nothing copied", way
        elif way.startswith("transformers"):
            assert "You set `ignore_mismatched_sizes` to `False`" in result, way
        else:
            assert "RuntimeError" in result and "size mismatch for" in result, way
            assert "[0, 0]" in result and "weight" in result, way
    assert len(results) == 22


@pytest.mark.parametrize("architecture", STOCK_TARGETS)
def test_stock_peft_still_takes_plain_lora_and_warns_when_told_to_ignore_sizes(stock, architecture):
    results = stock[architecture]
    assert results["a plain adapter"] == "copied"
    assert results["ignore_mismatched_sizes"].startswith("copied")
    assert "torch.Size([0, 0]) in the checkpoint" in results["ignore_mismatched_sizes"]


# --- what is saved


def transformers_saves(case, kind, folder):
    model = case.base()
    model.add_adapter(sibo_config(kind))
    model.save_pretrained(folder)
    return read_weights(folder)


def peft_saves(case, kind, folder, **options):
    model = PeftModel.from_pretrained(case.base(), case.folder)
    if "state_dict" in options:
        options["state_dict"] = options["state_dict"](model)
    model.save_pretrained(folder, **options)
    file = next(folder.glob("adapter_model.*"))
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file)


def trainer_saves(case, kind, folder):
    trained(PeftModel.from_pretrained(case.base(), case.folder, is_trainable=True), folder, max_steps=1, save_steps=1)
    return read_weights(folder / "checkpoint-1")


def accelerate_saves(case, kind, folder):
    return fsdp_utils._get_model_state_dict(PeftModel.from_pretrained(case.base(), case.folder), adapter_only=True)


def compiled_saves(case, kind, folder):
    model = torch.compile(PeftModel.from_pretrained(case.base(), case.folder))
    return get_peft_model_state_dict(model, unwrap_compiled=True)


def checkpoint_wrapped_saves(case, kind, folder):
    model = PeftModel.from_pretrained(case.base(), case.folder)
    layers = model.get_base_model().model.layers
    for position, block in enumerate(layers):
        layers[position] = checkpoint_wrapper(block)
    tensors = get_peft_model_state_dict(model)
    if not tensors:
        pytest.skip("PEFT 0.21 saves nothing, not of plain LoRA either, from blocks that were wrapped after injection")
    return tensors


SAVERS = {
    "PeftModel": peft_saves,
    "PeftModel, pickle": lambda *args: peft_saves(*args, safe_serialization=False),
    "PeftModel, state_dict": lambda *args: peft_saves(*args, state_dict=lambda model: model.state_dict()),
    "PeftModel, state_dict of the adapter": lambda *args: peft_saves(
        *args, state_dict=lambda model: {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    ),
    "transformers": transformers_saves,
    "Trainer": trainer_saves,
    "accelerate's FSDP": accelerate_saves,
    "compiled": compiled_saves,
    "checkpoint_wrapper": checkpoint_wrapped_saves,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saver", SAVERS)
def test_every_way_of_saving_writes_the_guard(saved, saver, kind, tmp_path):
    tensors = SAVERS[saver](saved[kind], kind, tmp_path)
    assert guards_in(tensors) == [GUARD]
    assert sum("lora_sibo_lambda" in name for name in tensors) == 6 * (2 if kind == "learnable" else 1)


def test_peft_has_one_function_of_the_name_wherever_it_is_imported_from(saved):
    for name in ("get_peft_model_state_dict", "set_peft_model_state_dict"):
        found = [
            vars(module)[name]
            for path, module in list(sys.modules.items())
            if path.partition(".")[0] == "peft" and name in vars(module)
        ]
        assert len(found) >= 4 and len(set(found)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_adapter_beside_a_sibo_adapter_gets_no_guard(saved, kind, tmp_path):
    model = PeftModel.from_pretrained(saved[kind].base(), saved[kind].folder)
    model.add_adapter("plain", LoraConfig(r=2, target_modules=list(TARGETS)))
    model.add_adapter("zero", sibo_config(kind, sibo_lambda=0.0) if kind == "fixed" else LoraConfig(r=2))
    model.save_pretrained(tmp_path)
    assert guards_in(read_weights(tmp_path)) == [GUARD]
    assert not guards_in(read_weights(tmp_path / "plain")) and not guards_in(read_weights(tmp_path / "zero"))


class Bare(nn.Module):
    """Blocks without norms: there is no parameter that LoRA may not wrap."""

    class Block(GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden_states):
            return hidden_states + self.down(self.up(hidden_states).relu())

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, input_ids):
        hidden_states = self.embed(input_ids)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_without_a_norm_the_mixing_layer_itself_is_guarded(tmp_path):
    config = sibo_config("fixed", target_modules=["up", "down"], sibo_target_modules=["up"], task_type=None)
    base = Bare()
    model = get_peft_model(base, config)
    assert guards_in(get_peft_model_state_dict(model)) == ["base_model.model.blocks.0.up.base_layer.weight"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Bare(), tmp_path)
    assert lambda_values(loaded) == lambda_values(model)


OPTIONS = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "norms saved": {"modules_to_save": ["input_layernorm"]},
    "all norms saved": {"modules_to_save": ["norm"]},
    "bias": {"bias": "all"},
    "embeddings": {"target_modules": [*TARGETS, "embed_tokens"]},
    "trainable tokens": {"trainable_token_indices": [1, 2]},
    "another source": {"sibo_source": "embedding"},
    "one block": {"sibo_target_modules": r".*\.1\..*q_proj"},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_guard_names_a_parameter_that_no_other_tensor_of_the_file_is(saved, options, tied, tmp_path):
    case = saved["fixed"]

    def base():
        config = case.base().config
        config.tie_word_embeddings, config.attention_bias = tied, True
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

    model = get_peft_model(base(), sibo_config("fixed", **OPTIONS[options]))
    make_up_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval().save_pretrained(tmp_path)
    tensors = read_weights(tmp_path)
    (guard,) = guards_in(tensors)
    plain_lora = get_peft_model(base(), LoraConfig(target_modules=list(TARGETS)))
    assert guard in plain_lora.state_dict()
    assert guard.startswith(f"base_model.model.model.layers.{1 if options == 'one block' else 0}.")
    if "norms" in options:
        assert not guard.endswith("input_layernorm.weight")
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits_of(loaded, case.input_ids), logits_of(model, case.input_ids))


def test_the_guard_takes_the_name_of_no_tensor_that_is_saved(saved):
    model = PeftModel.from_pretrained(saved["fixed"].base(), saved["fixed"].folder)
    tensors = get_peft_model_state_dict(model)
    drop_guard(tensors)
    norm = model.state_dict()[GUARD]
    guarded = with_guard(model, {**tensors, GUARD: norm})
    assert guarded.keys() > tensors.keys() and guarded[GUARD] is norm
    assert guards_in(guarded) == [GUARD.replace("input_", "post_attention_")]


def test_the_guard_of_a_compiled_model_has_the_prefix_that_its_tensors_have(saved):
    tensors = get_peft_model_state_dict(
        torch.compile(PeftModel.from_pretrained(saved["fixed"].base(), saved["fixed"].folder))
    )
    assert guards_in(tensors) == [f"_orig_mod.{GUARD}"] and all(name.startswith("_orig_mod.") for name in tensors)


def test_the_guard_is_not_taken_from_the_flat_shard_of_a_wrapped_weight(saved):
    model = PeftModel.from_pretrained(saved["fixed"].base(), saved["fixed"].folder)
    shards = {name: tensor.flatten() for name, tensor in model.state_dict().items() if "base_layer" in name}
    (guard,) = guards_in(get_peft_model_state_dict(model, state_dict={**model.state_dict(), **shards}))
    assert guard == GUARD


def test_the_guard_names_no_parameter_of_another_adapter(saved):
    """A norm's copy, trained with an adapter, is nearer to the mixing layer than the norms of plain LoRA models."""
    base = saved["fixed"].base()
    for block in base.model.layers:
        del block.self_attn._modules["k_proj"]
        block.self_attn.k_proj = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH))
    model = get_peft_model(base, sibo_config("fixed"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["k_proj"]))
    assert guards_in(get_peft_model_state_dict(model)) == [GUARD]


# --- what is loaded here


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guarded", [True, False], ids=["guard", "no guard"])
def test_here_the_guard_is_dropped_without_a_word(saved, kind, guarded, tmp_path):
    case = saved[kind]
    folder = case.folder if guarded else with_weights(case.folder, tmp_path / "unguarded", drop_guard)
    existing = get_peft_model(case.base(), sibo_config(kind))
    injected = case.base()
    by_hand, by_old_name = (
        get_peft_model(case.base(), sibo_config(kind)),
        get_peft_model(case.base(), sibo_config(kind)),
    )
    imported_before = set_peft_model_state_dict.__wrapped__  # by name, in front of sibo_triton
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        models = {
            "ignored sizes": PeftModel.from_pretrained(case.base(), folder, ignore_mismatched_sizes=True),
            "existing": existing,
            "injected": injected,
            "by hand": by_hand,
            "imported before": by_old_name,
        }
        results = [
            existing.load_adapter(folder, "default"),
            existing.load_adapter(folder, "default", ignore_mismatched_sizes=True),
            injected.load_adapter(folder, ignore_mismatched_sizes=True),
            set_peft_model_state_dict(by_hand, read_weights(folder)),
            imported_before(by_old_name, read_weights(folder)),
        ]
    for result in results:
        assert not result.unexpected_keys and not getattr(result, "mismatched_keys", ())
    for name, model in models.items():
        assert lambda_values(model) == case.lambdas, name
        assert torch.equal(logits_of(model.eval(), case.input_ids), case.logits), name


def test_the_output_of_get_peft_model_state_dict_is_not_changed_by_loading_it(saved):
    case = saved["fixed"]
    state = get_peft_model_state_dict(PeftModel.from_pretrained(case.base(), case.folder))
    assert guards_in(state) == [GUARD]
    model = get_peft_model(case.base(), sibo_config("fixed"))
    for _ in range(2):
        set_peft_model_state_dict(model, peft_model_state_dict=state, adapter_name="default")
        assert guards_in(state) == [GUARD]
    assert torch.equal(logits_of(model.eval(), case.input_ids), case.logits)
    assert guards_in(get_peft_model_state_dict(model=model, adapter_name="default")) == [GUARD]


class WithEmpty(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.empty = nn.Parameter(torch.zeros(0, 0))


def test_a_base_model_keeps_an_empty_tensor_of_its_own(saved, tmp_path):
    WithEmpty(saved["fixed"].base().config).save_pretrained(tmp_path)
    assert guards_in(load_file(tmp_path / "model.safetensors")) == ["empty"]
    _, report = WithEmpty.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]


def plain(case):
    return get_peft_model(case.base(), LoraConfig(r=4, target_modules=list(TARGETS)))


def injected_plain(case):
    model = case.base()
    model.add_adapter(LoraConfig(r=4, target_modules=list(TARGETS)))
    return model


def beside_sibo(case):
    model = get_peft_model(case.base(), sibo_config("fixed"), adapter_name="sibo")
    model.add_adapter("default", LoraConfig(r=4, target_modules=list(TARGETS)))
    return model


def injected_beside_sibo(case):
    model = case.base()
    model.add_adapter(sibo_config("fixed"), "sibo")
    model.add_adapter(LoraConfig(r=4, target_modules=list(TARGETS)), "default")
    return model


def by_hand(model, folder):
    set_peft_model_state_dict(model, read_weights(folder))


ONTO_PLAIN = {
    "load_adapter": (plain, lambda m, d: m.load_adapter(d, "default")),
    "load_adapter, ignore_mismatched_sizes": (
        plain,
        lambda m, d: m.load_adapter(d, "default", ignore_mismatched_sizes=True),
    ),
    "load_adapter beside SIBO": (beside_sibo, lambda m, d: m.load_adapter(d, "default")),
    "from_pretrained, config": (
        lambda case: case.base(),
        lambda m, d: PeftModel.from_pretrained(m, d, config=LoraConfig(target_modules=list(TARGETS))),
    ),
    "by hand": (plain, by_hand),
    "by hand, injected": (injected_plain, by_hand),
    "transformers, hotswap": (injected_plain, lambda m, d: m.load_adapter(d, "default", hotswap=True)),
    "transformers, hotswap beside SIBO": (
        injected_beside_sibo,
        lambda m, d: m.load_adapter(d, "default", hotswap=True),
    ),
    "transformers, config": (
        lambda case: case.base(),
        lambda m, d: m.load_adapter(d, peft_config=LoraConfig(r=4, target_modules=list(TARGETS))),
    ),
}


def only_the_guard(tensors):
    for name in [name for name in tensors if "sibo" in name]:
        del tensors[name]


@pytest.mark.parametrize("change", [None, drop_guard, only_the_guard], ids=["whole", "no guard", "no lambdas"])
@pytest.mark.parametrize("way", ONTO_PLAIN)
def test_here_a_plain_adapter_refuses_the_weights_before_it_takes_any(saved, way, change, tmp_path):
    case = saved["fixed"]
    folder = case.folder if change is None else with_weights(case.folder, tmp_path / "changed", change)
    prepare, load = ONTO_PLAIN[way]
    model = prepare(case)
    before = everything_about(model, case.input_ids)
    named = "input_layernorm" if change is only_the_guard else "lora_sibo_lambda"
    with pytest.raises(
        ValueError, match=rf"The weights hold \S*{named}[\s\S]*'default' computes the plain method[\s\S]*SiboL"
    ):
        load(model, folder)
    if "config" in way:  # the plain adapter was made, and is fresh
        assert torch.equal(logits_of(model, case.input_ids), before["logits"])
    else:
        assert_unchanged(before, everything_about(model, case.input_ids))

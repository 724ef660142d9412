"""What a saved bottleneck adapter holds, that every entry path loads it back to equal outputs, and that stock PEFT,
without sibo_triton, refuses it."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_folders import read_config, read_weights, saved_base, with_config, with_weights
from adapter_models import different, residual_hooks_on
from bottleneck_models import adapter, randomise
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from refusals import assert_as_it_was, fingerprint
from tiny_models import token_inputs
from transformers import AutoModel, AutoModelForCausalLM

from sibo_triton import SiboAdapterConfig

pytestmark = pytest.mark.oldest

CONFIGS = {
    "fixed": {},
    "learnable": {"sibo_learnable": True, "scaling": "learnable", "placement": "parallel", "adapter_dropout": 0.1},
    "output": {"side": "output", "target_modules": ["down_proj"], "activation": "gelu"},
    "sub-layer": {"placement": "parallel", "target_modules": ["mlp"]},
    "plain": {"sibo_lambda": 0.0},
}


class Saved:
    """An adapter folder on the base model of `root`, each mixing module with another lambda than the config's."""

    def __init__(self, root, kind, **options):
        self.root, self.kind, self.folder = root, kind, root / kind
        self.inputs = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
        model = get_peft_model(self.base(), self.config(), **options)
        make_up(model)
        model.eval().save_pretrained(self.folder)
        self.logits = logits(model, self.inputs)
        self.state = {name: tensor for name, tensor in model.state_dict().items() if ".sibo_adapter_" in name}
        with model.disable_adapter():
            assert different(logits(model, self.inputs), self.logits)

    def config(self, **options):
        defaults = {"value": 0.3, "task_type": "CAUSAL_LM", **CONFIGS[self.kind], **options}
        defaults["value"] = defaults.pop("sibo_lambda", defaults["value"])
        return adapter(**defaults)

    def base(self):
        return copy.deepcopy(BASES[self.root])


BASES = {}


def make_up(model):
    torch.manual_seed(0)
    randomise(model)
    with torch.no_grad():
        for position, (name, tensor) in enumerate(model.state_dict().items()):
            if name.endswith(("lambda.default.weight", "lambda.default.logit_bias")):
                tensor.fill_(0.35 + 0.01 * position / 100)
            elif ".sibo_adapter_" in name and "lambda" not in name:
                tensor.copy_(tensor.bfloat16())


def logits(model, inputs):
    with torch.no_grad():
        return model(input_ids=inputs).logits.float()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("bottleneck")
    saved_base(root / "base")
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.2)
    base.save_pretrained(root / "base")
    BASES[root] = AutoModelForCausalLM.from_pretrained(root / "base")
    return {kind: Saved(root, kind) for kind in CONFIGS}


# --- the files


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_files(saved, kind):
    case = saved[kind]
    config, tensors = read_config(case.folder), read_weights(case.folder)
    assert config["peft_type"] == "SIBO_ADAPTER"
    mixing = {"plain": None, "output": ["down_proj"], "sub-layer": ["mlp"]}.get(kind, ["gate_proj", "up_proj"])
    assert config["sibo_target_modules"] is None and config["sibo_mixing_modules"] == mixing
    guards = [name for name in tensors if not tensors[name].numel()]
    assert guards == ([] if kind == "plain" else ["base_model.model.model.layers.0.input_layernorm.weight"])
    names = {name.replace(".default.", ".") for name in case.state}
    assert set(tensors) - set(guards) == names
    assert all(torch.equal(tensors[name.replace(".default.", ".")], value) for name, value in case.state.items())
    assert "import sibo_triton" in (case.folder / "README.md").read_text()


def test_adapters_saved_together_go_into_folders_of_their_own(saved, tmp_path):
    """PEFT 0.19 would write the weights of all into each."""
    case, other = saved["fixed"], saved["learnable"]
    model = PeftModel.from_pretrained(case.base(), case.folder)
    model.load_adapter(other.folder, "other")
    model.save_pretrained(tmp_path)
    for folder, each in ((tmp_path, case), (tmp_path / "other", other)):
        assert read_weights(folder).keys() == read_weights(each.folder).keys()
        assert torch.equal(logits(PeftModel.from_pretrained(each.base(), folder), each.inputs), each.logits)


# --- loading


def load_second(case, **options):
    model = get_peft_model(case.base(), adapter(0.5, bottleneck_size=3, target_modules=["q_proj"]))
    model.load_adapter(case.folder, "second", **options)
    model.set_adapter("second")
    return model


def by_transformers(case, **options):
    model = case.base()
    model.load_adapter(case.folder, **options)
    return model


def by_state_dict(case, low_cpu_mem_usage):
    first = inject_adapter_in_model(case.config(), case.base())
    make_up(first)
    model = inject_adapter_in_model(case.config(), case.base(), low_cpu_mem_usage=low_cpu_mem_usage)
    state = get_peft_model_state_dict(first)
    result = set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys and not [name for name in result.missing_keys if "sibo_adapter" in name]
    return model


LOADERS = {
    "from_pretrained": lambda case: PeftModel.from_pretrained(case.base(), case.folder),
    "low_cpu_mem_usage": lambda case: PeftModel.from_pretrained(case.base(), case.folder, low_cpu_mem_usage=True),
    "is_trainable": lambda case: PeftModel.from_pretrained(case.base(), case.folder, is_trainable=True),
    "config passed": lambda case: PeftModel.from_pretrained(
        case.base(), case.folder, config=PeftConfig.from_pretrained(case.folder)
    ),
    "AutoPeftModel": lambda case: AutoPeftModelForCausalLM.from_pretrained(case.folder),
    "second adapter": load_second,
    "second adapter, low_cpu_mem_usage": lambda case: load_second(case, low_cpu_mem_usage=True),
    "transformers": by_transformers,
    "transformers, low_cpu_mem_usage": lambda case: by_transformers(case, low_cpu_mem_usage=True),
    "transformers, is_trainable": lambda case: by_transformers(case, is_trainable=True, adapter_name="mine"),
    "AutoModel": lambda case: AutoModelForCausalLM.from_pretrained(case.folder),
    "inject": lambda case: by_state_dict(case, False),
    "inject, low_cpu_mem_usage": lambda case: by_state_dict(case, True),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_saved_adapter_loads_back_to_equal_outputs(saved, kind, loader):
    case = saved[kind]
    model = LOADERS[loader](case).eval()
    assert torch.equal(logits(model, case.inputs), case.logits)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".sibo_adapter_" in name]
    if "trainable" in loader:
        buffers = ("lambda.default.weight", "lambda.default.gate")
        assert len(trained) == sum(not name.endswith(buffers) for name in case.state)


def test_auto_model_without_the_head_mixes_in_blocks_of_another_name(saved):
    case = saved["fixed"]
    model = AutoModel.from_pretrained(case.folder)
    with torch.no_grad():
        hidden_states = model(input_ids=case.inputs).last_hidden_state
        assert torch.equal(case.base().get_output_embeddings()(hidden_states), case.logits)


def test_transformers_saves_the_folder_that_peft_saves(saved, tmp_path):
    case = saved["learnable"]
    model = case.base()
    model.add_adapter(case.config())
    make_up(model)
    model.save_pretrained(tmp_path)
    tensors, expected = read_weights(tmp_path), read_weights(case.folder)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert read_config(tmp_path)["sibo_mixing_modules"] == read_config(case.folder)["sibo_mixing_modules"]


def test_a_round_trip_keeps_modules_to_save(saved, tmp_path):
    case = saved["fixed"]
    model = get_peft_model(case.base(), case.config(modules_to_save=["lm_head"]))
    make_up(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(logits(loaded, case.inputs), logits(model, case.inputs))


@pytest.mark.parametrize("kind", ["fixed", "learnable"])
@pytest.mark.parametrize("fp32", [True, False])
def test_on_a_bfloat16_base_lambda_and_scaling_stay_float32(saved, kind, fp32, tmp_path):
    case = saved[kind]
    options = {"autocast_adapter_dtype": fp32}
    model = get_peft_model(case.base().bfloat16(), case.config(), **options)
    make_up(model)
    dtypes = {part: {t.dtype for name, t in adapter_state(model).items() if f"adapter_{part}" in name} for part in
              ("down", "up", "lambda", "scaling")}  # fmt: skip
    assert dtypes["down"] == dtypes["up"] == {torch.float32 if fp32 else torch.bfloat16}
    assert dtypes["lambda"] == {torch.float32} and dtypes["scaling"] <= {torch.float32}
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base().bfloat16(), tmp_path, **options)
    assert torch.equal(logits(loaded, case.inputs), logits(model, case.inputs))
    model.half().to(torch.bfloat16)
    tensors = adapter_state(model)
    assert all(t.dtype == torch.float32 for name, t in tensors.items() if "lambda" in name or "scaling" in name)
    assert all(torch.equal(t, adapter_state(loaded)[name]) for name, t in tensors.items() if "lambda" in name)


def adapter_state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".sibo_adapter_" in name}


# --- what is refused


def drop_lambda(tensors):
    del tensors["base_model.model.model.layers.1.mlp.up_proj.sibo_adapter_lambda.weight"]


def infinite_lambda(tensors):
    tensors["base_model.model.model.layers.1.mlp.up_proj.sibo_adapter_lambda.weight"] = torch.tensor([float("inf")])


@pytest.mark.parametrize(("change", "problem"), [(drop_lambda, "is missing"), (infinite_lambda, "is inf")])
@pytest.mark.parametrize("loader", ["from_pretrained", "second adapter", "transformers", "AutoPeftModel"])
def test_weights_without_a_usable_lambda_are_refused(saved, loader, change, problem, tmp_path):
    case = copy.copy(saved["fixed"])
    case.folder = with_weights(case.folder, tmp_path / "broken", change)
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.up_proj\.sibo_adapter_lambda\.weight {problem} in"):
        LOADERS[loader](case)


def test_a_refused_folder_leaves_the_model_as_it_was(saved, tmp_path):
    case = saved["fixed"]
    broken = with_weights(case.folder, tmp_path / "broken", drop_lambda)
    for start, load in (
        (lambda: case.base(), lambda model: PeftModel.from_pretrained(model, broken)),
        (
            lambda: PeftModel.from_pretrained(case.base(), case.folder),
            lambda model: model.load_adapter(broken, "second"),
        ),
        (lambda: case.base(), lambda model: model.load_adapter(broken)),
    ):
        model, inputs = start(), token_inputs()
        before = fingerprint(model, inputs)
        with pytest.raises(ValueError, match="is missing in the adapter's weights"):
            load(model)
        assert_as_it_was(model, inputs, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("activation", "gelu"), ("scaling", 2.5), ("sibo_source", "embedding"), ("adapter_bias", False)],
)
def test_weights_that_an_adapter_would_make_something_else_of_are_refused(saved, name, value, tmp_path):
    """What is in no tensor: PEFT compares no configs when it loads weights onto an adapter that is there."""
    case = saved["fixed"]
    model = PeftModel.from_pretrained(case.base(), case.folder)
    edited = with_config(case.folder, tmp_path / "edited", **{name: value})
    with pytest.raises(ValueError, match=f"Configs are incompatible: for {name}, .*another adapter"):
        model.load_adapter(edited, "default")
    model.load_adapter(case.folder, "default")
    assert torch.equal(logits(model, case.inputs), case.logits)


@pytest.mark.parametrize("kind", ["fixed", "plain"])
def test_weights_of_another_method_are_refused(saved, kind, tmp_path):
    case = saved[kind]
    lora = get_peft_model(case.base(), LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    before = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    with pytest.raises(ValueError, match="The weights are those of a bottleneck adapter .* 'default' is not one"):
        lora.load_adapter(case.folder, "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.state_dict().items())
    lora.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(case.base(), case.folder)
    with pytest.raises(ValueError, match="The weights are not those of a bottleneck adapter .* 'default' is one"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, case.inputs), case.logits)


def test_a_mixing_adapter_s_weights_do_not_load_onto_a_plain_one(saved):
    case = saved["fixed"]
    model = get_peft_model(case.base(), case.config(sibo_lambda=0.0))
    with pytest.raises(ValueError, match=r"The weights hold .*sibo_adapter_lambda\.weight and others"):
        set_peft_model_state_dict(model, read_weights(case.folder))
    assert residual_hooks_on(model) == []


# --- without sibo_triton, in a fresh process

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
base, inputs, outputs, *folders = sys.argv[1:]
import torch, transformers
transformers.logging.set_verbosity_error()
from peft import (
    AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model,
    load_peft_weights, set_peft_model_state_dict
)
from transformers import AutoModelForCausalLM

def fresh():
    return AutoModelForCausalLM.from_pretrained(base)

def config():
    return LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")

def lora():
    return get_peft_model(fresh(), config())

paths = {
    "PeftModel.from_pretrained": lambda folder: PeftModel.from_pretrained(fresh(), folder),
    "low_cpu_mem_usage": lambda folder: PeftModel.from_pretrained(fresh(), folder, low_cpu_mem_usage=True),
    "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained,
    "PeftMixedModel": lambda folder: PeftMixedModel.from_pretrained(fresh(), folder),
    "PeftConfig.from_pretrained": PeftConfig.from_pretrained,
    "LoraConfig.from_pretrained": LoraConfig.from_pretrained,
    "PeftModel.load_adapter": lambda folder: lora().load_adapter(folder, "second"),
    "transformers load_adapter": lambda folder: fresh().load_adapter(folder),
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "load_adapter, existing": lambda folder: lora().load_adapter(folder, "default"),
    "set_peft_model_state_dict": lambda folder: set_peft_model_state_dict(lora(), load_peft_weights(folder)),
    "from_pretrained, config": lambda folder: PeftModel.from_pretrained(fresh(), folder, config=config()),
}
results = {}
for path, load in paths.items():
    for folder in folders:
        try:
            load(folder)
            results[path + " " + folder] = None
        except Exception as error:
            results[path + " " + folder] = repr(error)
results["imported"] = any(name.startswith("sibo_triton") for name in sys.modules)
import sibo_triton  # the card's line; everything of PEFT is imported and used already
with torch.no_grad():
    input_ids = torch.load(inputs)
    loaded = {folder: PeftModel.from_pretrained(fresh(), folder)(input_ids=input_ids).logits for folder in folders}
torch.save(loaded, outputs)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def fresh_process(saved, tmp_path_factory):
    root = tmp_path_factory.mktemp("fresh")
    case = saved["fixed"]
    torch.save(case.inputs, root / "inputs.pt")
    folders = [str(saved[kind].folder) for kind in ("fixed", "learnable", "plain")]
    arguments = [str(case.root / "base"), str(root / "inputs.pt"), str(root / "outputs.pt"), *folders]
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), torch.load(root / "outputs.pt")


def test_stock_peft_without_sibo_triton_fails_loudly(fresh_process, saved):
    results, _ = fresh_process
    assert results.pop("imported") is False
    by_guard = {"load_adapter, existing", "set_peft_model_state_dict", "from_pretrained, config"}
    assert len(results) == 12 * 3
    for entry, error in results.items():
        path, folder = entry.rsplit(" ", 1)
        if path in by_guard and folder == str(saved["plain"].folder):
            continue  # as with every other method's weights, no name matches: nothing is loaded, which PEFT lets pass
        assert error is not None, entry
        assert ("size mismatch" if path in by_guard else "SIBO_ADAPTER") in error, entry


def test_the_import_line_of_the_card_is_all_that_it_takes(fresh_process, saved):
    for kind in ("fixed", "learnable", "plain"):
        torch.testing.assert_close(fresh_process[1][str(saved[kind].folder)], saved[kind].logits, atol=1e-6, rtol=1e-5)


def test_a_saved_config_makes_a_fresh_adapter(saved):
    case = saved["fixed"]
    config = PeftConfig.from_pretrained(case.folder)
    assert type(config) is SiboAdapterConfig
    model = get_peft_model(case.base(), config)
    make_up(model)
    assert torch.equal(logits(model.eval(), case.inputs), case.logits)

"""Every way into PEFT and transformers gives the same adapter, and none gives it as plain LoRA without sibo_triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_folders import (
    KINDS,
    TARGETS,
    lambda_modules,
    lambda_values,
    logits_of,
    make_up_weights,
    read_config,
    read_weights,
    save_adapter,
    saved_base,
    sibo_config,
)
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers import AutoModel, AutoModelForCausalLM

from sibo_triton import SiboAdapterConfig, SiboLoraConfig

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def saved_16(tmp_path_factory):
    root = tmp_path_factory.mktemp("entry-bf16")
    saved_base(root / "base", torch.bfloat16)
    return {kind: save_adapter(root / kind, root / "base", kind, autocast_adapter_dtype=False) for kind in KINDS}


def with_adapter(case, **options):
    model = case.base()
    model.load_adapter(case.folder, **options)
    return model.eval()


# --- transformers


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_add_adapter_computes_what_get_peft_model_computes(saved, kind):
    case = saved[kind]
    model = case.base()
    model.add_adapter(sibo_config(kind))
    make_up_weights(model)
    assert lambda_values(model) == case.lambdas
    assert torch.equal(logits_of(model.eval(), case.input_ids), case.logits)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert sum("logit_bias" in name for name in trained) == (len(case.lambdas) if kind == "learnable" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_save_pretrained_writes_the_folder_that_peft_writes(saved, kind, tmp_path):
    case = saved[kind]
    model = case.base()
    model.add_adapter(sibo_config(kind))
    make_up_weights(model)
    model.save_pretrained(tmp_path)
    tensors, expected = read_weights(tmp_path), read_weights(case.folder)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    config = read_config(tmp_path)
    assert config["peft_type"] == "SIBO_LORA"
    assert config["sibo_mixing_modules"] == read_config(case.folder)["sibo_mixing_modules"]
    assert "import sibo_triton" in (tmp_path / "README.md").read_text()
    for loaded in (PeftModel.from_pretrained(case.base(), tmp_path), with_adapter(case)):
        assert torch.equal(logits_of(loaded, case.input_ids), case.logits)


OPTIONS = [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "mine"}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options), "default"))
def test_transformers_load_adapter_gives_equal_outputs(saved, kind, options):
    case = saved[kind]
    model = with_adapter(case, **options)
    adapter = options.get("adapter_name", "default")
    assert lambda_values(model, adapter) == case.lambdas
    assert torch.equal(logits_of(model, case.input_ids), case.logits)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if "is_trainable" in options:
        assert sum("logit_bias" in name for name in trained) == (len(case.lambdas) if kind == "learnable" else 0)
        assert any("lora_A" in name for name in trained)
    else:
        assert not any("lora_" in name for name in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_load_adapter_takes_a_config_and_a_state_dict(saved, kind):
    case = saved[kind]
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in read_weights(case.folder).items()}
    model = case.base()
    model.load_adapter(peft_config=sibo_config(kind), adapter_state_dict=tensors)
    assert lambda_values(model) == case.lambdas
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


def test_transformers_adapters_side_by_side_keep_their_own_lambdas(saved):
    fixed, learnable = saved["fixed"], saved["learnable"]
    model = fixed.base()
    plain = logits_of(model, fixed.input_ids)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    model.load_adapter(fixed.folder, "fixed")
    model.load_adapter(learnable.folder, "learnable")
    for name, case in (("fixed", fixed), ("learnable", learnable), ("fixed", fixed)):
        model.set_adapter(name)
        assert torch.equal(logits_of(model, case.input_ids), case.logits)
    model.disable_adapters()
    assert torch.equal(logits_of(model, fixed.input_ids), plain)
    model.enable_adapters()
    assert torch.equal(logits_of(model, fixed.input_ids), fixed.logits)
    model.delete_adapter("learnable")
    assert torch.equal(logits_of(model, fixed.input_ids), fixed.logits)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) > sum(hooks)
    model.delete_adapter("fixed")
    assert torch.equal(logits_of(model, fixed.input_ids), plain)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == sum(hooks)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_model_takes_an_adapter_folder(saved, kind):
    case = saved[kind]
    model = AutoModelForCausalLM.from_pretrained(case.folder)
    assert lambda_values(model) == case.lambdas
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


def test_auto_model_without_the_head_mixes_in_blocks_of_another_name(saved):
    """The blocks are then at `layers`, not at `model.layers`."""
    case = saved["fixed"]
    model = AutoModel.from_pretrained(case.folder)
    assert lambda_values(model) == {name.removeprefix("model."): value for name, value in case.lambdas.items()}
    with torch.no_grad():
        hidden_states = model(input_ids=case.input_ids).last_hidden_state
        assert torch.equal(case.base().get_output_embeddings()(hidden_states), case.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_bfloat16_base_transformers_keeps_lambda_exact(saved_16, kind, tmp_path):
    case = saved_16[kind]
    models = {
        "load_adapter": with_adapter(case),
        "low_cpu_mem_usage": with_adapter(case, low_cpu_mem_usage=True),
        "AutoModel": AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16),
    }
    for name, model in models.items():
        assert {p.dtype for n, p in model.named_parameters() if "lora_A" in n} == {torch.bfloat16}, name
        assert lambda_values(model) == case.lambdas, name  # which also says that they are fp32
        assert torch.equal(logits_of(model, case.input_ids), case.logits), name
    models["load_adapter"].save_pretrained(tmp_path)
    tensors = {name: tensor for name, tensor in read_weights(tmp_path).items() if "sibo" in name}
    assert tensors and {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# --- injection


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_inject_adapter_and_its_state_dict_carry_lambda(saved, kind, low_cpu_mem_usage):
    case = saved[kind]
    first = inject_adapter_in_model(sibo_config(kind), case.base())
    make_up_weights(first)
    assert torch.equal(logits_of(first.eval(), case.input_ids), case.logits)
    state = get_peft_model_state_dict(first)
    assert sum("lora_sibo_lambda" in name for name in state) == len(case.lambdas) * (2 if kind == "learnable" else 1)

    second = inject_adapter_in_model(sibo_config(kind), case.base(), low_cpu_mem_usage=low_cpu_mem_usage)
    result = set_peft_model_state_dict(second, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys and not [name for name in result.missing_keys if "lora_" in name]
    assert lambda_values(second) == case.lambdas
    assert torch.equal(logits_of(second.eval(), case.input_ids), case.logits)


def test_set_peft_model_state_dict_refuses_weights_without_lambda(saved):
    case = saved["fixed"]
    model = PeftModel.from_pretrained(case.base(), case.folder)
    state = {name: tensor for name, tensor in get_peft_model_state_dict(model).items() if "sibo" not in name}
    with pytest.raises(ValueError, match=r"lora_sibo_lambda\.weight is missing"):
        set_peft_model_state_dict(model, state)
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


@pytest.mark.parametrize("config", [sibo_config("fixed"), SiboAdapterConfig(target_modules=["gate_proj"])])
def test_a_rank_of_fsdp_that_has_no_weights_loads_none(saved, config):
    """accelerate passes the weights on the first rank and {} on the others."""
    model = get_peft_model(saved["fixed"].base(), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert set_peft_model_state_dict(model, {}).unexpected_keys == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_state_dict_carries_lambda_and_a_16_bit_one_leaves_it_fp32(saved, kind, assign):
    case = saved[kind]
    state = PeftModel.from_pretrained(case.base(), case.folder).state_dict()
    model = get_peft_model(case.base(), sibo_config(kind)).eval()
    model.load_state_dict(state, assign=assign)
    assert torch.equal(logits_of(model, case.input_ids), case.logits)
    model.load_state_dict({name: tensor.half() for name, tensor in state.items()}, assign=assign)
    rounded = lambda_values(model)
    assert {tensor.dtype for m in lambda_modules(model).values() for tensor in m.state_dict().values()} == {
        torch.float32
    }
    assert list(rounded.values()) == pytest.approx(list(case.lambdas.values()), abs=1e-3) and rounded != case.lambdas


# --- without sibo_triton, in a fresh process

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
fixed, learnable, zero, plain, base, inputs, outputs = sys.argv[1:]
import torch, transformers
transformers.logging.set_verbosity_error()
from peft import (
    AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftMixedModel, PeftModel, get_peft_model
)
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

def fresh():
    return AutoModelForCausalLM.from_pretrained(base)

def lora():
    return PeftModel.from_pretrained(fresh(), plain)

def injected():
    model = fresh()
    model.load_adapter(plain)
    return model

paths = {
    "PeftModel.from_pretrained": lambda folder: PeftModel.from_pretrained(fresh(), folder),
    "low_cpu_mem_usage": lambda folder: PeftModel.from_pretrained(fresh(), folder, low_cpu_mem_usage=True),
    "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained,
    "AutoPeftModel": AutoPeftModel.from_pretrained,
    "PeftMixedModel": lambda folder: PeftMixedModel.from_pretrained(fresh(), folder),
    "PeftConfig.from_pretrained": PeftConfig.from_pretrained,
    "LoraConfig.from_pretrained": LoraConfig.from_pretrained,
    "PeftModel.load_adapter": lambda folder: lora().load_adapter(folder, "second"),
    "transformers load_adapter": lambda folder: fresh().load_adapter(folder),
    "transformers load_adapter, second": lambda folder: injected().load_adapter(folder, "second"),
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "hotswap": lambda folder: hotswap_adapter(lora(), folder, "default"),
}
results = {}
for path, load in paths.items():
    for kind, folder in (("fixed", fixed), ("learnable", learnable)):
        try:
            load(folder)
            results[path + " " + kind] = None
        except Exception as error:
            results[path + " " + kind] = repr(error)
input_ids = torch.load(inputs)
stored = {}
with torch.no_grad():
    stored["zero"] = PeftModel.from_pretrained(fresh(), zero)(input_ids=input_ids).logits
    stored["zero, transformers"] = AutoModelForCausalLM.from_pretrained(zero)(input_ids=input_ids).logits
    results["sibo_triton imported"] = any(name.startswith("sibo_triton") for name in sys.modules)
    import sibo_triton  # the card's line; everything of PEFT is imported and used already
    for kind, folder in (("fixed", fixed), ("learnable", learnable)):
        stored[kind] = PeftModel.from_pretrained(fresh(), folder)(input_ids=input_ids).logits
        stored[kind + ", AutoPeftModel"] = AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=input_ids).logits
torch.save(stored, outputs)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def fresh_process(saved, tmp_path_factory):
    """What a process that never imported sibo_triton makes of adapter folders: all in one, for the imports' sake."""
    root = tmp_path_factory.mktemp("fresh")
    case = saved["fixed"]
    for name, config_class, options in (("zero", SiboLoraConfig, {"sibo_lambda": 0}), ("plain", LoraConfig, {})):
        config = config_class(r=4, target_modules=list(TARGETS), task_type="CAUSAL_LM", **options)
        model = get_peft_model(case.base(), config)
        make_up_weights(model)
        model.eval().save_pretrained(root / name)
    torch.save(case.input_ids, root / "inputs.pt")
    folders = [case.folder, saved["learnable"].folder, root / "zero", root / "plain", case.base_folder]
    command = [sys.executable, "-c", SCRIPT, *map(str, folders), str(root / "inputs.pt"), str(root / "outputs.pt")]
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {**results, "logits": torch.load(root / "outputs.pt"), "zero": logits_of(model, case.input_ids)}


ENTRY_PATHS = [
    "PeftModel.from_pretrained", "low_cpu_mem_usage", "AutoPeftModelForCausalLM", "AutoPeftModel", "PeftMixedModel",
    "PeftConfig.from_pretrained", "LoraConfig.from_pretrained", "PeftModel.load_adapter", "transformers load_adapter",
    "transformers load_adapter, second", "AutoModelForCausalLM", "hotswap",
]  # fmt: skip


def test_stock_peft_without_sibo_triton_fails_loudly(fresh_process):
    """One test, as tests that are many run in several processes, each of which would start the fresh one."""
    assert fresh_process["sibo_triton imported"] is False
    errors = {(path, kind): fresh_process[f"{path} {kind}"] for path in ENTRY_PATHS for kind in KINDS}
    # each says which type is unknown; None: loaded as something else
    assert not {entry: error for entry, error in errors.items() if error is None or "SIBO_LORA" not in error}


def test_stock_peft_without_sibo_triton_takes_a_lambda_0_adapter(fresh_process):
    for name in ("zero", "zero, transformers"):
        assert torch.equal(fresh_process["logits"][name], fresh_process["zero"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_import_line_of_the_card_is_all_that_it_takes(fresh_process, saved, kind):
    for name in (kind, f"{kind}, AutoPeftModel"):
        # up to rounding: in a process of its own small layers run the shorter way
        torch.testing.assert_close(fresh_process["logits"][name], saved[kind].logits, atol=1e-6, rtol=1e-5)

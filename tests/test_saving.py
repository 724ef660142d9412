"""What a saved SIBO adapter holds, and that PEFT loads it back to equal outputs, whatever the dtypes."""

import pytest
import torch
import yaml
from adapter_folders import (
    BLOCKS,
    KINDS,
    MIXING,
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
    with_config,
    with_weights,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model

from sibo_triton import SiboLoraConfig

pytestmark = pytest.mark.oldest

NAMES = [f"model.layers.{block}.{part}" for block in range(BLOCKS) for part in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.fixture(scope="module")
def saved_16(tmp_path_factory):
    """On a bfloat16 base, with adapters in fp32 (PEFT's default) and in bfloat16."""
    root = tmp_path_factory.mktemp("bf16")
    saved_base(root / "base", torch.bfloat16)
    return {
        (kind, fp32): save_adapter(root / f"{kind}-{fp32}", root / "base", kind, autocast_adapter_dtype=fp32)
        for kind in KINDS
        for fp32 in (True, False)
    }


# --- the files


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_file_has_a_type_of_its_own_and_names_the_modules_that_mix(saved, kind):
    config = read_config(saved[kind].folder)
    assert config["peft_type"] == "SIBO_LORA"
    assert config["sibo_target_modules"] is None  # as given
    assert config["sibo_mixing_modules"] == list(MIXING)  # what that chose
    assert config["sibo_lambda"] == 0.3 and config["sibo_learnable"] is (kind == "learnable")
    assert config["sibo_source"] == "block_input" and config["sibo_blocks"] is None
    assert set(config["target_modules"]) == set(TARGETS)


@pytest.mark.parametrize("kind, entries", [("fixed", ["weight"]), ("learnable", ["gate", "logit_bias"])])
def test_the_weights_file_holds_lambda_of_every_mixing_module_with_shape_1(saved, kind, entries):
    tensors = {name: tensor for name, tensor in read_weights(saved[kind].folder).items() if "sibo" in name}
    expected = {f"base_model.model.{name}.lora_sibo_lambda.{entry}" for name in NAMES for entry in entries}
    assert set(tensors) == expected
    assert all(tensor.shape == (1,) and tensor.dtype == torch.float32 for tensor in tensors.values())
    for name, value in saved[kind].lambdas.items():
        entry = tensors[f"base_model.model.{name}.lora_sibo_lambda.{entries[-1]}"]
        assert float(entry if kind == "fixed" else entry.sigmoid()) == value


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_without_buffers_is_saved_with_lambda(saved, kind, tmp_path):
    """As scripts for ZeRO-3 make it, of named_parameters()."""
    case = saved[kind]
    model = PeftModel.from_pretrained(case.base(), case.folder)
    model.save_pretrained(tmp_path, state_dict=dict(model.named_parameters()))
    tensors, expected = read_weights(tmp_path), read_weights(case.folder)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], of) for name, of in expected.items())


def test_sibo_target_modules_given_by_the_user_are_saved_as_given(saved, tmp_path):
    config = sibo_config("fixed", sibo_target_modules=r".*\.0\..*q_proj")
    model = get_peft_model(saved["fixed"].base(), config)
    make_up_weights(model)
    model.eval().save_pretrained(tmp_path)
    assert read_config(tmp_path)["sibo_target_modules"] == r".*\.0\..*q_proj"
    loaded = PeftModel.from_pretrained(saved["fixed"].base(), tmp_path)
    assert list(lambda_values(loaded)) == ["model.layers.0.self_attn.q_proj"]
    assert torch.equal(logits_of(loaded, saved["fixed"].input_ids), logits_of(model, saved["fixed"].input_ids))


def test_saving_and_loading_as_pickle_files_keeps_lambda(saved, tmp_path):
    case = saved["learnable"]
    model = PeftModel.from_pretrained(case.base(), case.folder)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert lambda_values(loaded) == case.lambdas
    assert torch.equal(logits_of(loaded, case.input_ids), case.logits)


# --- loading


def load_second(case, **options):
    model = get_peft_model(case.base(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.load_adapter(case.folder, "second", **options)
    model.set_adapter("second")
    return model


LOADERS = {
    "from_pretrained": lambda case: PeftModel.from_pretrained(case.base(), case.folder),
    "low_cpu_mem_usage": lambda case: PeftModel.from_pretrained(case.base(), case.folder, low_cpu_mem_usage=True),
    "is_trainable": lambda case: PeftModel.from_pretrained(case.base(), case.folder, is_trainable=True),
    "config passed": lambda case: PeftModel.from_pretrained(
        case.base(), case.folder, config=PeftConfig.from_pretrained(case.folder)
    ),
    "AutoPeftModel": lambda case: AutoPeftModelForCausalLM.from_pretrained(case.folder),
    "AutoPeftModel, trainable": lambda case: AutoPeftModelForCausalLM.from_pretrained(case.folder, is_trainable=True),
    "second adapter": load_second,
    "second adapter, low_cpu_mem_usage": lambda case: load_second(case, low_cpu_mem_usage=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_saved_adapter_loads_back_to_equal_outputs(saved, kind, loader):
    case = saved[kind]
    model = LOADERS[loader](case).eval()
    adapter = "second" if "second" in loader else "default"
    assert lambda_values(model, adapter) == case.lambdas
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_sibo_adapter_keeps_its_own_lambdas_and_leaves_the_first_its_own(saved, kind):
    first, second = saved[kind], saved["learnable" if kind == "fixed" else "fixed"]
    model = PeftModel.from_pretrained(first.base(), first.folder)
    model.load_adapter(second.folder, "second")
    assert torch.equal(logits_of(model, first.input_ids), first.logits)
    model.set_adapter("second")
    assert torch.equal(logits_of(model, second.input_ids), second.logits)
    assert not torch.allclose(first.logits, second.logits, atol=1e-4)
    model.delete_adapter("second")
    assert torch.equal(logits_of(model, first.input_ids), first.logits)


def test_adapters_saved_together_go_into_folders_of_their_own_each_with_its_lambda(saved, tmp_path):
    model = PeftModel.from_pretrained(saved["fixed"].base(), saved["fixed"].folder)
    model.load_adapter(saved["learnable"].folder, "other")
    model.save_pretrained(tmp_path)
    for folder, case in ((tmp_path, saved["fixed"]), (tmp_path / "other", saved["learnable"])):
        assert read_config(folder)["peft_type"] == "SIBO_LORA"
        loaded = PeftModel.from_pretrained(case.base(), folder)
        assert lambda_values(loaded) == case.lambdas
        assert torch.equal(logits_of(loaded, case.input_ids), case.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_learnable_lambda_loaded_for_training_requires_grad(saved, kind):
    case = saved[kind]
    for trainable in (True, False):
        model = PeftModel.from_pretrained(case.base(), case.folder, is_trainable=trainable)
        wanted = [name for name, parameter in model.named_parameters() if "sibo" in name and parameter.requires_grad]
        assert len(wanted) == (len(NAMES) if trainable and kind == "learnable" else 0)
        assert all(name.endswith("logit_bias") for name in wanted)
        assert any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n) is trainable


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainable_reload_goes_on_with_the_gradients_of_the_saved_model(saved, kind):
    case = saved[kind]
    original = get_peft_model(case.base(), sibo_config(kind))
    make_up_weights(original)
    reloaded = PeftModel.from_pretrained(case.base(), case.folder, is_trainable=True)
    for model in (original, reloaded):
        model(input_ids=case.input_ids, labels=case.input_ids).loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (original, reloaded)]
    assert gradients[0].keys() == gradients[1].keys()
    assert any("logit_bias" in name for name in gradients[0]) is (kind == "learnable")
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 and torch.equal(gradient, gradients[1][name]), name


def test_a_round_trip_keeps_lora_options_and_modules_to_save(saved, tmp_path):
    case = saved["learnable"]
    options = {
        "lora_bias": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3},
        "modules_to_save": ["lm_head"],
    }  # fmt: skip
    model = get_peft_model(case.base(), sibo_config("learnable", **options))
    make_up_weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (name.endswith("lora_B.default.bias") or "modules_to_save" in name):
                parameter.normal_()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(logits_of(loaded, case.input_ids), logits_of(model, case.input_ids))


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_of_the_weights_computes_and_not_that_of_the_config(saved, kind, tmp_path):
    case = saved[kind]
    edited = with_config(case.folder, tmp_path / "config", sibo_lambda=0.9)
    model = PeftModel.from_pretrained(case.base(), edited)
    assert model.peft_config["default"].sibo_lambda == 0.9
    assert torch.equal(logits_of(model, case.input_ids), case.logits)

    def change(tensors):  # the other way round: what the file says is what computes
        for name, tensor in tensors.items():
            if "sibo" in name and not name.endswith("gate"):
                tensor.fill_(0.9)

    model = PeftModel.from_pretrained(case.base(), with_weights(case.folder, tmp_path / "weights", change))
    expected = torch.tensor([0.9]) if kind == "fixed" else torch.tensor([0.9]).sigmoid()
    assert lambda_values(model) == dict.fromkeys(NAMES, float(expected))
    assert not torch.allclose(logits_of(model, case.input_ids), case.logits, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_from_a_file_makes_a_fresh_adapter(saved, kind, tmp_path):
    case = saved[kind]
    config = PeftConfig.from_pretrained(case.folder)
    assert type(config) is SiboLoraConfig
    model = get_peft_model(case.base(), config)
    values = list(lambda_values(model).items())
    assert [name for name, _ in values] == NAMES
    assert [value for _, value in values] == pytest.approx([0.3] * len(NAMES), abs=1e-7)
    assert not [name for name in vars(model.get_base_model()) if "sibo" in name]
    make_up_weights(model)
    assert torch.equal(logits_of(model.eval(), case.input_ids), case.logits)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    assert torch.equal(logits_of(loaded, case.input_ids), case.logits)


def test_a_config_file_without_resolved_modules_is_searched_again(saved, tmp_path):
    case = saved["fixed"]
    edited = with_config(case.folder, tmp_path / "edited", sibo_mixing_modules=None)
    model = PeftModel.from_pretrained(case.base(), edited)
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


def test_a_name_of_no_target_in_a_file_is_left_alone(saved, tmp_path):
    """PEFT's EVA drops targets to which it gives no rank, after injection has noted that they mix."""
    case = saved["fixed"]
    names = [*read_config(case.folder)["sibo_mixing_modules"], "k_proj"]
    edited = with_config(case.folder, tmp_path / "edited", sibo_mixing_modules=names)
    model = PeftModel.from_pretrained(case.base(), edited)
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


# --- dtypes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", ["from_pretrained", "low_cpu_mem_usage", "is_trainable", "second adapter"])
@pytest.mark.parametrize("fp32", [True, False], ids=["fp32-adapters", "bf16-adapters"])
def test_on_a_bfloat16_base_outputs_are_equal_and_lambda_is_exact(saved_16, kind, loader, fp32):
    case = saved_16[kind, fp32]
    options = {"autocast_adapter_dtype": fp32}
    if loader == "second adapter":
        model = load_second(case, **options)
    else:
        options |= {loader: True} if loader != "from_pretrained" else {}
        model = PeftModel.from_pretrained(case.base(), case.folder, **options)
    model.eval()
    adapter = "second" if "second" in loader else "default"
    dtypes = {p.dtype for n, p in model.named_parameters() if f"lora_A.{adapter}" in n}
    assert dtypes == {torch.float32 if fp32 else torch.bfloat16}
    assert lambda_values(model, adapter) == case.lambdas  # which also says that they are fp32
    assert torch.equal(logits_of(model, case.input_ids), case.logits)


def test_auto_peft_model_with_dtype_bfloat16_keeps_lambda_exact(saved, saved_16):
    case = saved["fixed"]
    model = AutoPeftModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert lambda_values(model) == case.lambdas


CASTS = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "to(device, dtype)": lambda model: model.to("cpu", torch.float16),
    "twice": lambda model: model.half().to(torch.bfloat16),
    "double()": lambda model: model.double(),
    "there and back": lambda model: model.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast", CASTS)
def test_lambda_stays_exactly_what_it_is_when_the_model_is_cast(saved, kind, cast, tmp_path):
    case = saved[kind]
    model = get_peft_model(case.base(), sibo_config(kind))
    make_up_weights(model)
    with torch.no_grad():
        for module in lambda_modules(model).values():
            (module.weight if kind == "fixed" else module.logit_bias).fill_(0.3)
    assert float(torch.tensor(0.3).bfloat16()) != 0.3  # what a cast would make of it
    before = lambda_values(model)
    assert set(before.values()) == {float(torch.tensor(0.3) if kind == "fixed" else torch.tensor(0.3).sigmoid())}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    CASTS[cast](model)
    assert lambda_values(model) == before
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    if "back" not in cast:
        assert all(p.dtype != torch.float32 for n, p in model.named_parameters() if "sibo" not in n)
    model.save_pretrained(tmp_path)
    tensors = {name: tensor for name, tensor in read_weights(tmp_path).items() if "sibo" in name}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {float(t) for name, t in tensors.items() if not name.endswith("gate")} == {float(torch.tensor(0.3))}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stored_in_bfloat16_load_into_an_fp32_lambda(saved, kind, tmp_path):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    case = saved[kind]
    model = PeftModel.from_pretrained(case.base(), with_weights(case.folder, tmp_path / "bf16", change))
    assert lambda_values(model) != case.lambdas  # they were rounded, in the file
    assert list(lambda_values(model).values()) == pytest.approx(list(case.lambdas.values()), rel=1e-2)


# --- the model card


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_card_tells_lambda_and_the_import_line(saved, kind):
    text = (saved[kind].folder / "README.md").read_text()
    assert "import sibo_triton" in text and "the library sibo-triton" in text
    assert "lambda: 0.3" in text if kind == "fixed" else "starting at 0.3" in text
    assert "initial residual: block_input" in text


def test_saving_twice_keeps_one_section_with_the_later_lambda(saved, tmp_path):
    for value in (0.3, 0.6, 0.6):
        get_peft_model(saved["fixed"].base(), sibo_config("fixed", sibo_lambda=value)).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("## SIBO-LoRA") == 1 and text.count("import sibo_triton") == 1
    assert "lambda: 0.6" in text and "lambda: 0.3" not in text


def test_what_the_user_wrote_around_the_section_stays(saved, tmp_path):
    model = PeftModel.from_pretrained(saved["fixed"].base(), saved["fixed"].folder)
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nmy own last words\n")
    before = card.read_text()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    text = card.read_text()
    assert text.count("my own last words") == 1 and text.count("## SIBO-LoRA") == 1
    assert text.split() == before.split()


def test_the_card_of_a_named_adapter_lies_in_its_folder(saved, tmp_path):
    model = get_peft_model(saved["fixed"].base(), sibo_config("fixed", sibo_lambda=0.25), adapter_name="mine")
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "lambda: 0.25" in text and text.count("## SIBO-LoRA") == 1
    plain = tmp_path / "plain" / "README.md"
    assert not plain.exists() or "sibo" not in plain.read_text().lower()


def test_the_card_keeps_its_metadata_readable(saved, tmp_path):
    config = sibo_config("fixed")
    config.save_pretrained(tmp_path)  # without a model: the card is new
    for folder in (tmp_path, saved["fixed"].folder):
        text = (folder / "README.md").read_text()
        assert text.startswith("---\n")
        assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "peft"


# --- lambda = 0


def test_lambda_0_loads_as_plain_lora(saved, tmp_path):
    config = SiboLoraConfig(r=4, target_modules=list(TARGETS), task_type="CAUSAL_LM", sibo_lambda=0)
    model = get_peft_model(saved["fixed"].base(), config).eval()
    make_up_weights(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(saved["fixed"].base(), tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    input_ids = saved["fixed"].input_ids
    assert torch.equal(logits_of(loaded, input_ids), logits_of(model, input_ids))

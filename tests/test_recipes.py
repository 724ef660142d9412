"""The recipes: where they are found, what they say, that each trains; the prompt and the labels that they make."""

import importlib.util
import json
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from instruction_data import ARITHMETIC, TRAINING, tokenizer, write_list
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sibo_triton import SiboAdapterConfig, SiboLoraConfig
from sibo_triton.cli import app
from sibo_triton.finetune.instructions import TEMPLATES, read_training_examples
from sibo_triton.finetune.options import FinetuneOptions, InputError
from sibo_triton.finetune.recipes import apply_recipe, load_recipe, recipe_folder, recipe_names
from sibo_triton.finetune.tokens import NO_LOSS, tokenize_examples
from sibo_triton.finetune.train import finetune

ROOT = Path(__file__).resolve().parents[1]
QUIET = Console(quiet=True)
runner = CliRunner()

LLAMA_LORA = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
GPTJ_LORA = {"q_proj", "k_proj", "v_proj", "fc_in", "fc_out"}
# By recipe: what gets an adapter, what of it mixes, lambda. From the authors' scripts and trainer.
SETTINGS = {
    "gptj-adapter-arithmetic": ({"fc_out"}, {"fc_out"}, 0.3),
    "gptj-adapter-commonsense": ({"fc_out"}, {"fc_out"}, 0.1),
    "gptj-lora-arithmetic": (GPTJ_LORA, {"fc_in"}, 0.1),
    "gptj-lora-commonsense": (GPTJ_LORA, {"fc_in"}, 0.3),
    "llama-adapter-arithmetic": ({"gate_proj", "up_proj"}, {"gate_proj", "up_proj"}, 0.1),
    "llama-adapter-commonsense": ({"gate_proj", "up_proj"}, {"gate_proj", "up_proj"}, 0.1),
    "llama-lora-arithmetic": (LLAMA_LORA, {"up_proj"}, 0.1),
    "llama-lora-commonsense": (LLAMA_LORA, {"up_proj"}, 0.1),
}


def options_of(name, recipe_bases, tmp_path, **changes):
    kind, _, task = name.split("-")
    path = write_list(tmp_path / f"{task}.json", TRAINING[task])
    given = {"max_steps": 3, "batch_size": 4} | changes
    options = FinetuneOptions(model=str(recipe_bases[kind]), data=path, output=tmp_path / "adapter", **given)
    return apply_recipe(load_recipe(name), options, given)


def test_the_recipes_are_those_of_the_authors():
    assert recipe_names() == sorted(SETTINGS)
    assert recipe_folder() == ROOT / "examples" / "recipes"


def test_the_readme_lists_the_recipes_and_their_lambdas():
    rows = re.findall(r"(?m)^\| `(\S+)`, `(\S+)` \| .* \| ([\d.]+), ([\d.]+) \|$", (ROOT / "README.md").read_text())
    listed = {name: float(value) for row in rows for name, value in zip(row[:2], row[2:], strict=True)}
    assert listed == {name: lambda_ for name, (_, _, lambda_) in SETTINGS.items()}


@pytest.mark.oldest
@pytest.mark.parametrize(
    "name", [of for of in SETTINGS if "arithmetic" in of]
)  # the others differ in no more than below
def test_each_recipe_trains_what_the_authors_train(name, recipe_bases, tmp_path):
    targets, mixing, lambda_ = SETTINGS[name]
    options = options_of(name, recipe_bases, tmp_path)
    result = finetune(options, QUIET)
    assert (result.steps, result.examples, result.dropped, result.diverged) == (3, 12, 0, False)
    assert result.dtype == "bfloat16"
    assert result.modules == 2 * len(targets)
    assert {module.rpartition(".")[2] for module in result.lambdas} == mixing
    assert len(result.lambdas) == 2 * len(mixing)
    assert list(result.lambdas.values()) == [pytest.approx(lambda_)] * len(result.lambdas)
    config = result.model.peft_config["default"]
    if "lora" in name:
        assert type(config) is SiboLoraConfig
        assert (config.r, config.lora_alpha, config.lora_dropout) == (32, 64, 0.05)
    else:
        assert type(config) is SiboAdapterConfig
        assert (config.bottleneck_size, config.activation, config.adapter_dropout) == (256, "tanh", 0.0)
        assert (config.placement, config.init_weights, config.scaling) == ("series", "bert", 1.0)
        assert config.side == ("output" if "gptj" in name else "input")
    report = (options.output / "report.md").read_text()
    assert f"| recipe | {name} (SIBO" in report and "loss on every token" in report
    assert "not used: column `answer`" in report


@pytest.mark.parametrize("name", SETTINGS)
def test_each_recipe_trains_and_generates_as_the_authors_do(name):
    recipe = load_recipe(name)
    expected = {"epochs": 3, "batch_size": 16, "learning_rate": 3e-4, "warmup_steps": 100, "max_length": 256}
    assert {key: recipe.options[key] for key in expected} == expected
    assert recipe.train_on_inputs and recipe.num_beams == 4
    assert recipe.max_new_tokens == (256 if "arithmetic" in name else 32)
    assert recipe.model_type == name.split("-")[0]


@pytest.mark.parametrize("name", [of for of in SETTINGS if "commonsense" in of])
def test_a_recipe_for_the_other_task_differs_in_data_answers_and_lambda(name):
    one, other = load_recipe(name), load_recipe(name.replace("commonsense", "arithmetic"))
    different = {key for key, value in vars(one).items() if value != vars(other)[key]} - {"options"}
    assert different == {"name", "description", "train_data", "test_data", "answers", "max_new_tokens"}
    assert one.options == {**other.options, "sibo_lambda": SETTINGS[name][2]}


# Prompt and labels


def test_the_prompts_to_the_last_space():
    template = TEMPLATES["llm-adapters"]
    head = "Below is an instruction that describes a task"
    ask = "Write a response that appropriately completes the request."
    tab = " " * 16
    assert template.for_training("Add {1}.", "") == (
        f"{head}. {ask}  \n\n{tab}### Instruction:\n{tab}Add {{1}}.\n{tab}\n{tab}### Response:\n{tab}"
    )
    assert template.for_generation("Add.", "") == (
        f"{head}. {ask} \n\n{tab}### Instruction:\n{tab}Add.\n\n{tab}### Response:\n{tab}"
    )
    head += ", paired with an input that provides further context"
    assert template.for_training("Add.", "1") == (
        f"{head}. {ask} \n\n{tab}### Instruction:\n{tab}Add.\n{tab}\n{tab}### Input:\n{tab}1\n{tab}\n"
        f"{tab}### Response:\n{tab}"
    )
    assert template.for_generation("Add.", "1") == (
        f"{head}. {ask}\n\n{tab}### Instruction:\n{tab}Add.\n\n{tab}### Input:\n{tab}1\n\n{tab}### Response:\n{tab}"
    )


@pytest.mark.parametrize("train_on_inputs", [True, False])
def test_the_loss_is_where_the_recipe_says(train_on_inputs, tmp_path):
    reader, template = tokenizer(), TEMPLATES["llm-adapters"]
    path = write_list(tmp_path / "d.json", ARITHMETIC[:2])
    examples = read_training_examples(path, template, train_on_inputs)
    assert examples.places == ["item 1", "item 2"] and examples.ignored == {"answer"}
    tokens = tokenize_examples(examples, reader, 256)
    row = ARITHMETIC[0]
    prompt = template.for_training(row["instruction"], "")
    assert reader.decode(tokens.input_ids[0]) == prompt + row["output"] + "</s>"
    learned = [i for i, label in zip(tokens.input_ids[0], tokens.labels[0], strict=True) if label != NO_LOSS]
    assert reader.decode(learned).strip() == ((prompt if train_on_inputs else "") + row["output"] + "</s>")


def test_a_long_example_loses_its_end_and_no_end_of_text_is_added(tmp_path):
    reader = tokenizer()
    path = write_list(tmp_path / "d.json", ARITHMETIC[:1])
    examples = read_training_examples(path, TEMPLATES["llm-adapters"], True)
    whole = tokenize_examples(examples, reader, 256).input_ids[0]
    for length in (len(whole), len(whole) - 1, len(whole) - 2):
        assert tokenize_examples(examples, reader, length).input_ids == [whole[:length]]


def test_instructions_are_read_from_lists_and_lines_alike(tmp_path):
    template = TEMPLATES["llm-adapters"]
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": ""}]
    as_list = read_training_examples(write_list(tmp_path / "a.json", rows), template, True)
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)))
    as_lines = read_training_examples(tmp_path / "b.json", template, True)
    assert as_list.rows == as_lines.rows == [(template.train.format(instruction="a") + "b",),
                                             (template.for_training("c", "d"),)]  # fmt: skip
    assert as_lines.places == ["line 1", "line 2"]
    assert as_list.notes == [f"{tmp_path / 'a.json'}: in 1 of 2 examples `output` is empty"]


BAD_ROWS = {
    "no instruction": ('[{"question": "a", "output": "b"}]', "item 1: has no column `instruction` (found: `question`,"),
    "no output": ('[{"instruction": "a"}]', "item 1: has no column `output`; it needs"),
    "number": (
        '[{"instruction": "a", "output": "b"}, {"instruction": 7, "output": "b"}]',
        "item 2, column `instruction`: expected a string, got int 7",
    ),
    "empty instruction": ('[{"instruction": "", "output": "b"}]', "item 1, column `instruction`: is empty"),
    "input": ('[{"instruction": "a", "input": [1], "output": "b"}]', "item 1, column `input`: expected a string"),
    "not JSON": ('[\n{"instruction": "a",}\n]', "line 2, character 21: is not JSON"),
    "no object": ('["a"]', "item 1: is a JSON str, not an object; it needs the columns `instruction`"),
    "nothing": ("[]", "holds no examples; it needs the columns `instruction` and `output`"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_instruction_data_is_refused_by_file_and_place(name, tmp_path):
    content, message = BAD_ROWS[name]
    path = tmp_path / "d.json"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_training_examples(path, TEMPLATES["llm-adapters"], True)
    assert str(error.value).startswith(str(path))


def test_an_empty_output_is_refused_where_there_would_be_no_loss(tmp_path):
    path = write_list(tmp_path / "d.json", [{"instruction": "a", "output": ""}])
    with pytest.raises(InputError, match="item 1, column `output`: is empty"):
        read_training_examples(path, TEMPLATES["llm-adapters"], False)


# Files, names, overriding


def test_what_is_given_replaces_the_recipe(recipe_bases, tmp_path):
    options = options_of("llama-lora-arithmetic", recipe_bases, tmp_path, rank=4, sibo_lambda=0.5, dtype="float32")
    assert (options.rank, options.alpha, options.sibo_lambda, options.dtype) == (4, 64, 0.5, "float32")
    assert (options.max_steps, options.batch_size, options.learning_rate) == (3, 4, 3e-4)


def test_the_plain_method_is_the_recipe_without_the_mix(recipe_bases, tmp_path):
    options = options_of("llama-lora-arithmetic", recipe_bases, tmp_path, method="lora")
    assert (options.rank, options.sibo_lambda, options.sibo_target_modules) == (32, None, None)
    result = finetune(options, QUIET)
    assert (result.modules, result.mixing_modules) == (10, 0)
    with pytest.raises(InputError, match="--method adapter: the recipe llama-lora-arithmetic is for sibo-lora"):
        options_of("llama-lora-arithmetic", recipe_bases, tmp_path, method="adapter")


def test_a_model_of_another_family_is_told_or_refused(recipe_bases, tmp_path):
    options = options_of("llama-lora-arithmetic", recipe_bases, tmp_path)
    with pytest.raises(InputError, match="the model has no module `up_proj`; choose among"):
        finetune(replace(options, model=str(recipe_bases["gptj"])), QUIET)
    options = replace(
        options, model=str(recipe_bases["gptj"]), target_modules=("q_proj",), sibo_target_modules=("q_proj",)
    )
    result = finetune(options, QUIET)
    assert "the recipe llama-lora-arithmetic is for llama models, this is a gptj" in result.notes


GOOD = (ROOT / "examples/recipes/llama-lora-arithmetic.toml").read_text()
BAD_RECIPES = {
    "not TOML": (GOOD + "\n[x", "cannot be read as TOML"),
    "unknown": (GOOD.replace("rank = 32", "ranks = 32"), "[adapter] ranks: there is no such setting; choose among"),
    "unknown table": (GOOD + "\n[data]\nx = 1\n", "data: there is no such setting"),
    "type": (GOOD.replace("rank = 32", 'rank = "32"'), "[adapter] rank is '32': expected int"),
    "bool": (GOOD.replace("rank = 32", "rank = true"), "[adapter] rank is True: expected int"),
    "list": (GOOD.replace('["up_proj"]', '"up_proj"'), "sibo_target_modules is 'up_proj': expected a list of strings"),
    "missing": (GOOD.replace("num_beams = 4\n", ""), "[evaluation] num_beams: is missing"),
    "template": (
        GOOD.replace('"llm-adapters"', '"alpaca"'),
        "[prompt] template is 'alpaca': choose one of llm-adapters",
    ),
    "answers": (GOOD.replace('"letter"', '"words"'), "[evaluation] answers is 'words': choose one of number, letter"),
    "beams": (GOOD.replace("num_beams = 4", "num_beams = 0"), "[evaluation] num_beams is 0: it must be at least 1"),
    "no table": (
        "adapter = 3\n" + GOOD.replace("[adapter]", "[training]", 1).split("[training]")[0],
        "write it as a table",
    ),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_recipe_with_a_mistake_is_refused_by_file_and_key(name, tmp_path):
    content, message = BAD_RECIPES[name]
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_recipe(str(path))
    assert str(error.value).startswith(f"--recipe {path}")


def test_a_recipe_of_ones_own_and_names_that_are_none(tmp_path):
    (tmp_path / "mine.toml").write_text(GOOD.replace("rank = 32", "rank = 8"))
    recipe = load_recipe(str(tmp_path / "mine.toml"))
    assert (recipe.name, recipe.options["rank"]) == ("mine", 8)
    with pytest.raises(InputError, match="--recipe bloom: there is no such recipe; choose one of gptj-adapter-arith"):
        load_recipe("bloom")
    with pytest.raises(InputError, match="there is no such file"):
        load_recipe(str(tmp_path / "other.toml"))


def test_the_commands_take_a_recipe(recipe_bases, tmp_path):
    path = write_list(tmp_path / "d.json", ARITHMETIC)
    arguments = ["--model", str(recipe_bases["llama"]), "--data", str(path), "--output", str(tmp_path / "out")]
    steps = ["--max-steps", "1", "--batch-size", "2", "--epochs", "3"]
    recipe = ["--recipe", "llama-lora-arithmetic", "--alpha", "16"]
    result = runner.invoke(app, ["finetune", *arguments, *steps, *recipe])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["sibo_target_modules"]) == (32, 16, ["up_proj"])
    assert "batch 2 x 1, at most 256 tokens" in (tmp_path / "out/report.md").read_text()
    refused = runner.invoke(app, ["finetune", *arguments, "--recipe", "none"])
    assert refused.exit_code == 2 and "--recipe none: there is no such recipe" in refused.stderr
    listed = runner.invoke(app, ["recipes"])
    assert all(name in listed.stdout for name in SETTINGS)


def test_the_wheel_holds_the_recipes_and_finds_them(wheel, tmp_path, monkeypatch):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for path in (ROOT / "examples/recipes").glob("*.toml"):
        assert (tmp_path / "sibo_triton/recipes" / path.name).read_bytes() == path.read_bytes()
    spec = importlib.util.spec_from_file_location("of_the_wheel", tmp_path / "sibo_triton/finetune/recipes.py")
    recipes = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "of_the_wheel", recipes)
    spec.loader.exec_module(recipes)
    assert recipes.recipe_folder().is_relative_to(tmp_path)
    assert [recipes.load_recipe(name).name for name in recipes.recipe_names()] == sorted(SETTINGS)


def test_a_fresh_adapter_of_the_authors_start_is_not_the_base_model(recipe_bases, tmp_path):
    """Their small normal in both projections, where ours by default starts as the base model."""
    options = options_of("llama-adapter-arithmetic", recipe_bases, tmp_path)
    from sibo_triton.finetune.model import add_adapter

    for init, is_base in (("bert", False), ("zero", True)):
        base = AutoModelForCausalLM.from_pretrained(recipe_bases["llama"])
        ids = tokenizer()("Add 1.", return_tensors="pt")["input_ids"]
        before = base(ids).logits
        model, _ = add_adapter(base, replace(options, init_weights=init))
        assert bool((model.eval()(ids).logits == before).all()) is is_base

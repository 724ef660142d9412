"""`sibo-triton evaluate`: batched generation equals one prompt at a time, the counts, the files, what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from instruction_data import ARITHMETIC, COMMONSENSE, LETTERS, OPTIONS, QUESTIONS, TRAINING, write_list
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sibo_triton.cli import app
from sibo_triton.finetune import evaluate as evaluate_module
from sibo_triton.finetune.evaluate import EvaluateOptions, run_evaluation
from sibo_triton.finetune.instructions import TEMPLATES
from sibo_triton.finetune.options import FinetuneOptions, InputError
from sibo_triton.finetune.recipes import apply_recipe, load_recipe, recipe_names
from sibo_triton.finetune.train import finetune

QUIET = Console(quiet=True)
runner = CliRunner()


@pytest.fixture(scope="module")
def adapters(recipe_bases, tmp_path_factory):
    """The adapter folder that each recipe makes in three steps with a high rate, by recipe; made when asked for."""
    folder = tmp_path_factory.mktemp("adapters")

    def adapter_of(name):
        if not (folder / name).exists():
            kind, _, task = name.split("-")
            path = write_list(folder / f"{name}.json", TRAINING[task])
            given = {"max_steps": 3, "warmup_steps": 0, "learning_rate": 0.01, "batch_size": 4, "dtype": "float32"}
            options = FinetuneOptions(model=str(recipe_bases[kind]), data=path, output=folder / name, **given)
            finetune(apply_recipe(load_recipe(name), options, given), QUIET)
        return folder / name

    return adapter_of


def options_of(name, recipe_bases, tmp_path, **changes):
    kind, _, task = name.split("-")
    data = tuple(write_list(tmp_path / f"{i}.json", rows[:6]) for i, rows in enumerate(QUESTIONS[task]))
    settings = {"max_new_tokens": 4, "batch_size": 4, "dtype": "float32"} | changes
    return EvaluateOptions(load_recipe(name), str(recipe_bases[kind]), data, tmp_path / "evaluation", **settings)


def predictions(options):
    return [json.loads(line) for line in (options.output / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(of, marks=pytest.mark.oldest) for of in recipe_names() if "arithmetic" in of),
        "llama-lora-commonsense",  # whose answers are of other kinds
    ],
)
def test_what_a_recipe_trained_is_evaluated(name, recipe_bases, adapters, tmp_path):
    """Responses are those of a loop over single prompts, without padding, and the report counts them."""
    options = options_of(name, recipe_bases, tmp_path, adapter=adapters(name))
    scores = run_evaluation(options, QUIET)
    lines = predictions(options)
    assert [(s.questions, s.answers) for s in scores] == (
        [(6, "number"), (4, "letter")] if "arithmetic" in name else [(6, "boolean"), (4, "option")]
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(options.adapter)).eval()
    rows = [row for rows in QUESTIONS[name.split("-")[2]] for row in rows[:6]]
    responses = []
    for row, line in zip(rows, lines, strict=True):
        prompt = TEMPLATES["llm-adapters"].for_generation(row["instruction"], "")
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, num_beams=4, do_sample=False, max_new_tokens=4, pad_token_id=0)
        responses.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        assert line["answer"] == row["answer"]
    assert [line["response"] for line in lines] == responses and len(set(responses)) > 1
    report = json.loads((options.output / "evaluation.json").read_text())
    assert report["recipe"] == name and report["num_beams"] == 4 and report["adapter"] == str(options.adapter)
    for score, entry in zip(scores, report["results"], strict=True):
        mine = [line for line in lines if line["data"] == entry["data"]]
        assert entry["right"] == score.right == sum(line["right"] for line in mine)
        assert entry["without_answer"] == sum(line["prediction"] is None for line in mine)


def test_an_adapter_changes_the_responses(recipe_bases, adapters, tmp_path):
    name = "llama-lora-commonsense"
    options = options_of(name, recipe_bases, tmp_path)
    run_evaluation(options, QUIET)
    base = [line["response"] for line in predictions(options)]
    run_evaluation(replace(options, adapter=adapters(name), overwrite=True), QUIET)
    assert [line["response"] for line in predictions(options)] != base


def test_right_wrong_and_missing_answers_are_counted(recipe_bases, tmp_path, monkeypatch):
    """With responses written by hand: the counts, the report, the table."""
    options = options_of("llama-lora-arithmetic", recipe_bases, tmp_path)
    said = iter(
        [*(f"so the answer is {row['answer']}" for row in ARITHMETIC[:4]), "3 of 99", "no idea"]
        + ["the answer is (A)", "it is B, not A", "c", "The end"]
    )
    monkeypatch.setattr(evaluate_module, "_responses", lambda model, tokenizer, ids, options: (next(said) for _ in ids))
    console = Console(record=True, width=100, file=(tmp_path / "terminal").open("w"))
    numbers, letters = run_evaluation(options, console)
    assert (numbers.questions, numbers.right, numbers.without_answer) == (6, 4, 1)
    assert (letters.questions, letters.right, letters.without_answer) == (4, 1, 2)
    report = json.loads((options.output / "evaluation.json").read_text())
    assert [entry["accuracy"] for entry in report["results"]] == [pytest.approx(4 / 6), 0.25]
    assert report["mean_accuracy"] == pytest.approx((4 / 6 + 0.25) / 2)
    assert "torch" in report["provenance"]
    table = (options.output / "evaluation.md").read_text()
    assert f"| {options.data[0]} | number | 6 | 4 | 66.7% | 1 |" in table
    assert "| mean of the files |  |  |  | 45.8% |  |" in table
    assert "66.7%" in console.export_text()
    assert predictions(options)[4] == {
        "data": str(options.data[0]), "place": "item 5", "answer": ARITHMETIC[4]["answer"], "prediction": "99",
        "right": False, "response": "3 of 99",
    }  # fmt: skip


def test_the_recipes_settings_hold_unless_others_are_given(recipe_bases, tmp_path):
    options = options_of("llama-lora-commonsense", recipe_bases, tmp_path, max_new_tokens=None, dtype=None)
    resolved = options.resolved()
    assert (resolved.max_new_tokens, resolved.num_beams, resolved.dtype) == (32, 4, "bfloat16")
    resolved = replace(options, num_beams=1, max_new_tokens=5, dtype="auto").resolved()
    assert (resolved.max_new_tokens, resolved.num_beams, resolved.dtype) == (5, 1, "auto")


REFUSED = {
    "task": (
        "llama-lora-arithmetic",
        COMMONSENSE,
        {},
        "item 1, column `answer` is 'false': the recipe llama-lora-arith",
    ),
    "no kind": ("llama-lora-arithmetic", [*ARITHMETIC[:1], {**ARITHMETIC[1], "answer": "four"}], {}, "item 2, column"),
    "two kinds": (
        "llama-lora-commonsense",
        [*OPTIONS, *COMMONSENSE],
        {},
        "of the kind boolean, where the file's first is of the kind option",
    ),
    "no answer": ("llama-lora-arithmetic", [{"instruction": "a"}], {}, "item 1: has no column `answer`"),
    "null": (
        "llama-lora-arithmetic",
        [{"instruction": "a", "answer": None}],
        {},
        "expected a string or a number, got None",
    ),
    "nothing": ("llama-lora-arithmetic", [], {}, "holds no questions"),
    "batch": ("llama-lora-arithmetic", LETTERS, {"batch_size": 0}, "--batch-size is 0: it must be at least 1"),
    "limit": ("llama-lora-arithmetic", LETTERS, {"limit": 0}, "--limit is 0"),
    "dtype": ("llama-lora-arithmetic", LETTERS, {"dtype": "int8"}, "--dtype is 'int8': choose one of"),
    "length": ("llama-lora-arithmetic", LETTERS, {"max_new_tokens": 500}, "item 1: the prompt's"),
    "no adapter": (
        "llama-lora-arithmetic",
        LETTERS,
        {"adapter": "base"},
        "holds no adapter_config.json: give the folder",
    ),
    "other adapter": ("llama-lora-arithmetic", LETTERS, {"adapter": "gptj"}, "does not load on"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(case, recipe_bases, adapters, tmp_path):
    name, rows, changes, message = REFUSED[case]
    if "adapter" in changes:
        folders = {"base": lambda: recipe_bases["llama"], "gptj": lambda: adapters("gptj-lora-arithmetic")}
        changes = {"adapter": folders[changes["adapter"]]()}
    options = replace(
        options_of(name, recipe_bases, tmp_path, **changes), data=(write_list(tmp_path / "d.json", rows),)
    )
    with pytest.raises(InputError, match=re.escape(message)) as error:
        run_evaluation(options, QUIET)
    assert "\n" not in str(error.value)
    assert not options.output.exists()


def test_nothing_is_lost_in_the_output_folder(recipe_bases, tmp_path):
    options = options_of("llama-lora-arithmetic", recipe_bases, tmp_path, limit=1)
    options.output.mkdir()
    (options.output / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is not empty: name another folder, or pass --overwrite"):
        run_evaluation(options, QUIET)
    run_evaluation(replace(options, overwrite=True), QUIET)
    assert (options.output / "mine.txt").read_text() == "keep"
    with pytest.raises(InputError, match="is given twice"):
        run_evaluation(replace(options, overwrite=True, data=options.data[:1] * 2), QUIET)


def test_the_command_evaluates_and_an_interrupted_run_keeps_its_predictions(
    recipe_bases, adapters, tmp_path, monkeypatch
):
    name = "llama-adapter-arithmetic"
    data = write_list(tmp_path / "test.json", ARITHMETIC)
    arguments = ["evaluate", "--recipe", name, "--model", str(recipe_bases["llama"]), "--adapter", str(adapters(name))]
    arguments += ["--data", str(data), "--limit", "3", "--max-new-tokens", "3", "--batch-size", "2"]
    result = runner.invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert f"predictions and report: {tmp_path / 'out'}" in result.stdout
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (report["results"][0]["questions"], report["limit"], report["dtype"]) == (3, 3, "bfloat16")

    kept = []

    def two_and_stop(model, tokenizer, ids, options):
        yield "1"
        kept.append((tmp_path / "stopped/predictions.jsonl").read_text())
        yield "2"
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "_responses", two_and_stop)
    result = runner.invoke(app, [*arguments, "--output", str(tmp_path / "stopped")])
    assert result.exit_code == 130
    assert json.loads(kept[0])["response"] == "1", "a process that is killed keeps what it has"
    assert len((tmp_path / "stopped/predictions.jsonl").read_text().splitlines()) == 2
    result = runner.invoke(app, [*arguments, "--output", str(data)])
    assert result.exit_code == 2 and result.stderr.strip().splitlines()[-1].startswith("error: --output")

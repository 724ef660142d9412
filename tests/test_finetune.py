"""`sibo_triton.finetune`: reading data, labels, what is measured, a run from files to a reloaded adapter, the demo."""

import csv
import json
import os
import re
import shutil
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig, PeftModel
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import sibo_triton
from sibo_triton.finetune import demo, plots
from sibo_triton.finetune import model as finetune_model
from sibo_triton.finetune import train as finetune_train
from sibo_triton.finetune.data import Examples, read_examples
from sibo_triton.finetune.demo import task as demo_task
from sibo_triton.finetune.options import CHECKPOINTS, FinetuneOptions, InputError
from sibo_triton.finetune.progress import ProgressAndLog
from sibo_triton.finetune.tokens import NO_LOSS, completion_collator, tokenize_examples
from sibo_triton.finetune.train import finetune
from sibo_triton.saved_activations import saved_activation_bytes

QUIET = Console(quiet=True)
TINY = demo_task.Scale(layers=2, hidden=16, intermediate=24, heads=2, batch=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny Llama with a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = demo_task.build_tokenizer()
    demo_task.build_base(TINY, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A JSONL file of 24 subtractions."""
    path = tmp_path_factory.mktemp("data") / "subtractions.jsonl"
    write_jsonl(path, [{"prompt": p.prompt, "completion": p.completion} for p in demo_task.subtractions(0)[0][:24]])
    return path


@pytest.fixture
def options(base, data, tmp_path):
    return FinetuneOptions(
        model=str(base), data=data, output=tmp_path / "adapter", max_steps=4, batch_size=8, learning_rate=1e-2, rank=4
    )


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(*vocabulary, eos="<eos>"):
    """A tokenizer of whole words, so that "ab" + "cd" is another token than "ab" and "cd"."""
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos, unk_token="<unk>")


# Reading


def test_the_three_kinds_of_file_read_alike(tmp_path):
    rows = [
        {"prompt": "a, b", "completion": 'say "x"', "source": "1"},
        {"prompt": "", "completion": "two\nlines ü", "source": "2"},
    ]
    jsonl = write_jsonl(tmp_path / "d.jsonl", rows)
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8-sig") as file:  # as Excel writes it
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for path in (jsonl, tmp_path / "d.csv", tmp_path / "d.parquet"):
        examples = read_examples(path)
        assert examples.columns == ("prompt", "completion")
        assert examples.rows == [(row["prompt"], row["completion"]) for row in rows]
        assert examples.ignored == {"source"}
    assert read_examples(tmp_path / "d.csv").places == ["line 2", "line 3"]


def test_blank_lines_are_no_examples_and_keep_the_count_of_lines(tmp_path):
    (tmp_path / "d.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    assert read_examples(tmp_path / "d.jsonl").places == ["line 2", "line 4"]
    (tmp_path / "d.csv").write_text('text\n"a\nb"\n\nc\n')
    examples = read_examples(tmp_path / "d.csv")
    assert (examples.rows, examples.places) == ([("a\nb",), ("c",)], ["line 2", "line 5"])


BAD_FILES = {
    "not JSON": (b'{"text": "a"}\n{"text": }\n', "jsonl", "line 2, character 10: is not JSON"),
    "JSON list": (b'[{"text": "a"}]', "json", "line 1: is one JSON list; write one object per line"),
    "no object": (b'{"text": "a"}\n"b"\n', "jsonl", "line 2: is a JSON str, not an object"),
    "no column": (b'{"body": "a", "id": 1}', "jsonl", "line 1: no column to train on (found: `body`, `id`)"),
    "half a pair": (b'{"prompt": "a"}', "jsonl", "line 1: has a column `prompt` but no column `completion`"),
    "both kinds": (b'{"text": "a", "prompt": "b", "completion": "c"}', "jsonl", "has the columns `text`, `prompt`"),
    "column lost": (b'{"text": "a"}\n{"txt": "b"}\n', "jsonl", "line 2, column `text`: missing"),
    "number": (b'{"text": "a"}\n{"text": 7}\n', "jsonl", "line 2, column `text`: expected a string, got int 7"),
    "null": (b'{"text": null}', "jsonl", "line 1, column `text`: expected a string, got NoneType"),
    "chat": (
        b'{"prompt": [{"role": "user"}], "completion": "b"}',
        "jsonl",
        "column `prompt`: expected a string, got a",
    ),
    "empty": (b'{"prompt": "a", "completion": ""}', "jsonl", "line 1, column `completion`: is empty"),
    "surrogate": (b'{"text": "a\\ud800"}', "jsonl", "line 1, column `text`: holds half of a surrogate pair"),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xe9"}\n', "jsonl", "line 2: is not UTF-8"),
    "nothing": (b"\n", "jsonl", "holds no examples; it needs a column `text`"),
    "CSV header only": (b"text\n", "csv", "holds no examples"),
    "CSV field too many": (b"prompt,completion\na,b\nc,d,e\n", "csv", "line 3: has 3 fields where the header names 2"),
    "CSV doubled": (b"text,text\na,b\n", "csv", "line 1: the column `text` stands there twice"),
    "CSV quote": (b'text\n"a\n', "csv", "line 2: is not CSV"),
    "CSV not UTF-8": (b"text\na\n\xe9\n", "csv", "line 3: is not UTF-8"),
    "Parquet": (b"PAR1 no", "parquet", "cannot be read as Parquet"),
    "kind": (b"a", "txt", "is of kind '.txt'; give a file that ends in .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_file_line_and_column(name, tmp_path):
    content, kind, message = BAD_FILES[name]
    path = tmp_path / f"data.{kind}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_examples(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


# Tokens and labels


def test_labels_are_the_completion_and_the_end():
    tokenizer = demo_task.build_tokenizer()
    examples = Examples("f", ("prompt", "completion"), [("32-11=", "120")], ["line 1"])
    tokens = tokenize_examples(examples, tokenizer, max_length=32)
    ids = tokenizer("32-11=120<eos>")["input_ids"]
    assert tokens.input_ids == [ids]
    assert tokens.labels == [[NO_LOSS] * 6 + ids[6:]]
    assert (tokens.truncated, tokens.dropped, tokens.split_apart) == (0, [], 0)


def test_text_has_loss_everywhere_and_one_end():
    tokenizer = demo_task.build_tokenizer()
    examples = Examples("f", ("text",), [("1+2",), ("1<eos>",)], ["line 1", "line 2"])
    tokens = tokenize_examples(examples, tokenizer, max_length=32)
    assert tokens.labels == tokens.input_ids == [tokenizer(t)["input_ids"] for t in ("1+2<eos>", "1<eos>")]


def test_a_token_across_the_boundary_is_split_where_generation_would_split_it():
    tokenizer = words("ab", "cd", "abcd", "x")
    rows = [("ab", "cd"), ("ab", " cd")]
    tokens = tokenize_examples(Examples("f", ("prompt", "completion"), rows, ["line 1", "line 2"]), tokenizer, 32)
    ab, cd, end = (tokenizer.convert_tokens_to_ids(token) for token in ("ab", "cd", "<eos>"))
    assert tokens.input_ids == [[ab, cd, end]] * 2  # and not "abcd"
    assert tokens.labels == [[NO_LOSS, cd, end]] * 2
    assert tokens.split_apart == 1


def test_cut_examples_are_counted_and_those_with_nothing_left_to_learn_are_left_out():
    tokenizer = demo_task.build_tokenizer()
    rows = [("1+1=", "200"), ("1+", "2345678"), ("11111111", "2")]
    places = ["line 1", "line 2", "line 3"]
    tokens = tokenize_examples(Examples("f", ("prompt", "completion"), rows, places), tokenizer, max_length=8)
    assert [len(ids) for ids in tokens.input_ids] == [8, 8]
    assert (tokens.truncated, tokens.dropped) == (1, ["line 3"])
    with pytest.raises(InputError, match="no example is left: in all 3 the prompt alone fills --max-length 2"):
        tokenize_examples(Examples("f", ("prompt", "completion"), rows, places), tokenizer, max_length=2)


def test_an_example_without_anything_to_predict_is_refused():
    tokenizer = words("a", eos=None)
    with pytest.raises(InputError, match="f, line 1: its 1 token"):
        tokenize_examples(Examples("f", ("text",), [("a",)], ["line 1"]), tokenizer, 8)


def no_token_to_pad_with():
    tokenizer = Tokenizer(models.WordLevel({"a": 7, "b": 8, "c": 9}))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def left_and_no_mask():
    tokenizer = words("a")
    tokenizer.padding_side, tokenizer.model_input_names = "left", ["input_ids"]
    return tokenizer


@pytest.mark.parametrize(("make", "pad"), [(lambda: words("a"), 0), (no_token_to_pad_with, 7), (left_and_no_mask, 0)])
def test_padding_is_masked_and_carries_no_loss(make, pad):
    tokenizer = make()
    before = (tokenizer.pad_token, tokenizer.padding_side, list(tokenizer.model_input_names))
    batch = completion_collator(tokenizer, "m")(
        [{"input_ids": [3, 4], "labels": [NO_LOSS, 4]}, {"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    )
    assert (tokenizer.pad_token, tokenizer.padding_side, list(tokenizer.model_input_names)) == before
    assert batch["input_ids"].tolist() == [[3, 4, pad], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[NO_LOSS, 4, NO_LOSS], [3, 4, 5]]


# Saved activations


def test_saved_bytes_of_a_case_counted_by_hand():
    x = torch.randn(4, 8, requires_grad=True)
    model = torch.nn.Linear(8, 3, bias=False)
    # The linear saves x (4 * 8 floats) and its weight, the model's own; relu saves its result (4 * 3), sum nothing.
    expected = (4 * 8 + 4 * 3) * 4
    assert saved_activation_bytes(model, lambda: model(x).relu().sum()) == expected


def test_a_storage_counts_once_and_whole():
    x = torch.randn(4, 8, requires_grad=True)
    none = torch.nn.Identity()
    whole = 4 * 8 * 4
    assert saved_activation_bytes(none, lambda: x.square().sum() + x.T.square().sum() + x[:1].square().sum()) == whole
    assert saved_activation_bytes(none, lambda: x[:1].square().sum()) == whole
    assert saved_activation_bytes(none, lambda: (x + 1).sum()) == 0
    with torch.no_grad():
        assert saved_activation_bytes(none, lambda: x.square().sum()) == 0


def test_saved_bytes_under_checkpointing_are_the_input():
    x = torch.randn(4, 8, requires_grad=True)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    plain = saved_activation_bytes(model, lambda: model(x).sum())
    assert plain == (4 * 8 + 4 * 64) * 4  # x, and the tanh's result, which the second linear saves too
    assert saved_activation_bytes(model, lambda: checkpoint(model, x, use_reentrant=False).sum()) == 4 * 8 * 4


# A run


def logits_of(model):
    ids = torch.tensor([[5, 6, 14, 7, 8, 15], [6, 5, 13, 9, 4, 15]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.oldest
@pytest.mark.parametrize("method", ["lora", "sibo-lora", "learnable", "adapter", "sibo-adapter"])
def test_the_adapter_folder_reloads_to_equal_logits(method, options, base):
    learnable = method == "learnable"
    options = replace(options, method="sibo-lora" if learnable else method, sibo_learnable=learnable)
    if "adapter" in method:
        options = replace(options, rank=None, bottleneck_size=4, placement="parallel")
    result = finetune(options, QUIET)
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), options.output)
    assert torch.equal(logits_of(reloaded), logits_of(result.model))
    assert not torch.equal(logits_of(reloaded), logits_of(AutoModelForCausalLM.from_pretrained(base)))
    assert ("import sibo_triton" in (options.output / "report.md").read_text()) is (method != "lora")
    classes = {"lora": LoraConfig, "adapter": sibo_triton.SiboAdapterConfig}
    classes |= {"sibo-adapter": sibo_triton.SiboAdapterConfig}
    config = reloaded.peft_config["default"]
    assert type(config) is classes.get(method, sibo_triton.SiboLoraConfig)
    assert getattr(config, "mixes", False) is (method not in ("lora", "adapter"))


def test_what_a_run_with_an_adapter_says(options):
    result = finetune(replace(options, method="sibo-adapter", rank=None, bottleneck_size=4, max_steps=3), QUIET)
    # gate and up projection of two layers, down [4, 16] and up [16, 4] each; all mix.
    assert (result.modules, result.mixing_modules, result.trainable_parameters) == (4, 4, 4 * 2 * 4 * 16)
    assert set(result.lambdas) == {f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up")}
    report = (options.output / "report.md").read_text()
    assert (
        "| method | sibo-adapter, bottleneck 4, tanh, in series, initialised as zero, dropout 0.05, lambda 0.1 |"
        in report
    )
    assert "- target modules: the feed-forward linears that read the residual stream" in report


def test_the_base_similarity_is_that_of_the_model_without_an_adapter(options):
    adapter = {"method": "sibo-adapter", "rank": None, "bottleneck_size": 4, "max_steps": 1}
    of_zero, of_bert = (
        finetune(replace(options, **adapter, init_weights=init, output=options.output / str(init)), QUIET)
        for init in (None, "bert")
    )
    assert of_bert.base_similarity == of_zero.base_similarity


def test_what_a_run_says_and_writes(options):
    result = finetune(replace(options, eval_fraction=0.25, max_steps=6), QUIET)
    assert (result.examples, result.eval_examples, result.steps, result.warmup_steps) == (18, 6, 6, 0)
    # q_proj and v_proj (PEFT's default for Llama) of two layers, A [4, 16] and B [16, 4] each; both mix.
    assert (result.modules, result.mixing_modules) == (4, 4)
    assert result.trainable_parameters == 4 * 2 * 4 * 16
    assert result.lambdas == {
        f"model.layers.{layer}.self_attn.{name}": pytest.approx(0.1)
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    }
    assert len(result.similarity) == len(result.base_similarity) == 3
    assert result.similarity[0] == pytest.approx(result.base_similarity[0])
    assert result.similarity[1:] != pytest.approx(result.base_similarity[1:])
    assert result.losses()[-1][1] < result.losses()[0][1]

    with (options.output / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["loss"]] == ["1", "2", "3", "4", "5", "6"]
    assert [row["step"] for row in rows if row["eval_loss"]] == ["0", "1", "2", "3", "4", "5", "6"]
    report = (options.output / "report.md").read_text()
    for line in (
        "# Fine-tuning report: sibo-lora",
        "| optimizer steps | 6 |",
        "| examples | 18, 6 held out |",
        "| modules with an adapter | 4, of which 4 mix |",
        "| method | sibo-lora, rank 4, alpha 8, dropout 0.05, lambda 0.1 |",
        "- target modules: PEFT's default for llama, q_proj, v_proj",
        "import sibo_triton",
        f"| 2 | {result.base_similarity[2]:.3f} | {result.similarity[2]:.3f} |",
        f"{result.losses('eval_loss')[0][1]:.4f} → {result.losses('eval_loss')[-1][1]:.4f}",
    ):
        assert line in report
    assert (options.output / "adapter_model.safetensors").is_file()


def test_plots_where_matplotlib_is_installed_and_a_word_where_not(options, monkeypatch):
    pytest.importorskip("matplotlib")
    finetune(options, QUIET)
    report = (options.output / "report.md").read_text()
    for name in ("loss.png", "similarity.png"):
        assert f"]({name})" in report
        assert (options.output / name).read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    without = replace(options, output=options.output.parent / "without")
    finetune(without, QUIET)
    report = (without.output / "report.md").read_text()
    assert "pip install 'sibo-triton[viz]'" in report and ".png" not in report
    assert not list(without.output.glob("*.png"))


def test_equal_seeds_give_equal_runs_and_lambda_0_is_plain_lora(options):
    def log(name, **changes):
        return finetune(replace(options, output=options.output / name, **changes), QUIET).losses()

    plain = log("lora", method="lora")
    assert log("again", method="lora") == plain
    assert log("zero", sibo_lambda=0.0) == plain
    assert log("sibo") != plain
    assert log("seed", method="lora", seed=1) != plain


def test_gradient_checkpointing_changes_memory_and_not_the_result(options):
    plain = finetune(replace(options, dropout=0.0), QUIET)
    less = finetune(replace(options, dropout=0.0, gradient_checkpointing=True, output=options.output / "gc"), QUIET)
    assert [loss for _, loss in less.losses()] == pytest.approx([loss for _, loss in plain.losses()], abs=1e-5)
    assert less.saved_activation_bytes < plain.saved_activation_bytes / 2


def test_a_learnable_lambda_learns_and_is_reported(options):
    result = finetune(replace(options, sibo_learnable=True, learning_rate=0.1), QUIET)
    assert all(value != pytest.approx(0.1, abs=1e-4) for value in result.lambdas.values())
    report = (options.output / "report.md").read_text()
    for name, value in result.lambdas.items():
        assert f"| {name} | {value:.4f} |" in report


def test_an_architecture_that_peft_does_not_know_gets_all_linears_and_is_told(options, monkeypatch):
    monkeypatch.setattr(finetune_model, "PEFT_DEFAULTS", {})
    result = finetune(replace(options, method="lora", max_steps=1), QUIET)
    assert result.modules == 14
    assert any("PEFT has no default for llama" in note and "all-linear" in note for note in result.notes)


def test_cut_and_left_out_examples_are_told(options, tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+", "completion": "2" * 20}]
    rows += [{"prompt": "1" * 10, "completion": "2", "id": 7}]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    result = finetune(replace(options, data=path, max_length=8, max_steps=1), QUIET)
    assert (result.examples, result.truncated, result.dropped) == (2, 1, 1)
    report = (options.output / "report.md").read_text()
    assert "1 of 3 examples cut to 8 tokens" in report
    assert "LEFT OUT 1 of 3 examples (line 3)" in report
    assert "not used: column `id`" in report


def test_an_interrupted_run_saves_what_it_has(options, base, monkeypatch):
    normal = ProgressAndLog.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        normal(self, args, state, control, **kwargs)
        if state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressAndLog, "on_step_end", interrupt)
    result = finetune(options, QUIET)
    assert (result.interrupted, result.steps) == (True, 2)
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), options.output)
    assert torch.equal(logits_of(reloaded), logits_of(result.model))
    assert "Interrupted after step 2 of 4" in (options.output / "report.md").read_text()


def test_an_earlier_run_is_replaced_only_on_request_and_only_in_the_end(options, monkeypatch):
    finetune(options, QUIET)
    weights = options.output / "adapter_model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(InputError, match="is not empty: name another folder, or pass --overwrite"):
        finetune(options, QUIET)
    again = replace(options, overwrite=True, seed=1)

    def fails(self, *args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(finetune_train.Trainer, "train", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            finetune(again, QUIET)
    assert weights.read_bytes() == before
    mine = [options.output / "mine.txt", options.output / CHECKPOINTS / "checkpoint-notes.txt"]
    for file in mine:
        file.write_text("keep")
    of_trainer = [options.output / CHECKPOINTS / f"checkpoint-{step}" for step in (998, 999)]
    of_trainer[0].mkdir()
    elsewhere = options.data.parent / "elsewhere"
    elsewhere.mkdir()
    of_trainer[1].symlink_to(elsewhere)
    (options.output / CHECKPOINTS / "checkpoint-best").mkdir()
    finetune(again, QUIET)
    assert not any(map(os.path.lexists, of_trainer)) and elsewhere.exists()
    assert (options.output / CHECKPOINTS / "checkpoint-best").exists()
    assert weights.read_bytes() != before
    assert [file.read_text() for file in mine] == ["keep", "keep"]


@pytest.mark.parametrize("name", ["model", "data", "eval_data"])
def test_what_lies_among_the_checkpoints_is_not_removed(name, options):
    finetune(options, QUIET)
    path = options.output / CHECKPOINTS / "here"
    shutil.copytree(options.model, path) if name == "model" else shutil.copy(options.data, path)
    value = str(path) if name == "model" else path
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} .* lies in .*checkpoints, where a run replaces"):
        finetune(replace(options, overwrite=True, eval_fraction=0.0, **{name: value}), QUIET)
    assert path.exists()


def test_a_plain_adapter_s_card_says_nothing_of_an_earlier_sibo_adapter(options):
    finetune(options, QUIET)
    card = options.output / "README.md"
    assert "SIBO" in card.read_text()
    finetune(replace(options, method="lora", sibo_lambda=None, sibo_learnable=False, overwrite=True), QUIET)
    assert "SIBO" not in card.read_text() and "library_name: peft" in card.read_text()


def test_nothing_is_written_when_the_input_is_refused(options, tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"text": "1+1"}, {"text": 3}])
    with pytest.raises(InputError, match="line 2, column `text`"):
        finetune(replace(options, data=path), QUIET)
    with pytest.raises(InputError, match="no module `q_prj`; choose among .*q_proj"):
        finetune(replace(options, target_modules=("v_proj", "q_prj")), QUIET)
    assert not options.output.exists()


def test_a_model_of_another_family_with_its_own_linear_class(options, tmp_path, base):
    """GPT-2: Conv1D instead of Linear, positions, and the target that PEFT chooses for it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=24, eos_token_id=1)
    )
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    options = replace(options, model=str(tmp_path / "gpt2"))
    result = finetune(options, QUIET)
    assert (result.max_length, result.modules, result.mixing_modules) == (24, 2, 2)
    with pytest.raises(InputError, match="--max-length 25 is more than the model's 24 positions"):
        finetune(replace(options, max_length=25, overwrite=True), QUIET)


def test_model_and_tokenizer_that_do_not_belong_together(options, tmp_path):
    tokenizer = demo_task.build_tokenizer()
    config = GPT2Config(vocab_size=10, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="the token id 15, and the model's vocabulary ends at 9"):
        finetune(replace(options, model=str(tmp_path / "small")), QUIET)


# The demonstration


def test_the_problems_are_right_and_training_and_test_share_none():
    for problems, operator, count in ((demo_task.additions(3), "+", 10_000), (demo_task.subtractions(3), "-", 5_050)):
        train, test = problems
        assert len(set(train) | set(test)) == len(train) + len(test) == count
        assert len(test) == demo_task.TEST_PROBLEMS
        for problem in test:
            left, right = problem.prompt.removesuffix("=").split(operator)
            value = eval(f"{int(left[::-1])} {operator} {int(right[::-1])}")
            assert problem.answer == value == int(problem.completion[::-1])


def test_the_tokenizer_reloads_and_gives_back_what_it_read(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("32-11=120<eos>")["input_ids"]
    assert len(ids) == 10
    assert tokenizer.decode(ids, skip_special_tokens=True) == "32-11=120"


def test_answers_are_what_comes_out_of_greedy_decoding(base):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    problems = demo_task.subtractions(0)[1][:4]
    given = demo_task.answers(model, tokenizer, problems)
    for problem, answer in zip(problems, given, strict=True):
        ids = tokenizer(problem.prompt)["input_ids"]
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert answer == tokenizer.decode(ids[6:], skip_special_tokens=True)
    perfect = [problem.completion for problem in problems]
    assert demo_task.exact_match(problems, perfect) == 1.0
    assert demo_task.exact_match(problems, [*perfect[:3], perfect[3] + "0"]) == 0.75


def test_the_demo_of_adapters_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_task, "TEST_PROBLEMS", 40)
    scale = replace(TINY, base_steps=3, adapter_steps=3, timed_steps=2, bottleneck=8)
    console = Console(record=True, width=80, file=(tmp_path / "terminal").open("w"))
    problems = demo.run_demo(tmp_path / "out", console=console, scale=scale, methods=("adapter", "sibo-adapter"))
    assert "adapter answers" in problems[1]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["accuracy"]) == ["base", "adapter", "sibo-adapter"]
    assert results["reloaded_equal"] == {"adapter": True, "sibo-adapter": True}
    assert (
        results["trainable_parameters"]["adapter"] == results["trainable_parameters"]["sibo-adapter"] == 4 * 2 * 8 * 16
    )
    assert results["provenance"]["command"] == "sibo-triton demo --adapters --seed 0"
    report, shown = (tmp_path / "out" / "report.md").read_text(), console.export_text()
    assert "bottleneck 8 in front of" in report and "| SIBO adapter |" in report
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80


def test_the_demo_in_small_reports_whatever_comes_out(tmp_path, monkeypatch):
    """A model too small and too little trained to add: everything is written, and the failure is said."""
    monkeypatch.setattr(demo_task, "TEST_PROBLEMS", 40)
    output = tmp_path / "demo-output"
    scale = replace(TINY, base_steps=3, adapter_steps=3, timed_steps=2)
    console = Console(record=True, width=80, file=(tmp_path / "terminal").open("w"))
    problems = demo.run_demo(output, console=console, scale=scale)
    assert len(problems) == 2
    assert "of additions, fewer than 80%" in problems[0]
    assert "LoRA answers" in problems[1]

    results = json.loads((output / "results.json").read_text())
    names = ["base", "lora", "sibo-lora"]
    for name in (
        "trainable_parameters",
        "loss",
        "accuracy",
        "seconds_per_step",
        "saved_activation_bytes",
        "similarity_by_layer",
    ):
        assert list(results[name]) == names
    assert results["reloaded_equal"] == {"lora": True, "sibo-lora": True}
    assert results["trainable_parameters"]["base"] == 0
    assert results["trainable_parameters"]["lora"] == results["trainable_parameters"]["sibo-lora"] > 0
    assert results["saved_activation_bytes"]["base"] < results["saved_activation_bytes"]["lora"]
    assert results["problems"] == problems
    report = (output / "report.md").read_text()
    shown = console.export_text()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    for text in (report, shown):
        assert all(f"{results['loss'][name]:.4f}" in text for name in names)
    assert problems[0] in report
    for method in names[1:]:
        assert (output / method / "adapter_model.safetensors").is_file()

    demo.run_demo(output, console=QUIET, scale=scale, methods=names[1:2])
    assert not (output / names[2]).exists(), "a second run replaces the first"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds no demonstration"):
        demo.run_demo(other, console=QUIET, scale=scale)

"""`sibo-triton finetune --task classification` and `regression`: BERT-like models, GLUE-style data, the metrics."""

import json
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import transformers as tf
from peft import PeftModel
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner

from sibo_triton.cli import app
from sibo_triton.finetune.labelled import class_names, read_labelled
from sibo_triton.finetune.metrics import classification_metrics, regression_metrics
from sibo_triton.finetune.options import FinetuneOptions, InputError
from sibo_triton.finetune.train import finetune

QUIET = Console(quiet=True)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["good", "bad", "film", "the", "a", "was", *map(str, range(10))]


def tokenizer():
    """Words, with BERT's special tokens around one text or two."""
    ids = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **names
    )


def save(model, folder):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def bert(kind, folder):
    """A tiny BERT, saved as the bare model, or without a pooler, as a masked language model."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    return save((tf.BertModel if kind == "bare" else tf.BertForMaskedLM)(config), folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return {kind: bert(kind, folder / kind) for kind in ("bare", "masked")}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(labels=("bad", "good")):
    """One text each; the label is in it."""
    return [
        {"idx": i, "sentence": f"the film {i % 10} was {('bad', 'good')[i % 2]}", "label": labels[i % 2]}
        for i in range(24)
    ]


def pairs():
    """Two texts each; the label, from 0 to 4.5, grows with the number in the second."""
    return [{"sentence1": "the film", "sentence2": f"a {i % 10}", "label": (i % 10) / 2} for i in range(24)]


@pytest.fixture
def options(bases, tmp_path):
    data = write(tmp_path / "train.jsonl", reviews())
    return FinetuneOptions(
        model=str(bases["bare"]), data=data, output=tmp_path / "out", task="classification", eval_data=data,
        max_steps=30, batch_size=8, learning_rate=1e-2, rank=4, dropout=0.0,
    )  # fmt: skip


def logits_as_the_report_loads(options, rows):
    """The logits that follow from the code in report.md, of each text by itself, without padding."""
    (block,) = re.findall(r"```python\n(.*?)```", (options.output / "report.md").read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    model, reader = names["model"].eval(), tokenizer()
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        return torch.cat([model(**reader(*texts, return_tensors="pt")).logits for texts in rows]), names["base"]


@pytest.mark.parametrize("method", ["lora", "sibo-lora", "sibo-adapter"])
@pytest.mark.parametrize("kind", ["bare", pytest.param("masked", marks=pytest.mark.oldest)])
def test_a_classifier_learns_and_reloads(method, kind, bases, options):
    if "adapter" in method:
        options = replace(options, rank=None, bottleneck_size=8)
    result = finetune(replace(options, model=str(bases[kind]), method=method), QUIET)
    (first, before), (last, after) = result.metrics[0], result.metrics[-1]
    assert (first, last) == (0, 30) and set(after) == {"accuracy", "f1", "mcc"}
    assert after["accuracy"] > max(before["accuracy"], 0.9)
    logits, base = logits_as_the_report_loads(options, [(row["sentence"],) for row in reviews()])
    predicted = [base.config.id2label[i] for i in logits.argmax(-1).tolist()]
    right = [label == row["label"] for label, row in zip(predicted, reviews(), strict=True)]
    assert sum(right) / len(right) == pytest.approx(after["accuracy"])
    assert base.config.id2label == {0: "bad", 1: "good"}
    assert (result.mixing_modules > 0) is (method != "lora")
    pooler_note = "no weights in --model for bert.pooler.dense: trained, and saved with the adapter"
    assert (pooler_note in result.notes) is (kind == "masked")
    report = (options.output / "report.md").read_text()
    assert f"| held-out accuracy, first → last | {before['accuracy']:.4f} → {after['accuracy']:.4f} |" in report
    assert "not used: column `idx`" in report


def test_regression_learns_pairs_and_is_measured_by_correlation(options, tmp_path):
    data = write(tmp_path / "pairs.jsonl", pairs())
    result = finetune(replace(options, data=data, eval_data=data, task="regression", max_steps=60), QUIET)
    after = result.metrics[-1][1]
    assert after["pearson"] > 0.9
    logits, base = logits_as_the_report_loads(options, [(row["sentence1"], row["sentence2"]) for row in pairs()])
    labels = [row["label"] for row in pairs()]
    assert after["pearson"] == pytest.approx(scipy.stats.pearsonr(logits.flatten().numpy(), labels).statistic, abs=1e-4)
    assert after["spearman"] == pytest.approx(
        scipy.stats.spearmanr(logits.flatten().numpy().round(4), labels).statistic, abs=0.05
    )
    assert base.config.num_labels == 1


def test_the_last_evaluation_is_of_what_is_saved(options):
    result = finetune(replace(options, max_steps=25), QUIET)  # evaluated every two steps
    assert [step for step, _ in result.metrics][-2:] == [24, 25]
    with (options.output / "loss.csv").open() as file:
        assert file.read().splitlines()[-1].startswith("25,")


def test_a_decoder_classifies_too(options, tmp_path):
    """GPT-2: no padding token in its config, which its head needs to find the last token of a text."""
    reader = tokenizer()
    config = tf.GPT2Config(
        vocab_size=len(reader), n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=2, eos_token_id=3
    )
    tf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    reader.save_pretrained(tmp_path / "gpt2")
    result = finetune(replace(options, model=str(tmp_path / "gpt2"), max_steps=2), QUIET)
    assert result.task.names == ["bad", "good"] and result.steps == 2


COMMON = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def test_an_encoder_decoder_classifies_and_its_encoders_similarity_is_reported(options, tmp_path):
    config = tf.BartConfig(
        **COMMON, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, decoder_start_token_id=3,
    )  # fmt: skip
    model = save(tf.BartForConditionalGeneration(config), tmp_path / "bart")
    result = finetune(replace(options, model=model, max_steps=2), QUIET)
    assert len(result.similarity) == len(result.base_similarity) == 3 and result.mixing_modules > 0


def test_what_cannot_be_measured_is_noted_and_the_adapter_is_saved(options, tmp_path):
    config = tf.LlamaConfig(
        **COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    model = save(tf.LlamaForCausalLM(config), tmp_path / "llama")
    reader = tf.AutoTokenizer.from_pretrained(model)
    reader.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    reader.save_pretrained(model)
    data = write(tmp_path / "words.jsonl", [{"text": word, "label": word} for word in ("good", "bad")] * 4)
    result = finetune(replace(options, model=model, data=data, eval_data=data, max_steps=2), QUIET)
    report = (options.output / "report.md").read_text()
    assert "token similarity was not measured: token similarity needs at least one sequence of two tokens" in report
    assert "## Token similarity" not in report and (options.output / "adapter_model.safetensors").exists()
    assert result.similarity == result.base_similarity == []


def test_positions_behind_that_of_padding_are_counted(options, tmp_path):
    """RoBERTa's first token has the position after the padding's."""
    config = tf.RobertaConfig(
        **COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=20, type_vocab_size=2,
    )  # fmt: skip
    model = save(tf.RobertaForMaskedLM(config), tmp_path / "roberta")
    rows = [{"text": "film " * 40 + word, "label": word} for word in ("good", "bad")] * 4
    options = replace(options, model=model, data=write(tmp_path / "long.jsonl", rows), eval_data=None, max_steps=1)
    assert finetune(options, QUIET).max_length == 19
    with pytest.raises(InputError, match="--max-length 20 is more than the model's 19 positions"):
        finetune(replace(options, max_length=20, output=tmp_path / "other"), QUIET)


def test_a_head_for_other_classes_is_named(options, bases, tmp_path):
    model = tf.AutoModelForSequenceClassification.from_pretrained(bases["bare"], num_labels=5)
    folder = save(model, tmp_path / "five")
    with pytest.raises(InputError, match="other shapes than a model for the data's 2 classes"):
        finetune(replace(options, model=folder), QUIET)


def test_single_texts_do_not_evaluate_pairs(options, tmp_path):
    rows = [{"text": f"the film {i}", "text_pair": "a", "label": "good"} for i in range(4)]
    with pytest.raises(InputError, match="has pairs of texts, where --data has single texts"):
        finetune(replace(options, eval_data=write(tmp_path / "pairs.jsonl", rows)), QUIET)


def test_long_texts_are_cut_and_counted(options, tmp_path):
    rows = [{"text": "film " * 40, "label": 0}, {"text": "film", "label": 1}]
    data = write(tmp_path / "long.jsonl", rows)
    result = finetune(replace(options, data=data, eval_data=None, max_steps=1), QUIET)
    assert (result.examples, result.truncated, result.max_length, result.metrics) == (2, 1, 32, [])
    assert "1 of 2 examples cut to 32 tokens" in (options.output / "report.md").read_text()


# Metrics


def evaluated(predictions, labels):
    return SimpleNamespace(predictions=np.array(predictions), label_ids=np.array(labels))


def logits_of(classes, count):
    return np.eye(count)[classes].tolist()


def test_metrics_of_two_classes_by_hand():
    # of class 1: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    predicted, labels = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    metrics = classification_metrics(evaluated(logits_of(predicted, 2), labels))
    assert metrics["accuracy"] == pytest.approx(7 / 10)
    assert metrics["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert metrics["mcc"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))


def test_metrics_of_three_classes_by_hand():
    predicted, labels = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]
    metrics = classification_metrics(evaluated(logits_of(predicted, 3), labels))
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["f1"] == pytest.approx((2 / 4 + 4 / 5 + 2 / 3) / 3)
    # (correct * n - sum of products of counts) / sqrt((n^2 - sum predicted^2) (n^2 - sum labels^2))
    assert metrics["mcc"] == pytest.approx((4 * 6 - (2 * 2 + 2 * 3 + 2 * 1)) / math.sqrt((36 - 12) * (36 - 14)))


def test_metrics_where_one_class_is_predicted():
    metrics = classification_metrics(evaluated(logits_of([0, 0, 0, 0], 2), [0, 0, 1, 1]))
    assert metrics == {"accuracy": 0.5, "f1": 0.0, "mcc": 0.0}


def test_correlations_are_scipys_and_nan_where_there_is_none():
    predicted, labels = [[0.1], [0.4], [0.35], [0.8], [2.0]], [0.0, 1.0, 2.0, 2.5, 5.0]
    metrics = regression_metrics(evaluated(predicted, labels))
    flat = np.array(predicted).flatten()
    assert metrics["pearson"] == pytest.approx(scipy.stats.pearsonr(flat, labels).statistic, abs=1e-6)
    assert metrics["spearman"] == pytest.approx(scipy.stats.spearmanr(flat, labels).statistic, abs=1e-6)
    assert math.isnan(regression_metrics(evaluated([[1.0], [1.0]], [0.0, 1.0]))["pearson"])


def test_a_missing_library_is_named_with_the_way_to_get_it(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(InputError, match=r"metrics need torchmetrics: pip install 'sibo-triton\[finetune\]'"):
        finetune(options, QUIET)


# Data


GLUE = {
    "sst2": ({"sentence": "a", "label": 1}, ("sentence",)),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": "1"}, ("sentence1", "sentence2")),
    "qqp": ({"question1": "a", "question2": "b", "label": 0}, ("question1", "question2")),
    "mnli": ({"premise": "a", "hypothesis": "b", "label": 2}, ("premise", "hypothesis")),
    "qnli": ({"question": "a", "sentence": "b", "label": "entailment"}, ("question", "sentence")),
    "own": ({"text": "a", "text_pair": "b", "label": 0}, ("text", "text_pair")),
}


@pytest.mark.parametrize("name", GLUE)
def test_the_columns_of_glue_are_found(name, tmp_path):
    row, columns = GLUE[name]
    examples = read_labelled(write(tmp_path / "d.jsonl", [row]), regression=False)
    assert examples.columns == columns and examples.labels == [str(row["label"])]
    assert examples.rows == [tuple("ab"[: len(columns)])]


def test_classes_are_ordered_by_number_or_by_name(tmp_path):
    def names(labels):
        rows = [{"text": "a", "label": label} for label in labels]
        return class_names(read_labelled(write(tmp_path / "d.jsonl", rows), regression=False))

    assert names([10, 9, 10, "2"]) == ["2", "9", "10"]
    assert names([10, 9, -2]) == ["-2", "9", "10"] and names(["1", "01", "0"]) == ["0", "01", "1"]
    assert names(["no", "maybe", "10"]) == ["10", "maybe", "no"]


BAD = {
    "no text": (
        [{"label": 1, "body": "a"}],
        "no column with a text (found: `label`, `body`); it needs a column `label`",
    ),
    "no label": ([{"text": "a"}], "line 1, column `label`: missing"),
    "test set": ([{"text": "a", "label": -1}], "column `label` is -1, which stands for no label in GLUE's test sets"),
    "number": (
        [{"text": "a", "label": 0.5}],
        "column `label`: expected a name or an integer, got 0.5; --task regression",
    ),
    "bool": ([{"text": "a", "label": True}], "column `label`: expected a name or an integer, got True"),
    "empty": ([{"text": "", "label": 1}], "line 1, column `text`: is empty"),
    "one class": ([{"text": "a", "label": 1}], "every `label` is '1'; a classifier needs two classes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_labelled_data_is_refused_by_file_and_place(name, options, tmp_path):
    rows, message = BAD[name]
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        finetune(replace(options, data=path), QUIET)
    assert str(error.value).startswith(str(path)) and not options.output.exists()


def test_bad_numbers_and_unknown_classes_are_refused(options, tmp_path):
    path = write(tmp_path / "bad.jsonl", [{"text": "a", "label": "often"}])
    with pytest.raises(InputError, match="line 1, column `label`: expected a number, got 'often'"):
        finetune(replace(options, data=path, task="regression"), QUIET)
    for row in ('{"text": "a", "label": 1' + "0" * 400 + "}", '{"text": "a", "label": 1' + "0" * 5000 + "}"):
        path.write_text(row)
        with pytest.raises(InputError, match=r"line 1(, column `label`: expected a number|: cannot be read as JSON)"):
            finetune(replace(options, data=path, task="regression"), QUIET)
    path.write_text('{"text": ' + "[" * 100_000)
    with pytest.raises(InputError, match="line 1: cannot be read as JSON"):
        finetune(replace(options, data=path), QUIET)
    write(path, [{"text": "a", "label": -1.0}] * 3)
    with pytest.raises(InputError, match="every `label` is -1"):
        finetune(replace(options, data=path, task="regression"), QUIET)
    write(path, [{"text": "a", "label": -1}, {"text": "b", "label": 2}])
    assert read_labelled(path, regression=True).labels == [-1.0, 2.0]
    write(path, [{"text": "a", "label": "often"}])
    with pytest.raises(
        InputError, match="line 1, column `label` is 'often': the training data has the labels bad, good"
    ):
        finetune(replace(options, eval_data=path), QUIET)


def test_the_command_classifies_csv(bases, tmp_path):
    lines = [f"the film {i},{'good' if i % 2 else 'bad'}" for i in range(8)]
    (tmp_path / "d.csv").write_text("\n".join(["text,label", *lines]))
    arguments = ["finetune", "--model", str(bases["bare"]), "--data", str(tmp_path / "d.csv"), "--max-steps", "1"]
    arguments += ["--output", str(tmp_path / "out"), "--batch-size", "4"]
    runner = CliRunner()
    result = runner.invoke(app, [*arguments, "--task", "classification", "--eval-fraction", "0.5"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "classifier" in config["modules_to_save"]
    again = [*arguments, "--overwrite"]
    for flags, message in (
        (["--task", "ner"], "--task is 'ner': choose one of causal-lm, classification, regression"),
        (["--task", "regression", "--recipe", "llama-lora-arithmetic"], "--recipe is for --task causal-lm"),
    ):
        result = runner.invoke(app, [*again, *flags])
        assert result.exit_code == 2 and message in result.stderr

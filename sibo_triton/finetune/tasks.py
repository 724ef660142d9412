"""What a fine-tuning run learns: to continue text, to classify texts, or to give them a number.

A task reads the data, loads the model, makes token ids and labels, and measures. All tasks share the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding

from sibo_triton.finetune.data import Examples, read_examples
from sibo_triton.finetune.instructions import read_training_examples
from sibo_triton.finetune.labelled import LabelledTexts, class_ids, class_names, read_labelled
from sibo_triton.finetune.metrics import classification_metrics, regression_metrics, require_metrics
from sibo_triton.finetune.model import load_base, load_classifier
from sibo_triton.finetune.options import CAUSAL_LM, REGRESSION, FinetuneOptions, InputError
from sibo_triton.finetune.tokens import TokenizedExamples, completion_collator, tokenize_examples


class CausalLanguageModelling:
    """To continue text: a prompt's completion, or every token.

    Attributes:
        peft_type: PEFT's name of the task.
        model_class: transformers' class to load the model, and its arguments, for the report.
        compute_metrics: for the `Trainer`, or None if the loss suffices.
    """

    peft_type = "CAUSAL_LM"
    model_class = "AutoModelForCausalLM"
    load_arguments = ""
    compute_metrics: Callable[[Any], dict[str, float]] | None = None

    def __init__(self, options: FinetuneOptions) -> None:
        self._options = options

    def read(self, path: Path) -> Examples:
        """The examples of a file, as they are or with a recipe's prompt around them."""
        recipe = self._options.recipe
        if recipe is None:
            return read_examples(path)
        return read_training_examples(path, recipe.template, recipe.train_on_inputs)

    def load(self, train: Any) -> tuple[Any, Any, list[str]]:
        """The model, its tokenizer, and the modules without weights in the file."""
        return *load_base(self._options.model, self._options.dtype), []

    def tokenize(self, rows: Any, tokenizer: Any, max_length: int) -> TokenizedExamples:
        """Token ids and labels."""
        return tokenize_examples(rows, tokenizer, max_length)

    def collator(self, tokenizer: Any) -> Callable[[Any], Any]:
        """Makes padded tensors from examples."""
        return completion_collator(tokenizer, self._options.model)


class SequenceClassification:
    """To give a text, or a pair of texts, its class, or a number.

    Attributes: those of `CausalLanguageModelling`, and
        names: of the classes, by id; of the one output for regression.
    """

    peft_type = "SEQ_CLS"
    model_class = "AutoModelForSequenceClassification"

    def __init__(self, options: FinetuneOptions) -> None:
        require_metrics()
        self._options = options
        self._regression = options.task == REGRESSION
        self.names: list[str] = []
        self._texts: int | None = None  # in a row of the training data
        self.compute_metrics = regression_metrics if self._regression else classification_metrics

    @property
    def load_arguments(self) -> str:
        """Further arguments to `from_pretrained`, as source text."""
        labels = ", ".join(f"{i}: {name!r}" for i, name in enumerate(self.names))
        ids = ", ".join(f"{name!r}: {i}" for i, name in enumerate(self.names))
        names = "" if self._regression else f", id2label={{{labels}}}, label2id={{{ids}}}"
        return f", num_labels={len(self.names)}{names}"

    def read(self, path: Path) -> LabelledTexts:
        """The examples of a file: first of the training data, then of the evaluation's."""
        examples = read_labelled(path, self._regression)
        self._texts = self._texts or len(examples.columns)
        if len(examples.columns) != self._texts:
            kinds = {1: "single texts", 2: "pairs of texts"}
            raise InputError(f"{path}: has {kinds[len(examples.columns)]}, where --data has {kinds[self._texts]}.")
        return examples

    def load(self, train: Any) -> tuple[Any, Any, list[str]]:
        """The model with a head for the training data's classes, its tokenizer, and other modules without weights."""
        self.names = ["score"] if self._regression else class_names(train)
        return load_classifier(self._options.model, self._options.dtype, self.names, self._regression)

    def tokenize(self, rows: LabelledTexts, tokenizer: Any, max_length: int) -> TokenizedExamples:
        """Token ids of the texts, with the tokenizer's special tokens, cut to `max_length`; labels are class ids."""
        texts = list(zip(*rows.rows, strict=True))
        whole = tokenizer(*map(list, texts))["input_ids"]
        cut = tokenizer(*map(list, texts), truncation=True, max_length=max_length)
        result = TokenizedExamples(
            input_ids=cut["input_ids"],
            labels=rows.labels if self._regression else class_ids(rows, self.names),
            truncated=sum(len(ids) > max_length for ids in whole),
        )
        if "token_type_ids" in cut:
            result.others["token_type_ids"] = cut["token_type_ids"]
        return result

    def collator(self, tokenizer: Any) -> Callable[[Any], Any]:
        """Makes padded tensors from examples: input_ids, attention_mask, labels (int64, or float32 numbers)."""
        return DataCollatorWithPadding(tokenizer)


Task = CausalLanguageModelling | SequenceClassification


def task_of(options: FinetuneOptions) -> Task:
    """The task chosen by the options."""
    return CausalLanguageModelling(options) if options.task == CAUSAL_LM else SequenceClassification(options)

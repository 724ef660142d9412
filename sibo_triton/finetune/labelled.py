"""Texts, or pairs of texts, with a label, as in GLUE: the data of sequence classification and regression."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sibo_triton.finetune.data import Examples, read_rows, text_value
from sibo_triton.finetune.options import InputError

# Pairs first: a file with both columns of a pair is one of pairs. The names are those of GLUE's tasks, and our own.
_COLUMNS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
)
_LABEL = "label"
_NEEDED = (
    "it needs a column `label`, and `text` or `sentence`, or two columns: `text` and `text_pair`, or a pair's names in "
    "GLUE"
)
_UNLABELLED = "-1"  # the label in GLUE's test sets


@dataclass
class LabelledTexts(Examples):
    """The examples of one file; `columns` are the one or two that are read as text.

    Attributes:
        labels: for each example the name of its class, or a number for regression.
    """

    labels: list[Any] = field(default_factory=list)


def read_labelled(path: Path, regression: bool) -> LabelledTexts:
    """Read labelled texts from a .jsonl, .json (a list, or an object per line), .csv or .parquet file.

    Args:
        path: the file.
        regression: whether labels are numbers (STS-B), or the names or indices of classes.

    Raises:
        InputError: the file holds no examples, or a row cannot be used; it names file, place and column.
    """
    examples: LabelledTexts | None = None
    for place, row in read_rows(path, _NEEDED, lists=True):
        if examples is None:
            examples = LabelledTexts(path, _columns_of(path, place, row))
        texts = [text_value(path, place, row, column, may_be_empty=False) for column in examples.columns]
        examples.rows.append(tuple(texts))
        examples.labels.append(_label(path, place, row, regression))
        examples.places.append(place)
        examples.ignored.update(name for name in row if name not in (*examples.columns, _LABEL))
    if examples is None:
        raise InputError(f"{path}: holds no examples; {_NEEDED}.")
    if regression and set(examples.labels) == {float(_UNLABELLED)}:
        raise InputError(
            f"{path}: every `label` is -1, which stands for none in GLUE's test sets; use the validation set."
        )
    return examples


def class_names(examples: LabelledTexts) -> list[str]:
    """The names of the classes, in the order of their ids: by number if all are numbers, else by name.

    Raises:
        InputError: there is only one class.
    """
    names = set(examples.labels)
    if len(names) < 2:
        raise InputError(
            f"{examples.path}: every `label` is {examples.labels[0]!r}; a classifier needs two classes at least."
        )
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def class_ids(examples: LabelledTexts, names: Sequence[str]) -> list[int]:
    """The id of each example's class.

    Raises:
        InputError: a label is not among the names: the training data does not have this class.
    """
    ids = {name: i for i, name in enumerate(names)}
    for label, place in zip(examples.labels, examples.places, strict=True):
        if label not in ids:
            raise InputError(
                f"{examples.path}, {place}, column `label` is {label!r:.60}: the training data has the labels "
                f"{', '.join(names)}; correct it, or add examples of it."
            )
    return [ids[label] for label in examples.labels]


def _columns_of(path: Path, place: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns with the texts, determined by the first row."""
    for columns in _COLUMNS:
        if all(column in row for column in columns):
            return columns
    names = ", ".join(f"`{name}`" for name in row) or "none"
    raise InputError(f"{path}, {place}: no column with a text (found: {names}); {_NEEDED}.")


def _label(path: Path, place: str, row: Mapping[str, Any], regression: bool) -> str | float:
    where = f"{path}, {place}, column `{_LABEL}`"
    if _LABEL not in row:
        raise InputError(f"{where}: missing; {_NEEDED}.")
    value = row[_LABEL]
    if regression:
        return _number(where, value)
    if str(value) == _UNLABELLED:
        raise InputError(f"{where} is -1, which stands for no label in GLUE's test sets; use the validation set.")
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise InputError(f"{where}: expected a name or an integer, got {value!r:.60}; --task regression takes numbers.")
    return str(value)


def _number(where: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: expected a number, got {value!r:.60}; --task classification takes names.")
    return number

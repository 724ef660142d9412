"""Instruction data in LLM-Adapters' format: instruction, input, output and answer, and the prompt around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sibo_triton.finetune.data import Examples, read_rows, text_value
from sibo_triton.finetune.options import InputError

RESPONSE_MARKER = "### Response:"
_INDENT = " " * 16  # the prompt's lines are indented as in LLM-Adapters' source
_TASK = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."

_TRAINING_NEEDS = "it needs the columns `instruction` and `output`; `input` may be there"
_QUESTIONS_NEED = "it needs the columns `instruction` and `answer`; `input` may be there"


@dataclass(frozen=True)
class PromptTemplate:
    """The prompt before a response.

    Apart from the input, the four differ only in white space, as the authors' do for training and evaluation.

    Attributes:
        train, train_with_input: for training; with {instruction}, and with {input}.
        generate, generate_with_input: for evaluation.
    """

    train: str
    train_with_input: str
    generate: str
    generate_with_input: str

    def for_training(self, instruction: str, input_: str) -> str:
        """The prompt of a training example, up to its response."""
        template = self.train_with_input if input_ else self.train
        return template.format(instruction=instruction, input=input_)

    def for_generation(self, instruction: str, input_: str) -> str:
        """The prompt that the model is to continue."""
        template = self.generate_with_input if input_ else self.generate
        return template.format(instruction=instruction, input=input_)


def _llm_adapters(head: str, fields: tuple[str, ...], between: str) -> str:
    """The head, a heading and a value for each field, and the heading of the response."""
    sections = [f"{_INDENT}### {name.capitalize()}:\n{_INDENT}{{{name}}}\n{between}\n" for name in fields]
    return f"{head}\n\n{''.join(sections)}{_INDENT}{RESPONSE_MARKER}\n{_INDENT}"


_ALONE, _PAIRED = ("instruction",), ("instruction", "input")
_PLAIN_HEAD = f"{_TASK}. {_REQUEST}"
_INPUT_HEAD = f"{_TASK}, paired with an input that provides further context. {_REQUEST}"

TEMPLATES = {
    "llm-adapters": PromptTemplate(
        train=_llm_adapters(_PLAIN_HEAD + "  ", _ALONE, between=_INDENT),
        train_with_input=_llm_adapters(_INPUT_HEAD + " ", _PAIRED, between=_INDENT),
        generate=_llm_adapters(_PLAIN_HEAD + " ", _ALONE, between=""),
        generate_with_input=_llm_adapters(_INPUT_HEAD, _PAIRED, between=""),
    )
}


@dataclass(frozen=True)
class Question:
    """One row of an evaluation file.

    Attributes:
        place: its position in the file, such as "item 3".
        prompt: what the model is to continue.
        answer: the reference, as text.
    """

    place: str
    prompt: str
    answer: str


def read_training_examples(path: Path, template: PromptTemplate, train_on_inputs: bool) -> Examples:
    """Read instruction data to train on.

    Args:
        path: a .json file (one list, or an object per line), .jsonl, .csv or .parquet.
        template: the prompt around instruction and input.
        train_on_inputs: whether the loss is on every token (column `text`), or on the output only (columns `prompt`
            and `completion`).

    Raises:
        InputError: the file holds no examples, or a row cannot be used; it names file, place and column.
    """
    examples = Examples(path, ("text",) if train_on_inputs else ("prompt", "completion"))
    empty = 0
    for place, row in read_rows(path, _TRAINING_NEEDS, lists=True):
        instruction, input_ = _instruction(path, place, row, _TRAINING_NEEDS)
        if "output" not in row:
            raise InputError(f"{path}, {place}: has no column `output`; {_TRAINING_NEEDS}.")
        # If the loss includes the prompt, an example without an output can still be learned from.
        output = text_value(path, place, row, "output", may_be_empty=train_on_inputs)
        empty += not output
        prompt = template.for_training(instruction, input_)
        examples.rows.append((prompt + output,) if train_on_inputs else (prompt, output))
        examples.places.append(place)
        examples.ignored.update(name for name in row if name not in ("instruction", "input", "output"))
    if not examples.rows:
        raise InputError(f"{path}: holds no examples; {_TRAINING_NEEDS}.")
    if empty:
        examples.notes.append(f"{path}: in {empty} of {len(examples.rows)} examples `output` is empty")
    return examples


def read_questions(path: Path, template: PromptTemplate, limit: int | None = None) -> list[Question]:
    """Read instruction data to evaluate on, the first `limit` rows of it.

    Raises:
        InputError: the file holds no questions, or a row cannot be used; it names file, place and column.
    """
    questions: list[Question] = []
    for place, row in read_rows(path, _QUESTIONS_NEED, lists=True):
        if len(questions) == limit:
            break
        instruction, input_ = _instruction(path, place, row, _QUESTIONS_NEED)
        if "answer" not in row:
            raise InputError(f"{path}, {place}: has no column `answer`; {_QUESTIONS_NEED}.")
        answer = row["answer"]
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or answer == "":
            raise InputError(
                f"{path}, {place}, column `answer`: expected a string or a number, got {answer!r:.60}; write the "
                "answer as the responses have it."
            )
        questions.append(Question(place, template.for_generation(instruction, input_), str(answer).strip()))
    if not questions:
        raise InputError(f"{path}: holds no questions; {_QUESTIONS_NEED}.")
    return questions


def _instruction(path: Path, place: str, row: Mapping[str, Any], needed: str) -> tuple[str, str]:
    """Instruction and input of a row; a missing input is an empty one."""
    if "instruction" not in row:
        names = ", ".join(f"`{name}`" for name in row) or "none"
        raise InputError(f"{path}, {place}: has no column `instruction` (found: {names}); {needed}.")
    instruction = text_value(path, place, row, "instruction", may_be_empty=False)
    if row.get("input") is None:
        return instruction, ""
    return instruction, text_value(path, place, row, "input", may_be_empty=True)

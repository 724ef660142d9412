"""`sibo-triton evaluate`: a model answers the questions for a recipe, and the answers are scored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from safetensors import SafetensorError
from transformers import GenerationConfig

from sibo_triton.environment import provenance
from sibo_triton.finetune.instructions import Question, read_questions
from sibo_triton.finetune.model import load_base, positions_of
from sibo_triton.finetune.options import DTYPES, InputError, check_output, first_line
from sibo_triton.finetune.recipes import Recipe
from sibo_triton.finetune.scoring import AnswerKind, kind_of, response_of
from sibo_triton.finetune.tokens import ensure_pad_token, without_end
from sibo_triton.markdown import markdown_table

REPORT, TABLE, PREDICTIONS = "evaluation.json", "evaluation.md", "predictions.jsonl"

_HEADER = ("data", "answers", "questions", "right", "accuracy", "without an answer")


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of one evaluation; `None` means the recipe's setting, or no limit or no adapter."""

    recipe: Recipe
    model: str
    data: tuple[Path, ...]
    output: Path
    adapter: Path | None = None
    batch_size: int = 8
    limit: int | None = None
    num_beams: int | None = None
    max_new_tokens: int | None = None
    dtype: str | None = None
    overwrite: bool = False

    def resolved(self) -> EvaluateOptions:
        """The options with the recipe's settings in place of `None`."""
        return replace(
            self,
            num_beams=self.recipe.num_beams if self.num_beams is None else self.num_beams,
            max_new_tokens=self.recipe.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            dtype=self.recipe.options.get("dtype", "auto") if self.dtype is None else self.dtype,
        )


@dataclass
class Score:
    """The result of one file.

    Attributes:
        data: the file.
        answers: the kind of its answers, a key of `sibo_triton.finetune.scoring.ANSWERS`.
        questions, right, without_answer: how many there were, were answered right, and had no answer in the response.
    """

    data: str
    answers: str
    questions: int = 0
    right: int = 0
    without_answer: int = 0

    @property
    def accuracy(self) -> float:
        """The share of right answers, in [0, 1]."""
        return self.right / self.questions


def run_evaluation(options: EvaluateOptions, console: Console | None = None) -> list[Score]:
    """Generate and score an answer to every question.

    All input is checked before the output folder is changed. Then predictions.jsonl is written while the model answers,
    and evaluation.json and evaluation.md at the end.

    Args:
        options: see `EvaluateOptions`.
        console: where notes, the progress bar and the table go; default: the terminal.

    Returns:
        One score for each file.

    Raises:
        InputError: an option, the model, the adapter or the data cannot be used.
    """
    console = console or Console()
    options = options.resolved()
    _check(options)
    files = [(path, read_questions(path, options.recipe.template, options.limit)) for path in options.data]
    kinds = [_kind(options.recipe, path, questions) for path, questions in files]
    model, tokenizer = _load(options, console)
    prompts = [
        [without_end(tokenizer(question.prompt)["input_ids"], tokenizer) for question in questions]
        for _, questions in files
    ]
    _check_lengths(options, model, files, prompts)

    options.output.mkdir(parents=True, exist_ok=True)
    scores = [Score(str(path), kind.name) for (path, _), kind in zip(files, kinds, strict=True)]
    total = sum(len(questions) for _, questions in files)
    with (
        (options.output / PREDICTIONS).open("w", encoding="utf-8") as predictions,
        Progress(console=console) as progress,
    ):
        bar = progress.add_task("questions", total=total)
        for (_, questions), ids, kind, score in zip(files, prompts, kinds, scores, strict=True):
            for question, response in zip(questions, _responses(model, tokenizer, ids, options), strict=True):
                line = _scored(question, response, kind, score)
                predictions.write(json.dumps(line, ensure_ascii=False) + "\n")
                predictions.flush()  # an interrupted evaluation keeps what it has
                progress.advance(bar)
    _report(options, scores, console)
    return scores


def _check(options: EvaluateOptions) -> None:
    for name in ("batch_size", "limit", "num_beams", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")
    if options.dtype not in DTYPES:
        raise InputError(f"--dtype is {options.dtype!r}: choose one of {', '.join(DTYPES)}.")
    doubled = [path for path in options.data if options.data.count(path) > 1]
    if doubled:
        raise InputError(f"--data {doubled[0]} is given twice: name each file once.")
    adapter = options.adapter
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise InputError(
            f"--adapter {adapter} holds no adapter_config.json: give the folder that `sibo-triton finetune` wrote, or "
            "leave the option out to evaluate the base model."
        )
    if adapter is not None and options.output.resolve() == adapter.resolve():
        raise InputError(f"--output {options.output} is the adapter's own folder: name another.")
    check_output(options.output, options.model, options.overwrite)


def _kind(recipe: Recipe, path: Path, questions: Sequence[Question]) -> AnswerKind:
    """The kind of a file's answers, which must be the same for all.

    Raises:
        InputError: an answer is of no known kind, of a kind that is not the recipe's, or of another kind than the
            first.
    """
    first: AnswerKind | None = None
    for question in questions:
        kind = kind_of(question.answer)
        where = f"{path}, {question.place}, column `answer` is {question.answer!r:.60}"
        if kind is None or kind.name not in recipe.answers:
            raise InputError(
                f"{where}: the recipe {recipe.name} is for answers of the kinds {', '.join(recipe.answers)}; correct "
                "the answer, or choose the recipe of the other task."
            )
        first = first or kind
        if kind is not first:
            raise InputError(
                f"{where}, of the kind {kind.name}, where the file's first is of the kind {first.name}; split the file."
            )
    assert first is not None  # a file without questions was refused when it was read
    return first


def _load(options: EvaluateOptions, console: Console) -> tuple[Any, Any]:
    model, tokenizer = load_base(options.model, str(options.dtype))
    note = options.recipe.note_on(model.config.model_type)
    if note is not None:
        console.print(f"- {note}", highlight=False)
    if options.adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, str(options.adapter))
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            raise InputError(
                f"--adapter {options.adapter} does not load on {options.model}: {first_line(error)}"
            ) from error
    ensure_pad_token(tokenizer, options.model)
    tokenizer.padding_side = "left"  # a response must follow its prompt directly
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def _check_lengths(
    options: EvaluateOptions,
    model: Any,
    files: Sequence[tuple[Path, Sequence[Question]]],
    prompts: Sequence[Sequence[list[int]]],
) -> None:
    positions = positions_of(model)
    if positions is None:
        return
    room = positions - (options.max_new_tokens or 0)
    for (path, questions), rows in zip(files, prompts, strict=True):
        for question, ids in zip(questions, rows, strict=True):
            if len(ids) > room:
                raise InputError(
                    f"{path}, {question.place}: the prompt's {len(ids)} tokens and --max-new-tokens "
                    f"{options.max_new_tokens} are more than the model's {positions} positions; shorten one of them."
                )


def _responses(model: Any, tokenizer: Any, prompts: Sequence[list[int]], options: EvaluateOptions) -> Iterator[str]:
    """The response to each prompt, by beam search without sampling."""
    generation = GenerationConfig(
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    for start in range(0, len(prompts), options.batch_size):
        batch = tokenizer.pad({"input_ids": prompts[start : start + options.batch_size]}, return_tensors="pt")
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            sequences = model.generate(**inputs, generation_config=generation)
        generated = sequences[:, inputs["input_ids"].shape[1] :]
        yield from map(response_of, tokenizer.batch_decode(generated, skip_special_tokens=True))


def _scored(question: Question, response: str, kind: AnswerKind, score: Score) -> dict[str, Any]:
    """The line of predictions.jsonl; also adds it to the score."""
    prediction = kind.find(response)
    right = prediction is not None and kind.agree(prediction, question.answer)
    score.questions += 1
    score.right += right
    score.without_answer += prediction is None
    return {
        "data": score.data,
        "place": question.place,
        "answer": question.answer,
        "prediction": prediction,
        "right": right,
        "response": response,
    }


def _report(options: EvaluateOptions, scores: Sequence[Score], console: Console) -> None:
    """Write evaluation.json and evaluation.md, and print the table."""
    mean = sum(score.accuracy for score in scores) / len(scores)
    content = {
        "recipe": options.recipe.name,
        "model": options.model,
        "adapter": None if options.adapter is None else str(options.adapter),
        "dtype": options.dtype,
        "num_beams": options.num_beams,
        "max_new_tokens": options.max_new_tokens,
        "limit": options.limit,
        "results": [asdict(score) | {"accuracy": score.accuracy} for score in scores],
        "mean_accuracy": mean,
        "provenance": provenance(),
    }
    (options.output / REPORT).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [
        (s.data, s.answers, f"{s.questions:,}", f"{s.right:,}", f"{s.accuracy:.1%}", f"{s.without_answer:,}")
        for s in scores
    ]
    if len(rows) > 1:
        rows.append(("mean of the files", "", "", "", f"{mean:.1%}", ""))
    what = f"Recipe {options.recipe.name}, base model `{options.model}`, adapter `{options.adapter or 'none'}`."
    (options.output / TABLE).write_text(f"{what}\n\n{markdown_table(_HEADER, rows)}\n", encoding="utf-8")
    table = Table(*_HEADER)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)

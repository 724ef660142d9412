"""One fine-tuning run: check, load, train with transformers' Trainer, save the adapter, write the report."""

from __future__ import annotations

import math
import re
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from sibo_triton.explain import explain
from sibo_triton.finetune.model import add_adapter, check_vocabulary, choose_max_length
from sibo_triton.finetune.options import CAUSAL_LM, CHECKPOINTS, FinetuneOptions, InputError, check_options, first_line
from sibo_triton.finetune.progress import ProgressAndLog
from sibo_triton.finetune.report import write_report
from sibo_triton.finetune.result import FinetuneResult
from sibo_triton.finetune.tasks import task_of
from sibo_triton.finetune.tokens import TokenizedExamples
from sibo_triton.saved_activations import saved_activation_bytes
from sibo_triton.saving.model_card import remove_from_model_card
from sibo_triton.similarity import NoPairs, similarity_by_layer

LOSS_LOG = "loss.csv"

_LOG_ROWS = 200  # per run, so that a long run's log stays readable
_EVALUATIONS = 10  # per run, besides the one before training
_SIMILARITY_EXAMPLES = 64  # enough for a mean over sequences; more would cost time and change little
_WARMUP_STEPS = 100  # the authors' setting, bounded by a tenth of the run


def finetune(options: FinetuneOptions, console: Console | None = None) -> FinetuneResult:
    """Fine-tune a model with LoRA, bottleneck adapters, or SIBO's of either.

    All input is checked before the output folder is changed. The folder then gets the adapter (for
    `PeftModel.from_pretrained`), loss.csv, report.md with its plots, and the Trainer's checkpoints. Ctrl-C ends
    training, and saves the adapter in its current state.

    Args:
        options: see `FinetuneOptions`.
        console: where notes and the progress bar go; default: the terminal.

    Raises:
        InputError: an option, the model or the data cannot be used.
    """
    console = console or Console()
    dataset_class = _import_dataset()
    check_options(options)
    task = task_of(options)
    train_rows = task.read(options.data)
    eval_rows = None if options.eval_data is None else task.read(options.eval_data)

    model, tokenizer, fresh_modules = task.load(train_rows)
    result = FinetuneResult(options, max_length=choose_max_length(options, model), task=task)
    train_set, eval_set = _datasets(dataset_class, result, tokenizer, train_rows, eval_rows)
    result.examples, result.eval_examples = len(train_set), len(eval_set) if eval_set is not None else 0
    for data in filter(None, (train_set, eval_set)):
        check_vocabulary(model, max(map(max, data["input_ids"])))
    if model.dtype == torch.float16:
        result.notes.append("the base model is in float16, where training can overflow: --dtype bfloat16 is safer")

    set_seed(options.seed)
    model, notes = add_adapter(model, options, task.peft_type, fresh_modules)
    result.notes += notes
    if options.gradient_checkpointing:
        _enable_checkpointing(model)
    _describe_model(result, model)
    for note in result.notes:
        console.print(f"- {escape(note)}", highlight=False, soft_wrap=True)

    output = _prepare_output(options)
    trainer = _trainer(result, model, tokenizer, train_set, eval_set)
    result.device = str(trainer.args.device)
    with _undisturbed_random_state():
        _measure_before(result, trainer)
    _train(result, trainer, console, output)
    remove_from_model_card(str(output))  # a plain adapter's card is written by PEFT, which keeps what is there
    model.save_pretrained(str(output))  # first: no failure below may lose the adapter
    _measure_after(result, trainer)
    write_report(result, output)
    result.model = trainer.model
    return result


def _import_dataset() -> Any:
    try:
        from datasets import Dataset
    except ModuleNotFoundError as error:
        raise InputError(f"fine-tuning needs {error.name}: pip install 'sibo-triton[finetune]'.") from error
    return Dataset


def _datasets(
    dataset_class: Any, result: FinetuneResult, tokenizer: Any, train_rows: Any, eval_rows: Any
) -> tuple[Any, Any]:
    """The training set and the evaluation set (or None), tokenised."""
    if tokenizer.eos_token_id is None and result.options.task == CAUSAL_LM:
        result.notes.append("the tokenizer has no end-of-text token: the model will not learn where to stop")
    train = _tokenized(dataset_class, result, tokenizer, train_rows)
    if eval_rows is not None:
        return train, _tokenized(dataset_class, result, tokenizer, eval_rows)
    fraction = result.options.eval_fraction
    if not fraction:
        return train, None
    count = round(fraction * len(train))
    if not 0 < count < len(train):
        raise InputError(
            f"--eval-fraction {fraction} of {len(train)} examples is {count}: both parts need at least one example."
        )
    parts = train.train_test_split(test_size=count, seed=result.options.seed)
    return parts["train"], parts["test"]


def _tokenized(dataset_class: Any, result: FinetuneResult, tokenizer: Any, rows: Any) -> Any:
    tokens = result.task.tokenize(rows, tokenizer, result.max_length)
    result.truncated += tokens.truncated
    result.dropped += len(tokens.dropped)
    result.notes += _data_notes(rows, tokens, result.max_length)
    return dataset_class.from_dict({"input_ids": tokens.input_ids, "labels": tokens.labels} | tokens.others)


def _data_notes(rows: Any, tokens: TokenizedExamples, max_length: int) -> list[str]:
    total = len(rows.rows)
    notes = list(rows.notes)
    if rows.ignored:
        notes.append(f"{rows.path}: not used: column {', '.join(f'`{name}`' for name in sorted(rows.ignored))}")
    if tokens.truncated:
        notes.append(f"{rows.path}: {tokens.truncated} of {total} examples cut to {max_length} tokens (--max-length)")
    if tokens.dropped:
        first = ", ".join(tokens.dropped[:3]) + (", ..." if len(tokens.dropped) > 3 else "")
        notes.append(
            f"{rows.path}: LEFT OUT {len(tokens.dropped)} of {total} examples ({first}): the prompt alone fills "
            f"{max_length} tokens (--max-length)"
        )
    if tokens.split_apart:
        notes.append(
            f"{rows.path}: in {tokens.split_apart} of {total} examples a token spans prompt and completion, so the two "
            "were tokenised apart; a space between them usually belongs to the completion's start"
        )
    return notes


def _enable_checkpointing(model: Any) -> None:
    base = model.get_base_model()
    # transformers 5.23 renamed it. Not set in TrainingArguments, so that measurements before training include it.
    name = "activation_checkpointing_enable"
    enable = getattr(base, name) if hasattr(base, name) else base.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"--gradient-checkpointing: {first_line(error)}") from error


def _describe_model(result: FinetuneResult, model: Any) -> None:
    result.dtype = str(model.get_base_model().dtype).removeprefix("torch.")
    result.trainable_parameters, parameters = model.get_nb_trainable_parameters()
    result.parameters = parameters - result.trainable_parameters  # the base model's own
    result.modules = len(explain(model))
    result.lambdas = _lambdas(model)
    result.mixing_modules = len(result.lambdas)
    if result.options.mixes:
        result.notes.append(
            f"{result.mixing_modules} of {result.modules} adapted modules mix in the initial residual, "
            f"lambda = {result.options.lambda_}" + (", learnable" if result.options.sibo_learnable else "")
        )


def _lambdas(model: Any) -> dict[str, float]:
    rows = explain(model)
    return {of.module.removeprefix("base_model.model."): of.lambda_ for of in rows if of.lambda_ is not None}


def _prepare_output(options: FinetuneOptions) -> Path:
    output = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {output} cannot be made: {error.strerror}.") from error
    for earlier in (output / CHECKPOINTS).glob("checkpoint-*"):  # only with --overwrite
        if re.fullmatch(r"checkpoint-\d+", earlier.name):  # the Trainer would count it as its own
            earlier.unlink() if earlier.is_symlink() or not earlier.is_dir() else shutil.rmtree(earlier)
    return output


def _trainer(result: FinetuneResult, model: Any, tokenizer: Any, train_set: Any, eval_set: Any) -> Trainer:
    options = result.options
    batches = math.ceil(len(train_set) / options.batch_size)
    per_epoch = math.ceil(batches / options.gradient_accumulation)
    result.planned_steps = options.max_steps or math.ceil(options.epochs * per_epoch)
    result.warmup_steps = (
        min(_WARMUP_STEPS, result.planned_steps // 10) if options.warmup_steps is None else options.warmup_steps
    )
    arguments = TrainingArguments(
        output_dir=str(options.output / CHECKPOINTS),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        warmup_steps=result.warmup_steps,
        weight_decay=0.0,
        seed=options.seed,
        logging_steps=max(1, result.planned_steps // _LOG_ROWS),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a diverged run must look like one
        eval_strategy="no" if eval_set is None else "steps",
        eval_steps=max(1, result.planned_steps // _EVALUATIONS),
        eval_on_start=eval_set is not None,
        prediction_loss_only=result.task.compute_metrics is None,
        save_steps=options.save_steps,
        save_total_limit=2,
        label_names=["labels"],  # a PeftModel's forward does not name them
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=result.task.collator(tokenizer),
        compute_metrics=result.task.compute_metrics,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _batches(trainer: Trainer, examples: Any, limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first `limit` examples, in batches on the model's device."""
    size = trainer.args.per_device_train_batch_size
    count = min(limit, len(examples))
    for start in range(0, count, size):
        batch = trainer.data_collator([examples[i] for i in range(start, min(start + size, count))])
        yield {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}


@contextmanager
def _undisturbed_random_state() -> Iterator[None]:
    """Measuring draws dropout masks; training must start from the same random state as without measuring."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _measure_before(result: FinetuneResult, trainer: Trainer) -> None:
    model = trainer.model
    batch = next(_batches(trainer, trainer.train_dataset, result.options.batch_size))
    model.train()
    result.saved_activation_bytes = saved_activation_bytes(model, lambda: model(**batch).loss)
    with model.disable_adapter():  # a fresh one may change the outputs: init_weights="bert"
        result.base_similarity = _similarity(result, trainer)


def _measure_after(result: FinetuneResult, trainer: Trainer) -> None:
    result.similarity = _similarity(result, trainer)
    result.lambdas = _lambdas(trainer.model)


def _similarity(result: FinetuneResult, trainer: Trainer) -> list[float]:
    """Token similarity by layer over the first examples of the evaluation set, or of the training set.

    Of an encoder-decoder model that of the encoder; empty, and a note, where it cannot be measured.
    """
    examples = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    output = "encoder_hidden_states" if trainer.model.config.is_encoder_decoder else "hidden_states"
    try:
        return similarity_by_layer(trainer.model, _batches(trainer, examples, _SIMILARITY_EXAMPLES), output)
    except NoPairs as error:
        note = f"token similarity was not measured: {error}"
        if note not in result.notes:
            result.notes.append(note)
        return []


def _train(result: FinetuneResult, trainer: Trainer, console: Console, output: Path) -> None:
    progress = ProgressAndLog(console, output / LOSS_LOG, result.options.method)
    trainer.add_callback(progress)
    with progress:
        try:
            trainer.train()
        except KeyboardInterrupt:
            result.interrupted = True
            console.print(f"interrupted at step {progress.last_step}: saving the adapter as it is")
    result.log = progress.rows
    result.metrics = _metrics(trainer)
    result.steps = progress.last_step
    result.seconds_per_step = statistics.median(progress.step_seconds) if progress.step_seconds else None


def _metrics(trainer: Trainer) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics by name) of every evaluation, if the task has metrics."""
    of_trainer = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    metrics = []
    for row in trainer.state.log_history:
        names = [name for name in row if name.startswith("eval_") and name not in of_trainer]
        if names:
            metrics.append((row["step"], {name.removeprefix("eval_"): row[name] for name in names}))
    return metrics

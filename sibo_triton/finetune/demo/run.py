"""`sibo-triton demo`: a small decoder learns to add, is frozen, and learns to subtract with a plain method and SIBO's.

LoRA and SIBO-LoRA, or with `--adapters` bottleneck adapters, plain and SIBO's.

Fine-tuning is done as by `sibo-triton finetune`, on files: the base model's folder, a JSONL file of prompts and
completions, one adapter folder for each method. The outcome is reported, whatever it is.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sibo_triton.environment import provenance
from sibo_triton.finetune.data import read_examples
from sibo_triton.finetune.demo import task
from sibo_triton.finetune.demo.report import METHOD_NAMES, print_outcome, write_demo_report
from sibo_triton.finetune.demo.timing import seconds_per_step
from sibo_triton.finetune.options import ADAPTER_METHODS, LORA_METHODS, METHODS, FinetuneOptions, InputError
from sibo_triton.finetune.result import FinetuneResult
from sibo_triton.finetune.tokens import completion_collator, tokenize_examples
from sibo_triton.finetune.train import finetune
from sibo_triton.saved_activations import saved_activation_bytes

RESULTS = "results.json"

# Without these the comparison is meaningless.
_BASE_OWN_TASK_AT_LEAST = 0.8
_BASE_NEW_TASK_AT_MOST = 0.1
_PLAIN_NEW_TASK_AT_LEAST = 0.5

_SHOWN = 5  # problems


def run_demo(
    output: Path,
    seed: int = 0,
    console: Console | None = None,
    scale: task.Scale | None = None,
    methods: tuple[str, ...] = LORA_METHODS,
) -> list[str]:
    """Run the demonstration and write everything to the folder `output`.

    Args:
        output: created if needed; the folder of an earlier demonstration is replaced.
        seed: of the base model, of the data and of both adapters.
        console: where the table goes; default: the terminal.
        scale: sizes and numbers of steps; default: those for which the thresholds are made.
        methods: the plain method and SIBO's: `LORA_METHODS` or `ADAPTER_METHODS`.

    Returns:
        The problems, one sentence each: the base model cannot add, or can already subtract; the plain method did not
        learn to subtract; a reloaded adapter answers differently than before it was saved. Empty if there are none.

    Raises:
        InputError: `output` contains files that are not a demonstration's.
    """
    console, scale = console or Console(), scale or task.Scale()
    _claim(output)
    began = time.perf_counter(), time.process_time()
    results: dict[str, Any] = {"seed": seed, "scale": asdict(scale)}
    with _one_thread(), _no_weight_loading_bars():
        results["threads"] = torch.get_num_threads()
        base = _train_base(output, seed, scale, console, results)
        runs = _finetune_both(output, seed, scale, console, methods)
        answers = _answers(output, seed, base, runs, results)
        _measure(output, runs, scale, results)
    option = " --adapters" if methods == ADAPTER_METHODS else ""
    results["provenance"] = {"command": f"sibo-triton demo{option} --seed {seed}"} | provenance()
    results["seconds"] = {"wall": time.perf_counter() - began[0], "cpu": time.process_time() - began[1]}
    results["problems"] = _problems(results)
    (output / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_demo_report(output, results, runs, answers)
    print_outcome(console, output, results, answers)
    return results["problems"]


def _claim(output: Path) -> None:
    """Create the folder, or delete an earlier demonstration's files in it; refuse anything else."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file: name a folder.")
    if output.is_dir() and any(output.iterdir()) and not (output / RESULTS).is_file():
        raise InputError(f"--output {output} is not empty, and holds no demonstration: name another folder.")
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).write_text("{}\n", encoding="utf-8")  # first: marks the folder as ours if we are interrupted
    for name in ("base", *METHODS):
        if (output / name).is_dir():
            shutil.rmtree(output / name)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread: the same numbers on every machine, and a second thread gains little on such small matrices.

    If other work uses the cores, threads that wait for each other cost a lot: such a run took 6 minutes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_weight_loading_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _train_base(output: Path, seed: int, scale: task.Scale, console: Console, results: dict[str, Any]) -> Any:
    """Train the base model on additions and save it to a folder for `from_pretrained`."""
    console.print(f"1. A decoder of {scale.layers} layers with random weights learns to add")
    tokenizer = task.build_tokenizer()
    model = task.build_base(scale, tokenizer, seed)
    train, test = task.additions(seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        shown = bar.add_task("base", total=scale.base_steps, loss="")
        task.train_base(
            model,
            tokenizer,
            train,
            scale,
            seed,
            lambda step, loss: bar.update(shown, completed=step, loss=f"loss {loss:.4f}"),
        )
    results["base_parameters"] = sum(parameter.numel() for parameter in model.parameters())
    results["base_own_accuracy"] = task.exact_match(test, task.answers(model, tokenizer, test))
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    console.print(f"   it answers {results['base_own_accuracy']:.1%} of {len(test)} unseen additions; it is now frozen")
    return model


def _finetune_both(
    output: Path, seed: int, scale: task.Scale, console: Console, methods: tuple[str, ...]
) -> dict[str, FinetuneResult]:
    """Fine-tune with each method: equal data, seed and steps."""
    train, test = task.subtractions(seed)
    files = {"train": output / "subtraction-train.jsonl", "test": output / "subtraction-test.jsonl"}
    for path, problems in zip(files.values(), (train, test), strict=True):
        rows = (json.dumps({"prompt": problem.prompt, "completion": problem.completion}) for problem in problems)
        path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    runs = {}
    for number, method in enumerate(methods, start=2):
        is_lora = method in LORA_METHODS
        console.print(f"{number}. {METHOD_NAMES[method]} teaches it to subtract")
        options = FinetuneOptions(
            model=str(output / "base"),
            data=files["train"],
            eval_data=files["test"],
            output=output / method,
            method=method,
            target_modules=("all-linear",) if is_lora else None,
            rank=scale.rank if is_lora else None,
            bottleneck_size=None if is_lora else scale.bottleneck,
            dropout=0.0,
            max_steps=scale.adapter_steps,
            batch_size=scale.batch,
            learning_rate=scale.adapter_rate,
            seed=seed,
        )
        runs[method] = finetune(options, console)
    return runs


def _load(output: Path, method: str | None, trainable: bool = False) -> Any:
    """The base model from its folder, with or without a saved adapter."""
    base = AutoModelForCausalLM.from_pretrained(output / "base")
    return base if method is None else PeftModel.from_pretrained(base, output / method, is_trainable=trainable)


def _answers(
    output: Path, seed: int, base: Any, runs: dict[str, FinetuneResult], results: dict[str, Any]
) -> list[dict[str, str]]:
    """Exact match on unseen subtractions of the base model and of each *reloaded* adapter, and a few of the answers."""
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    _, test = task.subtractions(seed)
    answers = {"base": task.answers(base, tokenizer, test)}
    results["reloaded_equal"] = {}
    for method, run in runs.items():
        trained = task.answers(run.model, tokenizer, test)
        answers[method] = task.answers(_load(output, method).to(run.device), tokenizer, test)
        results["reloaded_equal"][method] = answers[method] == trained
    results["accuracy"] = {name: task.exact_match(test, texts) for name, texts in answers.items()}
    results["test_problems"] = len(test)
    return [
        {"problem": f"{p.a} - {p.b}", "right": str(p.answer)}
        | {n: task.readable(texts[i]) for n, texts in answers.items()}
        for i, p in enumerate(test[:_SHOWN])
    ]


def _measure(output: Path, runs: dict[str, FinetuneResult], scale: task.Scale, results: dict[str, Any]) -> None:
    """Fill in the rest of the table, with fresh copies of the models, since timing steps trains them."""
    device = next(iter(runs.values())).device
    frozen = _load(output, None)
    frozen.requires_grad_(False).enable_input_require_grads()
    models = {"base": frozen} | {method: _load(output, method, trainable=True) for method in runs}
    for model in models.values():
        model.to(device)
    batch = _batch(output, scale, device)
    any_run = next(iter(runs.values()))
    results["trainable_parameters"] = {"base": 0} | {m: run.trainable_parameters for m, run in runs.items()}
    results["loss"] = {"base": any_run.losses("eval_loss")[0][1]} | {
        m: run.losses("eval_loss")[-1][1] for m, run in runs.items()
    }
    frozen.train()
    frozen_bytes = saved_activation_bytes(frozen, lambda: frozen(**batch).loss)
    results["saved_activation_bytes"] = {"base": frozen_bytes} | {
        m: run.saved_activation_bytes for m, run in runs.items()
    }
    results["similarity_by_layer"] = {"base": any_run.base_similarity} | {m: run.similarity for m, run in runs.items()}
    results["seconds_per_step"] = seconds_per_step(models, batch, scale.timed_steps)


def _batch(output: Path, scale: task.Scale, device: str) -> dict[str, torch.Tensor]:
    """The first training examples, as `finetune` makes them."""
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    tokens = tokenize_examples(read_examples(output / "subtraction-train.jsonl"), tokenizer, max_length=32)
    rows = [{"input_ids": tokens.input_ids[i], "labels": tokens.labels[i]} for i in range(scale.batch)]
    batch = completion_collator(tokenizer, str(output / "base"))(rows)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _problems(results: dict[str, Any]) -> list[str]:
    own_accuracy, accuracy = results["base_own_accuracy"], results["accuracy"]
    problems = []
    if own_accuracy < _BASE_OWN_TASK_AT_LEAST:
        share = f"{own_accuracy:.1%} of additions, fewer than {_BASE_OWN_TASK_AT_LEAST:.0%}"
        problems.append(f"the base model answers {share}")
    if accuracy["base"] > _BASE_NEW_TASK_AT_MOST:
        problems.append(
            f"the base model already answers {accuracy['base']:.1%} of subtractions, more than "
            f"{_BASE_NEW_TASK_AT_MOST:.0%}"
        )
    plain = next(method for method in accuracy if method in (LORA_METHODS[0], ADAPTER_METHODS[0]))
    if accuracy[plain] < _PLAIN_NEW_TASK_AT_LEAST:
        name, share = METHOD_NAMES[plain], accuracy[plain]
        problems.append(f"{name} answers {share:.1%} of subtractions, fewer than {_PLAIN_NEW_TASK_AT_LEAST:.0%}")
    for method, equal in results["reloaded_equal"].items():
        if not equal:
            problems.append(f"the reloaded {METHOD_NAMES[method]} adapter answers otherwise than before it was saved")
    return problems

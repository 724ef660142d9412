"""The options of `sibo-triton finetune`, and the checks that need no model and no data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sibo_triton.bottleneck import SiboAdapterConfig
from sibo_triton.options import SiboOptions
from sibo_triton.reference import ACTIVATIONS

if TYPE_CHECKING:
    from sibo_triton.finetune.recipes import Recipe

CAUSAL_LM, CLASSIFICATION, REGRESSION = "causal-lm", "classification", "regression"
TASKS = (CAUSAL_LM, CLASSIFICATION, REGRESSION)
LORA_METHODS = ("lora", "sibo-lora")
ADAPTER_METHODS = ("adapter", "sibo-adapter")
METHODS = LORA_METHODS + ADAPTER_METHODS
CHECKPOINTS = "checkpoints"  # the Trainer's folder in the output folder

PLACEMENTS = ("series", "parallel")
SIDES = ("input", "output")
INITS = ("zero", "bert")
DTYPES = ("auto", "float32", "bfloat16")

ALL_LINEAR = "all-linear"


class InputError(ValueError):
    """The user's input cannot be used. The message is one line: what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none, for our one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of one fine-tuning run; `sibo-triton finetune --help` says what each means.

    `None` means that the default depends: `target_modules`, `sibo_target_modules` and `sibo_blocks` on the
    architecture, `rank`, `bottleneck_size`, `activation`, `placement`, `side`, `init_weights` and `sibo_lambda` on the
    method, `alpha` on the rank, `warmup_steps` on the number of steps, `max_length` on the model. `recipe`: its prompt
    and labels are used; its other settings are already in the options.
    """

    model: str
    data: Path
    output: Path
    task: str = CAUSAL_LM
    method: str = "sibo-lora"
    target_modules: tuple[str, ...] | None = None
    sibo_lambda: float | None = None
    sibo_learnable: bool = False
    sibo_target_modules: tuple[str, ...] | None = None
    sibo_blocks: tuple[str, ...] | None = None
    rank: int | None = None
    alpha: int | None = None
    bottleneck_size: int | None = None
    activation: str | None = None
    placement: str | None = None
    side: str | None = None
    init_weights: str | None = None
    dropout: float = 0.05
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 3e-4
    warmup_steps: int | None = None
    max_length: int | None = None
    eval_fraction: float = 0.0
    eval_data: Path | None = None
    seed: int = 0
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    save_steps: int = 500
    overwrite: bool = False
    recipe: Recipe | None = None

    @property
    def mixes(self) -> bool:
        """Whether the method is SIBO's."""
        return self.method.startswith("sibo-")

    @property
    def is_lora(self) -> bool:
        """Whether the method is LoRA, not bottleneck adapters."""
        return self.method in LORA_METHODS

    @property
    def lora_rank(self) -> int:
        """r of LoRA."""
        return 16 if self.rank is None else self.rank

    @property
    def lora_alpha(self) -> int:
        """alpha of s = alpha / r; twice the rank by default, as in the authors' runs."""
        return 2 * self.lora_rank if self.alpha is None else self.alpha

    @property
    def bottleneck(self) -> int:
        """Width of an adapter's bottleneck; the authors' by default."""
        return SiboAdapterConfig.bottleneck_size if self.bottleneck_size is None else self.bottleneck_size

    @property
    def lambda_(self) -> float:
        """The mixing ratio: 0 for the plain methods."""
        if not self.mixes:
            return 0.0
        return SiboOptions.sibo_lambda if self.sibo_lambda is None else self.sibo_lambda


def check_options(options: FinetuneOptions) -> None:
    """Raise an `InputError` that names the option, for any value that no run could use."""
    _one_of("--task", options.task, TASKS)
    if options.recipe is not None and options.task != CAUSAL_LM:
        raise InputError(f"--recipe is for --task {CAUSAL_LM}, not {options.task}: drop one of the two.")
    _one_of("--method", options.method, METHODS)
    _one_of("--dtype", options.dtype, DTYPES)
    for name in ("batch_size", "gradient_accumulation", "save_steps"):
        _at_least_one(name, getattr(options, name))
    for name in ("rank", "alpha", "bottleneck_size", "max_steps"):
        if getattr(options, name) is not None:
            _at_least_one(name, getattr(options, name))
    if options.max_length is not None and options.max_length < 2:
        raise InputError(f"--max-length is {options.max_length}: at least 2 tokens are needed to predict one.")
    if options.warmup_steps is not None and options.warmup_steps < 0:
        raise InputError(f"--warmup-steps is {options.warmup_steps}: give 0 for no warm-up, or more.")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed is {options.seed}: it must lie in [0, 2**32).")
    for name, value in (("--epochs", options.epochs), ("--learning-rate", options.learning_rate)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value}: it must be a number above 0.")
    if not 0.0 <= options.dropout < 1.0:
        raise InputError(f"--dropout is {options.dropout}: it must lie in [0, 1).")
    if not 0.0 <= options.eval_fraction < 1.0:
        raise InputError(f"--eval-fraction is {options.eval_fraction}: it must lie in [0, 1).")
    if options.eval_fraction and options.eval_data is not None:
        raise InputError("--eval-fraction and --eval-data are both given: keep the one that says what to evaluate on.")
    _check_method(options)
    check_output(options.output, options.model, options.overwrite)
    for name in ("model", "data", "eval_data"):
        path = getattr(options, name)
        if path is not None and Path(path).resolve().is_relative_to((options.output / CHECKPOINTS).resolve()):
            raise InputError(
                f"{_flag(name)} {path} lies in {options.output / CHECKPOINTS}, where a run replaces checkpoints: name "
                "another folder in --output."
            )


_OF_ADAPTERS = ("bottleneck_size", "activation", "placement", "side", "init_weights")


def _check_method(options: FinetuneOptions) -> None:
    for name, choices in (("placement", PLACEMENTS), ("side", SIDES), ("init_weights", INITS)):
        if getattr(options, name) is not None:
            _one_of(_flag(name), getattr(options, name), choices)
    if options.placement == "parallel" and options.side == "output":
        raise InputError(
            "--side output is for --placement series: a parallel adapter reads the module's input. Drop one of the two."
        )
    if options.activation is not None:
        _one_of("--activation", options.activation, tuple(sorted(ACTIVATIONS)))
    for name in _OF_ADAPTERS if options.is_lora else ("rank", "alpha"):
        if getattr(options, name) is not None:
            kind = "adapter" if options.is_lora else "lora"
            raise InputError(
                f"{_flag(name)} has no effect with --method {options.method}: drop it, or use --method "
                f"{'sibo-' if options.mixes else ''}{kind}."
            )
    if not options.mixes:
        without_effect = [
            name
            for name, used in (
                ("--sibo-lambda", options.sibo_lambda is not None),
                ("--sibo-learnable", options.sibo_learnable),
                ("--sibo-target-modules", options.sibo_target_modules is not None),
                ("--sibo-blocks", options.sibo_blocks is not None),
            )
            if used
        ]
        if without_effect:
            raise InputError(
                f"{without_effect[0]} has no effect with --method {options.method}: drop it, or use --method "
                f"sibo-{options.method}."
            )
    elif not 0.0 <= options.lambda_ <= 1.0:  # NaN fails the comparison too
        raise InputError(f"--sibo-lambda is {options.lambda_}: it must lie in [0, 1]; the paper uses 0.1 to 0.3.")
    elif options.sibo_learnable and options.lambda_ in (0.0, 1.0):
        raise InputError(
            f"--sibo-learnable cannot start from --sibo-lambda {options.lambda_}: a learnable lambda is a sigmoid, "
            "which cannot leave 0 or 1. Start from a value between, such as 0.1."
        )


def check_output(output: Path, model: str, overwrite: bool) -> None:
    """Raise an `InputError` if writing to the output folder would overwrite something."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file: name a folder.")
    if Path(model).exists() and output.resolve() == Path(model).resolve():
        raise InputError(f"--output {output} is the base model's own folder: name another, its files would be mixed.")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise InputError(
            f"--output {output} is not empty: name another folder, or pass --overwrite to replace the files of an "
            "earlier run in it."
        )


def _flag(name: str) -> str:
    """The command line's name of an option."""
    return f"--{name.replace('_', '-')}"


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{option} is {value!r}: choose one of {', '.join(choices)}.")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{_flag(name)} is {value}: it must be at least 1.")

"""The outcome of one fine-tuning run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sibo_triton.finetune.options import FinetuneOptions
from sibo_triton.finetune.tasks import Task


@dataclass
class FinetuneResult:
    """The outcome and measurements of a run.

    Attributes:
        notes: messages to the user: defaults that were chosen, examples cut or left out.
        examples, eval_examples: how many were trained and evaluated on; truncated, dropped: how many were cut or left
            out, training and evaluation together.
        modules, mixing_modules: how many modules got an adapter, and how many of these mix.
        lambdas: lambda of every mixing module after training, by module name.
        task: the task that was learned.
        metrics: (step, metrics by name) of every evaluation; empty for causal language models.
        log: the rows of loss.csv.
        seconds_per_step: median wall time of an optimizer step, or None if none was made.
        saved_activation_bytes: see `saved_activation_bytes`, on the first batch, in training mode.
        base_similarity, similarity: token similarity at each layer, of the frozen model and with the trained adapter.
        interrupted: training was stopped by the user; the adapter is saved in that state.
        model: the trained `PeftModel`, in memory.
    """

    options: FinetuneOptions
    max_length: int
    task: Task
    notes: list[str] = field(default_factory=list)
    examples: int = 0
    eval_examples: int = 0
    truncated: int = 0
    dropped: int = 0
    device: str = ""
    dtype: str = ""
    parameters: int = 0
    trainable_parameters: int = 0
    modules: int = 0
    mixing_modules: int = 0
    lambdas: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 0
    steps: int = 0
    planned_steps: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds_per_step: float | None = None
    saved_activation_bytes: int = 0
    base_similarity: list[float] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    interrupted: bool = False
    model: Any = field(default=None, repr=False)

    def losses(self, name: str = "loss") -> list[tuple[int, float]]:
        """(step, value) of every logged "loss" or "eval_loss"."""
        return [(row["step"], float(row[name])) for row in self.log if row[name] is not None]

    @property
    def has_similarity(self) -> bool:
        """Whether token similarity was measured, before training and after it."""
        return bool(self.base_similarity and self.similarity)

    @property
    def diverged(self) -> bool:
        """Whether a loss was NaN or infinite."""
        return any(not math.isfinite(value) for name in ("loss", "eval_loss") for _, value in self.losses(name))

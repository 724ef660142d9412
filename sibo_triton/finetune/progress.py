"""The progress bar and the loss log during training."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

LOG_COLUMNS = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")


class ProgressAndLog(TrainerCallback):
    """A `Trainer` callback: a progress bar with the loss, and a row in a CSV file each time the Trainer logs.

    Use it as a context manager around `trainer.train()`, so that an interrupted run leaves the terminal and the file
    intact.

    Attributes:
        rows: the log, as dicts with the keys of `LOG_COLUMNS` (None if the Trainer gave no value).
        step_seconds: wall time of each optimizer step, from its first forward to its update.
        last_step: the number of optimizer steps.
    """

    def __init__(self, console: Console, path: Path, description: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.step_seconds: list[float] = []
        self.last_step = 0
        self._description = description
        self._path = path
        self._started = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> ProgressAndLog:
        self._file = self._path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, LOG_COLUMNS)
        self._writer.writeheader()
        self._task = self._bar.add_task(self._description, total=None, loss="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._file.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self._task, total=state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._started)
        self.last_step = state.global_step
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" not in logs and "eval_loss" not in logs:  # the summary at the end of training
            return
        row = {name: logs.get(name) for name in LOG_COLUMNS} | {"step": state.global_step}
        self.rows.append(row)
        self._writer.writerow(row)
        self._file.flush()  # the log is kept even after a crash
        if row["loss"] is not None:
            self._bar.update(self._task, loss=f"loss {float(row['loss']):.4f}")

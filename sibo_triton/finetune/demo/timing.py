"""The time of a training step of several models, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_WARMUP_ROUNDS = 3


def seconds_per_step(models: Mapping[str, Any], batch: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Median wall time of one training step of each model, with the models taking turns.

    They take turns, since other work on the machine would otherwise affect only one of them. A model with trainable
    parameters does forward, backward and an AdamW update, which changes it; one without does forward and backward, so
    its embedding output must require grad (`enable_input_require_grads`).
    """
    steps = {name: _step(model, batch) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for round_ in range(_WARMUP_ROUNDS + rounds):
        for i in range(len(names)):
            name = names[(i + round_) % len(names)]
            begin = time.perf_counter()
            steps[name]()
            if round_ >= _WARMUP_ROUNDS:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def _step(model: Any, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None

    def step() -> None:
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return step

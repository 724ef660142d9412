"""Counts one forward and backward of a provider's model per layer, on tensors without data.

Models of one and of two layers are run; each further layer counts as the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from benchmarks import models
from benchmarks.counting import Counts, count_step, summed, to_fake
from benchmarks.launch_traffic import Traffic
from benchmarks.models import LLAMA_3_8B, Architecture
from benchmarks.providers import Provider
from benchmarks.settings import BF16, AdapterSetting


@dataclass(frozen=True)
class Workload:
    """A model in bfloat16, and the size of its batch."""

    architecture: Architecture = LLAMA_3_8B
    batch: int = 4
    length: int = 2048

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def uninitialised_model(architecture: Architecture) -> PreTrainedModel:
    """On the CPU, not initialised, so that untouched weights take no memory. Its input requires a gradient."""
    # the embeddings are frozen, and there is no head
    model = models.frozen_model(architecture, "meta", torch.bfloat16, vocabulary=128, head=False).to_empty(device="cpu")
    for buffer in model.buffers():  # positions, needed by the trial run that finds which layers share x
        buffer.zero_()
    model.config.use_cache = False
    model.enable_input_require_grads()
    return model


def operations_of(
    provider: Provider, setting: AdapterSetting, work: Workload, layers: int
) -> tuple[list[Traffic], int]:
    """The operations of one step of the whole model, and the bytes that it keeps for the backward."""
    model: nn.Module = provider.wrap(uninitialised_model(work.architecture.with_layers(layers)), setting)
    with FakeTensorMode() as mode:
        to_fake(model, mode)
        tokens = torch.zeros(work.batch, work.length, dtype=torch.int64)
        return count_step(model, lambda: model(input_ids=tokens).last_hidden_state)


@dataclass(frozen=True)
class StepCounts:
    """The counts of a step, for models of any depth."""

    one_layer: Counts  # of a model with one layer, including what occurs once per network
    further_layer: Counts
    kernels: dict[str, dict[str, int]]  # of a model with one layer, by name

    def per_layer(self, layers: int) -> Counts:
        """The counts of a model with so many layers, divided by their number."""
        return (self.one_layer + self.further_layer * (layers - 1)) * (1 / layers)

    def __sub__(self, other: StepCounts) -> StepCounts:
        return StepCounts(self.one_layer - other.one_layer, self.further_layer - other.further_layer, self.kernels)


def step_of(provider: Provider, setting: AdapterSetting, work: Workload) -> StepCounts:
    one, two = (operations_of(provider, setting, work, layers) for layers in (1, 2))
    return StepCounts(summed(*one), summed(*two) - summed(*one), kernels_of(one[0]))


@cache
def floor_of(work: Workload) -> StepCounts:
    """The counts of the frozen model."""
    return step_of(Provider(), BF16, work)


def kernels_of(operations: list[Traffic]) -> dict[str, dict[str, int]]:
    """Sums over the launches of each of our kernels."""
    names = dict.fromkeys(operation.name for operation in operations if operation.grid is not None)
    table = {}
    for name in names:
        launches = [operation for operation in operations if operation.name == name]
        sums = {f: sum(getattr(operation, f) for operation in launches) for f in ("read", "written", "reread", "flops")}
        table[name] = {"launches": len(launches), **sums}
    return table

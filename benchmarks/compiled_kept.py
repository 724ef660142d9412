"""What a peer keeps for the backward under `torch.compile`, without a GPU: Inductor as far as its partition.

Inductor's own passes trace, rewrite and cut the step into a forward and a backward, which is where it is decided what
is kept and what is computed again; only code is not generated. Launches and bytes moved are not counted: which
operations become one kernel is decided after the cut, by a scheduler that differs between CPU and GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counting import to_fake
from benchmarks.model_counts import Workload, frozen_model
from benchmarks.providers import Provider
from benchmarks.settings import AdapterSetting, Setting
from sibo_triton.finetune.saved_activations import saved_activation_bytes


def kept_bytes(provider: Provider, setting: AdapterSetting, work: Workload) -> int:
    """By one step of a provider's model of one layer, compiled."""
    model: nn.Module = provider.wrap(frozen_model(work.architecture.with_layers(1)), setting)
    torch._dynamo.reset()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            to_fake(model, mode)
            tokens = torch.zeros(work.batch, work.length, dtype=torch.int64)
            compiled: Any = torch.compile(model, backend=_until_partition, dynamic=False)
            return saved_activation_bytes(model, lambda: compiled(input_ids=tokens).last_hidden_state)
    finally:
        torch._dynamo.reset()


def _until_partition(graph: Any, inputs: list[Tensor]) -> Callable:
    """Inductor's backend, which runs each half of the partitioned graph as it is in place of generating its code."""
    return compile_fx(graph, inputs, inner_compile=lambda half, *_, **__: make_boxed_func(half.forward))


@cache
def _floor(work: Workload) -> int:
    return kept_bytes(Provider(), Setting(fp32_adapters=False, dropout=0.0), work)


def added_kept_bytes(provider: Provider, setting: AdapterSetting, work: Workload) -> int:
    """By the adapters of a layer, over what the compiled frozen model keeps. One layer tells: h0 is its input."""
    return kept_bytes(provider, setting, work) - _floor(work)

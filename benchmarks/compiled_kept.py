"""What a peer keeps for the backward under `torch.compile`, without a GPU: Inductor runs up to its partition.

Inductor's passes trace, rewrite and partition the step into a forward and a backward, which determines what is kept and
what is recomputed; only code generation is skipped. Launches and bytes moved are not counted: which operations are
fused is decided later, by a scheduler that differs between CPU and GPU.
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
from benchmarks.model_counts import Workload, uninitialised_model
from benchmarks.providers import Provider
from benchmarks.settings import BF16, AdapterSetting
from sibo_triton.saved_activations import saved_activation_bytes


def kept_bytes(provider: Provider, setting: AdapterSetting, work: Workload) -> int:
    """The bytes that one step of a provider's compiled one-layer model keeps."""
    model: nn.Module = provider.wrap(uninitialised_model(work.architecture.with_layers(1)), setting)
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
    """Inductor's backend, but running both halves of the partitioned graph without generating code."""
    return compile_fx(graph, inputs, inner_compile=lambda half, *_, **__: make_boxed_func(half.forward))


@cache
def _floor(work: Workload) -> int:
    return kept_bytes(Provider(), BF16, work)


def added_kept_bytes(provider: Provider, setting: AdapterSetting, work: Workload) -> int:
    """The bytes that a layer's adapters add to the compiled frozen model's. One layer suffices: h0 is its input."""
    return kept_bytes(provider, setting, work) - _floor(work)

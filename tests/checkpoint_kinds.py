"""The ways of checkpointing a model, and how the tests compare the gradients that they give."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.modeling_layers import GradientCheckpointingLayer

Enable = Callable[[nn.Module], None]


def nothing(model: nn.Module) -> None:
    pass


def reentrant(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()


def non_reentrant(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def non_reentrant_with_input_gradients(model: nn.Module) -> None:
    non_reentrant(model)
    model.enable_input_require_grads()


def wrapper(model: nn.Module, kind: CheckpointImpl = CheckpointImpl.NO_REENTRANT) -> None:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: isinstance(module, GradientCheckpointingLayer),
    )


def reentrant_wrapper(model: nn.Module) -> None:
    model.enable_input_require_grads()
    wrapper(model, CheckpointImpl.REENTRANT)


def checkpoint(model: nn.Module, enable: Enable) -> Enable:
    """Enable checkpointing: the wrappers are for the base model, the rest for whichever model the user has."""
    return enable(model.get_base_model() if enable in (wrapper, reentrant_wrapper) else model)


KINDS = {
    "reentrant": reentrant,
    "non_reentrant": non_reentrant,
    "non_reentrant_with_input_gradients": non_reentrant_with_input_gradients,
    "checkpoint_wrapper": wrapper,
    "reentrant_checkpoint_wrapper": reentrant_wrapper,
}


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    # a wrapper puts its name into the parameters'
    named = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in model.named_parameters()}
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def assert_same(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")

"""The arguments of the operations, for LoRA and bottleneck adapters alike, and the tensors saved for the backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of one call; also used for the gradient of each, and for whether each requires one.

    The low-rank product is added to the frozen product if there is a weight, else to the base if there is one, else to
    x (an adapter in series).
    """

    base: Any  # [..., N], what the frozen layer returned; or None
    x: Any  # [..., K]
    weight: Any  # [N, K], of the frozen layer, or None
    bias: Any  # [N], or None
    lora_a: Any  # [r, K], or W_down
    lora_b: Any  # [N, r], or W_up
    lora_bias: Any  # [N], or None
    down_bias: Any  # [r], or None: with an activation
    initial_residual: Any  # like x, or None
    lambda_: Any  # one element, or None: a number, in Settings
    scaling: Any  # likewise
    seed: Any  # int64, [1], or None


class Settings(NamedTuple):
    """The arguments of one call that are not tensors, and its dtypes.

    Attributes:
        backend: as `dispatch.Choice` names it.
        scaling, lambda_: the numbers; not used where `Inputs` has a tensor instead.
        dropout_p: the probability of dropping an element.
        dtype: of y and of the frozen product.
        x_dtype, residual_dtype: of x and of h0.
        adapter_dtype: of A and B, or autocast's.
        activation: f's name, or None.
    """

    backend: str
    scaling: float
    lambda_: float
    dropout_p: float
    dtype: torch.dtype
    x_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    adapter_dtype: torch.dtype
    activation: str | None = None


class Saved(NamedTuple):
    """The tensors saved for the backward; None where no wanted gradient reads one. Siblings share the first two."""

    x: Any
    initial_residual: Any
    weight: Any
    lora_a: Any
    lora_b: Any
    lora_bias: Any
    lambda_: Any
    scaling: Any
    seed: Any
    t: Any
    difference: Any


def lambda_of(settings: Settings, tensors: Inputs | Saved) -> float | Tensor:
    """lambda, a number or a tensor with one element."""
    return settings.lambda_ if tensors.lambda_ is None else tensors.lambda_


def scaling_of(settings: Settings, tensors: Inputs | Saved) -> float | Tensor:
    """s, a number or a tensor with one element."""
    return settings.scaling if tensors.scaling is None else tensors.scaling

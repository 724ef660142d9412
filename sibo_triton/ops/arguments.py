"""What the operations compute with, of either kind of adapter: tensors, settings, and what is kept for the backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of one call, or what stands for each of them: its gradient, or whether it wants one.

    What the low-rank product is added to is the frozen product, if there is a weight, or else the base, or else x: the
    adapter in series.
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
    """What is no tensor with a gradient.

    Attributes:
        backend: "triton" or "torch".
        scaling, lambda_: the numbers, where they are no tensors.
        dropout_p: the rate.
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
    """What the backward reads; None where the wanted gradients do not need it."""

    x: Any
    weight: Any
    lora_a: Any
    lora_b: Any
    lora_bias: Any
    initial_residual: Any
    lambda_: Any
    scaling: Any
    seed: Any
    t: Any
    difference: Any


def scaling_of(settings: Settings, tensors: Inputs | Saved) -> float | Tensor:
    """s, a number or a tensor with one element."""
    return settings.scaling if tensors.scaling is None else tensors.scaling

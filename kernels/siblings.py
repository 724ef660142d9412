"""What one of several layers that share x and h0 brings to a pass over them. Needs torch only, not Triton.

Siblings (q, k and v; gate and up) read the same x, so one pass over it, and over the gradient of it, serves them all.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DownProjection(NamedTuple):
    """``t = drop((1 - lambda) x + lambda h0) A^T`` and, where wanted, ``d = drop(h0 - x) A^T``."""

    lora_a: Tensor  # [r, K]
    lambda_: float | Tensor = 0.0  # a number in [0, 1], or a floating point tensor with one element
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None  # int64, one element; needed if dropout_p > 0
    difference: bool = False  # also ask for d, which the gradient of lambda needs

    @property
    def mixes(self) -> bool:
        """Whether h0 is read."""
        return self.difference or isinstance(self.lambda_, Tensor) or self.lambda_ != 0

    @property
    def kind(self) -> tuple[torch.dtype, bool, bool, bool]:
        """What must be the same to share a launch."""
        return self.lora_a.dtype, self.mixes, self.dropout_p > 0, self.difference


class UpProjection(NamedTuple):
    """``y = s (t B^T + b) + b0``."""

    lora_b: Tensor  # [N, r]
    scaling: float | Tensor
    lora_bias: Tensor | None = None  # [N]
    base_bias: Tensor | None = None  # [N], of the frozen layer


class UpGradients(NamedTuple):
    """``u = s dY B`` and ``dB = s dY^T t``."""

    grad_y: Tensor  # [M, N]
    t: Tensor | None  # [M, r]; not looked at where dB is not wanted
    lora_b: Tensor  # [N, r]
    scaling: float | Tensor
    wants_u: bool = True
    grad_dtype: torch.dtype | None = torch.float32  # of dB; None: not wanted


class DownGradients(NamedTuple):
    """``dA = u^T drop(x~)``, and the share of ``dx~ = drop'(u A)`` that goes to x and to h0."""

    u: Tensor  # [M, r], the gradient of t
    lora_a: Tensor | None  # [r, K]; may be None where no gradient of x or h0 is wanted
    adapter_dtype: torch.dtype  # of A
    lambda_: float | Tensor = 0.0
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    grad_dtype: torch.dtype | None = torch.float32  # of dA; None: not wanted

    @property
    def mixes(self) -> bool:
        """Whether h0 has a share."""
        return isinstance(self.lambda_, Tensor) or self.lambda_ != 0

    @property
    def kind(self) -> tuple[torch.dtype, bool, bool]:
        """What must be the same to share a launch for dA."""
        return self.adapter_dtype, self.mixes, self.dropout_p > 0

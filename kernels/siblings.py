"""The arguments of one layer among siblings, which share x and h0 and a pass over them. Needs torch only, not Triton.

Siblings (q, k and v; gate and up) read the same x: one pass over x, and one over its gradient, is enough for all.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def kept_dtype(x_dtype: torch.dtype, adapter_dtype: torch.dtype) -> torch.dtype:
    """The dtype of t, d and the pre-activation: x's and the adapter's if they are the same, else at least float32.

    In torch's modules they have x's dtype too: the next product rounds t to it anyway, and float16 overflows alike.
    """
    if x_dtype == adapter_dtype:
        return adapter_dtype
    return torch.float64 if adapter_dtype == torch.float64 else torch.float32


def mixes(lambda_: float | Tensor) -> bool:
    """Whether h0 has a share: not where lambda is the number 0. A tensor's value is not looked at."""
    return isinstance(lambda_, Tensor) or lambda_ != 0


class DownProjection(NamedTuple):
    """``t = drop((1 - lambda) x + lambda h0) A^T`` and, where wanted, ``d = drop(h0 - x) A^T``.

    A bottleneck adapter adds its bias to t and wants f(t) too.
    """

    lora_a: Tensor  # [r, K]
    lambda_: float | Tensor = 0.0  # a number in [0, 1], or a floating point tensor with one element
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None  # int64, one element; needed if dropout_p > 0
    difference: bool = False  # also ask for d, which the gradient of lambda needs
    bias: Tensor | None = None  # [r]
    activation: str | None = None  # f's name, in `reference.ACTIVATIONS`

    @property
    def mixes(self) -> bool:
        """Whether h0 is read."""
        return self.difference or mixes(self.lambda_)

    @property
    def kind(self) -> tuple[torch.dtype, bool, bool, bool, bool, str | None]:
        """What must be the same to share a launch."""
        own = self.lora_a.dtype, self.mixes, self.dropout_p > 0, self.difference
        return *own, self.bias is not None, self.activation


class UpProjection(NamedTuple):
    """``y = s (t B^T + b_B) + b``."""

    lora_b: Tensor  # [N, r]
    scaling: float | Tensor
    lora_bias: Tensor | None = None  # [N]
    base_bias: Tensor | None = None  # [N], of the frozen layer


class UpGradients(NamedTuple):
    """``u = s dY B``, ``dB = s dY^T t`` and the sum of dY over its rows.

    With an activation f, of a bottleneck adapter, t stands for the pre-activation p: ``u = s (dY B) f'(p)`` is its
    gradient, and ``dB = s dY^T f(p)``.
    """

    grad_y: Tensor  # [M, N]
    t: Tensor | None  # [M, r]; not looked at where dB is not wanted and there is no activation
    lora_b: Tensor  # [N, r]
    scaling: float | Tensor
    wants_u: bool = True
    grad_dtype: torch.dtype | None = torch.float32  # of dB; None: not wanted
    wants_sum: bool = False
    activation: str | None = None


class DownGradients(NamedTuple):
    """``dA = u^T drop(x~)``, and ``dx~ = drop'(u A)``, of which x gets 1 - lambda and h0 lambda."""

    u: Tensor  # [M, r], the gradient of t
    lora_a: Tensor | None  # [r, K]; may be None where no gradient of x or h0 is wanted
    adapter_dtype: torch.dtype  # of A
    lambda_: float | Tensor = 0.0
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    grad_dtype: torch.dtype | None = torch.float32  # of dA; None: not wanted

    @property
    def mixes(self) -> bool:
        """Whether h0 gets a gradient."""
        return mixes(self.lambda_)

    @property
    def kind(self) -> tuple[torch.dtype, bool, bool]:
        """What must be the same to share a launch for dA."""
        return self.adapter_dtype, self.mixes, self.dropout_p > 0

"""What the launchers of the down-projection's gradients check of their arguments."""

import torch
from torch import Tensor

from .precision import TL_DTYPES


def check_u(u: Tensor) -> None:
    """Raise unless u, the gradient of t, is float32, [M, r], contiguous."""
    if u.dtype != torch.float32:
        raise TypeError(f"u is {u.dtype}: the kernel takes torch.float32")
    if u.dim() != 2 or not u.is_contiguous():
        raise ValueError(f"u has shape {list(u.shape)} and strides {u.stride()}: pass it contiguous, [M, r]")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise a TypeError unless the kernels take the dtype."""
    if dtype not in TL_DTYPES:
        raise TypeError(f"{name} is {dtype}: the kernel takes {', '.join(map(str, TL_DTYPES))}")


def check_dropout(p: float, seed: Tensor | None) -> None:
    """Raise a ValueError unless the rate lies in [0, 1) and comes with a seed where it is not 0."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p is {p}: it must lie in [0, 1); 0.0 turns dropout off")
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"dropout_p is {p}, and the seed {seed}: pass one int64 value in a tensor")

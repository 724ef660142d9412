"""Checks of the launchers' arguments: shapes, dtypes, and what must not be missing."""

import torch
from torch import Tensor

from .activations import NAMES
from .precision import TL_DTYPES


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise a TypeError unless the kernels take the dtype."""
    if dtype not in TL_DTYPES:
        raise TypeError(f"{name} is {dtype}: the kernel takes {', '.join(map(str, TL_DTYPES))}")


def check_matrix(name: str, tensor: Tensor, rows: int | str, cols: int | str, fits: str = "the kernel") -> None:
    """Raise unless the kernels take the matrix and it has these sizes; a letter stands for any size."""
    check_dtype(name, tensor.dtype)
    shape = tensor.shape
    if len(shape) != 2 or rows not in ("M", "N", "r", shape[0]) or cols not in ("K", "N", "r", shape[1]):
        raise ValueError(f"{name} has shape {list(shape)}, but [{rows}, {cols}] fits {fits}")


def check_activation(name: str | None) -> None:
    """Raise a ValueError for an activation that has no kernel; None, no activation, passes."""
    if name is not None and name not in NAMES:
        raise ValueError(f"activation={name!r} has no kernel: choose one of {', '.join(NAMES)}")


def check_low_rank(name: str, tensor: Tensor) -> None:
    """Raise unless t, or its gradient u, is as the kernels keep them: ``[M, r]``, contiguous, and u in float32."""
    check_dtype(name, tensor.dtype)
    if name == "u" and tensor.dtype != torch.float32:
        raise TypeError(f"{name} is {tensor.dtype}: the kernels keep it in torch.float32")
    if tensor.dim() != 2 or not tensor.is_contiguous():
        found = f"shape {list(tensor.shape)} and strides {tensor.stride()}"
        raise ValueError(f"{name} has {found}: it must be [M, r], contiguous")


def check_bias(name: str, bias: Tensor | None, size: int, fits: str = "lora_b") -> None:
    """Raise unless the bias, where there is one, is one number for each of ``size`` outputs, those of ``fits``."""
    if bias is not None:
        check_dtype(name, bias.dtype)
        if bias.shape != (size,):
            raise ValueError(f"{name} has shape {list(bias.shape)}, but [{size}] fits {fits}")


def check_one_value(name: str, value: float | Tensor) -> None:
    """Raise a ValueError for a tensor that is not one floating point value; numbers are not looked at."""
    if isinstance(value, Tensor) and (value.numel() != 1 or not value.is_floating_point()):
        found = f"a {value.dtype} tensor of shape {list(value.shape)}"
        raise ValueError(f"{name} is {found}: pass a number or one floating point value")


def check_mix(lambda_: float | Tensor, mixes: bool, initial_residual: Tensor | None) -> None:
    """Raise a ValueError where lambda is not one value, or h0 is missing and would be read."""
    check_one_value("lambda_", lambda_)
    if mixes and initial_residual is None:
        raise ValueError(f"initial_residual is None, but lambda_ is {lambda_}: pass h0, or lambda_=0.0 for no mixing")


def check_dropout(p: float, seed: Tensor | None) -> None:
    """Raise a ValueError unless the rate lies in [0, 1) and comes with a seed where it is not 0."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p is {p}: it must lie in [0, 1); 0.0 turns dropout off")
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"dropout_p is {p}, and the seed {seed}: pass one int64 value in a tensor")

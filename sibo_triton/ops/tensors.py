"""Shapes and dtypes of tensors, in as little host time as there is: every operation asks for each several times."""

from __future__ import annotations

import contextlib
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def resolved(value: T) -> T:
    """A tensor without torch's lazy negation (``z.conj().imag``), which kernels, reading memory, would not see.

    What is no tensor is returned as it is.
    """
    if not isinstance(value, Tensor) or torch.compiler.is_compiling():
        return value  # the operator asks when it runs; Inductor loses the negation, as of any operator
    return value.resolve_neg() if value.is_neg() else value  # type: ignore[return-value]


def as_matrix(tensor: Tensor) -> Tensor:
    """``[M, K]``, a view where strides allow, also where a size is 0; resolved."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    dims = tensor.dim()
    if dims == 2:
        return tensor
    return tensor.flatten(0, -2) if dims > 2 else tensor.reshape(1, tensor.shape[0])


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype; ``to`` takes its time also where there is nothing to do, and there nearly always is."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def as_scalar(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A number, or a tensor of shape [] that never reaches the host."""
    return value.reshape(()).to(dtype) if isinstance(value, Tensor) else float(value)


def shaped_like(x: Tensor, y: Tensor) -> Tensor:
    """A fresh y, ``[M, N]``, with the leading dimensions of x: ``[..., N]``.

    Not a view to autograd, which forbids writing into a view that a Function returned or that was made without
    gradients: q.mul_(...) is common.
    """
    return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def fresh_like(x: Tensor, y: Tensor) -> Tensor:
    """Likewise, of a y without a history that nobody else has: by resizing it, which takes the host a tenth."""
    if x.dim() == 2:
        return y
    if torch._C._len_torch_dispatch_stack() > 0:
        return shaped_like(x, y)
    return y.resize_(*x.shape[:-1], y.shape[1])


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Autocast's dtype where it is on."""
    if not torch._C._is_any_autocast_enabled():
        return None
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


_unsafe_view = torch.ops.aten._unsafe_view.default
_AS_IT_IS = contextlib.nullcontext()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context in which autocast is disabled."""
    return _AS_IT_IS if autocast_dtype(device_type) is None else _WithoutAutocast(device_type)


class _WithoutAutocast(contextlib.AbstractContextManager):
    """`torch.autocast(device_type, enabled=False)` where it is enabled, in a sixth of its time."""

    __slots__ = ("_device_type",)

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self._device_type, True)


class Buffer:
    """Memory for one tile after another."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(0, dtype=dtype, device=device)

    def view(self, rows: int, cols: int) -> Tensor:
        """``[rows, cols]``, contiguous, not initialised."""
        if self._flat.numel() < rows * cols:
            self._flat = self._flat.new_empty(rows * cols)
            return self._flat.view(rows, cols)
        return self._flat[: rows * cols].view(rows, cols)

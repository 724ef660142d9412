"""What is remembered for tensors of some form, and found again by the guards with which Dynamo recognises arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

try:  # a private class of torch; where there is none, nothing is remembered
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards: Any = None  # type: ignore[no-redef]

#: Whether anything can be remembered.
CAN_GUARD = TensorGuards is not None

#: So many are kept that differ in their tensors only.
_KEPT = 16


def first_that_fits(remembered: tuple, tensors: Sequence[Tensor]) -> Any:
    """What was remembered first of what fits these tensors; None: nothing."""
    for guards, what in remembered:
        if guards.check(*tensors):
            return what
    return None


def with_guards(remembered: tuple, tensors: Sequence[Tensor], what: Any) -> tuple:
    """What is remembered, and one more, for such tensors."""
    return (*remembered[1 - _KEPT :], (_guards_of(tensors), what))


def _guards_of(tensors: Sequence[Tensor]) -> Any:
    """Tells whether other tensors have the types, dtypes, devices, shapes, strides and flags of these.

    The flags include `requires_grad`, and every state of torch that changes what an operation does with a tensor
    (autocast, inference mode, lazy negation). Dynamo asks the same of a compiled function's arguments; it takes the
    host a tenth of reading these from Python.
    """
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

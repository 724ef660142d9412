"""`operator.itemgetter`, always returning a tuple: recorded calls pick their tensors by index, in one C call."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any


def tuple_getter(indices: Sequence[int]) -> Callable[[tuple], Any]:
    """A function that takes a tuple and returns the tuple of its items at the indices."""
    if len(indices) == 1:
        return itemgetter(slice(indices[0], indices[0] + 1))  # itemgetter of one index would return the item
    return itemgetter(*indices) if indices else _empty


def _empty(_: tuple) -> tuple:
    return ()

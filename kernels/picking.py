"""Picks several places of a tuple in one call: what is recorded is repeated by places, and each costs host time."""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any


def picker(places: Sequence[int]) -> Callable[[tuple], Any]:
    """What makes a tuple of these places of a tuple."""
    if len(places) == 1:
        return itemgetter(slice(places[0], places[0] + 1))  # of one place alone it would be no tuple
    return itemgetter(*places) if places else _nothing


def _nothing(of: tuple) -> tuple:
    return ()

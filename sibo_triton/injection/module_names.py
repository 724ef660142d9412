"""Match module names as PEFT matches `target_modules`, and shorten a list of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence


def matches(target: Collection[str] | str, name: str) -> bool:
    """Whether `target` matches: a string is a regular expression for the whole name, a list holds names or endings."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in target)


def shortest_names(chosen: Sequence[str], among: Sequence[str]) -> list[str]:
    """A short list of name endings that matches `chosen` and nothing else of `among`.

    ["q_proj", "k_proj"] where the endings tell them apart ("SelfAttention.q" where "q" would not), else full names.
    """
    wanted = set(chosen)
    others = {ending for name in among if name not in wanted for ending in _endings(name)}
    return list(dict.fromkeys(next((of for of in _endings(name) if of not in others), name) for name in chosen))


def _endings(name: str) -> Iterator[str]:
    """All that `matches` takes for the name, the shortest first."""
    parts = name.split(".")
    return (".".join(parts[-length:]) for length in range(1, len(parts) + 1))

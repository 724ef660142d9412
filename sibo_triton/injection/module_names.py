"""Match module names as PEFT matches `target_modules`, and shorten a list of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence


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
    result: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if all(other in wanted for other in among if matches([ending], other)):
                result[ending] = None
                break
    return list(result)

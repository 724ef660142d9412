"""Find the answer in a model's response and compare it with the reference, as LLM-Adapters does.

Its rules are kept, including their quirks, so that results are comparable with published ones:

* a number is the last one in the response, after all commas are dropped; right within 0.001. "3-2" holds -2.
* a letter (AQuA) is the first capital A to E anywhere in the response, within words too: "Adding" answers A.
* a choice (commonsense) is the first of the kind's words, in lower case, within words too: "untrue" answers true.

A response without an answer is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from sibo_triton.finetune.instructions import RESPONSE_MARKER

_TOLERANCE = 0.001
_NUMBER = re.compile(r"-?\d+\.?\d*")


@dataclass(frozen=True)
class AnswerKind:
    """A kind of answers.

    Attributes:
        name: as recipes and reports name it.
        find: returns the answer in a response, verbatim, or None.
        is_reference: whether a text can be the right answer to a question of this kind.
        agree: whether a found answer matches the reference.
    """

    name: str
    find: Callable[[str], str | None]
    is_reference: Callable[[str], bool]
    agree: Callable[[str, str], bool]


def response_of(generated: str) -> str:
    """The model's response, up to where it begins another one."""
    return generated.split(RESPONSE_MARKER)[0].strip()


def find_number(response: str) -> str | None:
    """The last number in a response, without commas."""
    numbers = _NUMBER.findall(response.replace(",", ""))
    return numbers[-1] if numbers else None


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")  # NaN fails too
    except ValueError:
        return False


def _equal_numbers(answer: str, reference: str) -> bool:
    return abs(float(answer) - float(reference)) <= _TOLERANCE


def _words(name: str, *words: str) -> AnswerKind:
    """The kind whose answer is the first occurrence of one of these words."""
    pattern = re.compile("|".join(words))

    def find(response: str) -> str | None:
        match = pattern.search(response)
        return match.group() if match else None

    return AnswerKind(name, find, lambda text: text in words, str.__eq__)


def _numbered(word: str, count: int) -> AnswerKind:
    return _words(word, *(f"{word}{i}" for i in range(1, count + 1)))


ANSWERS = {
    kind.name: kind
    for kind in (
        AnswerKind("number", find_number, _is_number, _equal_numbers),
        _words("letter", *"ABCDE"),
        _words("boolean", "true", "false"),
        _numbered("solution", 2),
        _numbered("answer", 5),
        _numbered("ending", 4),
        _numbered("option", 2),
    )
}


def kind_of(reference: str) -> AnswerKind | None:
    """The kind of a right answer, or None."""
    return next((kind for kind in ANSWERS.values() if kind.is_reference(reference)), None)

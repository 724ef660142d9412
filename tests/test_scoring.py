"""Answers found in responses, and compared: the formats that LLM-Adapters' tests and the models trained on it make."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sibo_triton.finetune.scoring import ANSWERS, find_number, kind_of, response_of

NUMBERS = [
    ("He had 3 and got 4, so 3 + 4 = 7. The answer is 7.", "7."),
    ("The answer is 1,234.50", "1234.50"),
    ("The answer is $5.00", "5.00"),
    ("The answer is -12", "-12"),
    ("Subtract: 10-12", "-12"),  # a minus sign is part of the number, as theirs
    ("5% of 20 is 1", "1"),
    ("The answer is 7 dollars", "7"),
    ("1/2", "2"),
    ("The answer is 18.</s>", "18."),
    ("seven", None),
    ("", None),
]


@pytest.mark.parametrize(("response", "found"), NUMBERS)
def test_a_number_is_the_last_one(response, found):
    assert find_number(response) == found


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("The answer is 7.", "7.0", True),
        ("The answer is 7.0005", "7", True),
        ("The answer is 7.002", "7", False),
        ("The answer is 1,000", "1000.0", True),
        ("The answer is 7", "-7", False),
        ("It is 7 of 8", "7", False),
        ("The answer is " + "9" * 400, "7", False),
    ],
)
def test_numbers_agree_within_a_thousandth(response, reference, right):
    kind = ANSWERS["number"]
    assert kind.agree(kind.find(response), reference) is right


CHOICES = [
    ("letter", "The answer is (C).", "C"),
    ("letter", "the answer is E", "E"),
    ("letter", "Adding gives (C)", "A"),  # within a word, as theirs
    ("letter", "the answer is c", None),
    ("letter", "F", None),
    ("boolean", "the correct answer is true", "true"),
    ("boolean", "false, not true", "false"),
    ("boolean", "untrue", "true"),
    ("boolean", "True", None),
    ("boolean", "yes", None),
    ("solution", "the correct answer is solution2", "solution2"),
    ("solution", "solution3", None),
    ("answer", "the correct answer is answer5", "answer5"),
    ("answer", "the correct answer is answer 1", None),
    ("answer", "answer10", "answer1"),
    ("ending", "the correct answer is ending4", "ending4"),
    ("option", "the correct answer is option1 and option2", "option1"),
    ("option", "", None),
]


@pytest.mark.parametrize(("kind", "response", "found"), CHOICES)
def test_a_choice_is_the_first_word_of_its_kind(kind, response, found):
    assert ANSWERS[kind].find(response) == found
    if found is not None:
        assert ANSWERS[kind].agree(found, found)
        assert not any(ANSWERS[kind].agree(found, other) for other in ("", found.swapcase(), found + "0"))


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("576.0", "number"), ("4", "number"), ("-0.5", "number"), ("A", "letter"), ("E", "letter"),
        ("true", "boolean"), ("solution1", "solution"), ("answer5", "answer"), ("ending4", "ending"),
        ("option2", "option"), ("F", None), ("True", None), ("answer6", None), ("nan", None), ("inf", None),
        ("1,000", None), ("", None),
    ],
)  # fmt: skip
def test_the_kind_is_told_by_the_reference(reference, kind):
    assert (kind_of(reference).name if kind else kind_of(reference)) == kind


def test_a_response_ends_where_the_model_begins_another():
    assert response_of(" 7 \n\n### Response:\n 8") == "7"
    assert response_of("### Response:") == ""
    assert response_of("\n the answer is 7 ") == "the answer is 7"


@given(st.text(alphabet="0123456789.,-$ AExyz\n", max_size=30))
def test_what_is_found_is_a_number_or_nothing(response):
    found = find_number(response)
    assert (found is None) == (re.search(r"\d", response) is None)
    assert found is None or math.isfinite(float(found))

"""What an answer must look like, looked at once more; hostile patterns and texts end quickly."""

from __future__ import annotations

from typing import Any

import pytest

from nimbos.kernel.answers import Misfit, NothingFits, value_of
from nimbos.types import Grammar

NUMBER = Grammar(kind="json_schema", source='{"type": "object", "properties": {"n": {"type": "integer"}}}')


def regex(pattern: str) -> Grammar:
    return Grammar(kind="regex", source=pattern)


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (" as it is\n", None, " as it is\n"),
        ("42", regex("[0-9]+"), "42"),
        (" 42\n", regex("[0-9]+"), "42"),
        ("Zürich", regex("[A-Z][a-zü]+"), "Zürich"),
        ('{"n": 1}', NUMBER, {"n": 1}),
        ('```json\n{"n": 1}\n```', NUMBER, {"n": 1}),
        ("3", Grammar(kind="json_schema", source="[]"), 3),
    ],
)
def test_an_answer_that_fits_is_a_value(text: str, answer: Grammar | None, value: Any) -> None:
    assert value_of(text, answer) == value


@pytest.mark.parametrize(
    ("text", "answer", "why"),
    [
        ("42 or so", regex("[0-9]+"), "regular expression"),
        ("", regex("[0-9]+"), "regular expression"),
        ('{"n": "one"}', NUMBER, "n:"),
        ('{"n": 1', NUMBER, "no JSON"),
        ("```" + "\n" * 200_000, NUMBER, "no JSON"),
        ("a" * 50_000 + "b", regex("(a+)+"), "regular expression"),
    ],
)
def test_one_that_does_not_is_told_why(text: str, answer: Grammar, why: str) -> None:
    with pytest.raises(Misfit, match=why):
        value_of(text, answer)


def test_a_pattern_that_is_none_is_a_fault_of_the_program() -> None:
    with pytest.raises(NothingFits, match="cannot be used"):
        value_of("x", regex("(unclosed"))

"""Arguments and schemas of strangers: each is refused in words, or fits; nothing hangs, recurses or reaches out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.kernel.arguments import Checker, WrongArguments, read_arguments
from nimbos.kernel.drivers.builtin import BUILTINS

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
CHECKER = Checker()  # one for a server, and so for all that a model writes: compiling takes much longer than checking


@pytest.mark.parametrize(
    "text", ["{", "[1", "{}{}", "NaN", "1e999", '{"a": "\\ud800"}', "[" * 100_000, "x" * (2 << 20)]
)
def test_what_is_no_json_is_said_so(text: str) -> None:
    with pytest.raises(WrongArguments):
        read_arguments(text)


@pytest.mark.parametrize(("text", "value"), [("", {}), ("  \n", {}), ("null", None), ('{"a": 1}', {"a": 1})])
def test_what_is_json_is_read(text: str, value: Any) -> None:
    assert read_arguments(text) == value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, '"city" is a required property'),
        ({"city": 3}, 'city: 3 is not of type "string"'),
        ({"city": "Oslo", "days": 1.5}, 'days: 1.5 is not of type "integer"'),
        ({"city": "Oslo", "wind": 1}, "'wind' was unexpected"),
        ([], "they are list and must be an object"),
        (None, "they are NoneType and must be an object"),
        ({"city": "Oslo", "days": "x" * 100_000}, 'is not of type "integer"'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_said_with_its_place(value: Any, said: str) -> None:
    with pytest.raises(WrongArguments) as refused:
        Checker().check(value, CITY, tool="weather")
    assert said in str(refused.value) and len(str(refused.value)) < 2_000


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"$ref": "http://127.0.0.1:1/schema"},
        {"$ref": "file:///etc/passwd"},
        {"$schema": "http://nowhere.invalid/schema"},
        {"properties": {"a": {"$ref": "#/$defs/gone"}}},
        {"properties": {"a": {"pattern": "(?=a)b"}}},
        {"properties": {"a": {"pattern": "((((a{0,1000}){0,1000}){0,1000}"}}},
        {"description": "x" * 500_000},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_a_schema_that_is_none_holds_nothing(schema: dict[str, Any]) -> None:
    Checker().check({"a": "b"}, schema, tool="t")


def test_a_loop_of_references_ends_and_depth_is_bounded() -> None:
    checker = Checker()
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    checker.check({"a": 1}, loop, tool="t")
    deep: dict[str, Any] = {}
    for _ in range(60):
        deep = {"a": deep}
    checker.check(deep, {"properties": {"a": {"$ref": "#"}}}, tool="t")
    for _ in range(10):
        deep = {"a": deep}
    with pytest.raises(WrongArguments, match="nests more than"):
        checker.check(deep, {}, tool="t")


def test_a_pattern_takes_time_in_proportion_to_what_it_is_given() -> None:
    """The same pattern takes the standard library for ever, and this test its time limit."""
    schema = {"properties": {"a": {"pattern": "^(a+)+$"}}}
    with pytest.raises(WrongArguments):
        Checker().check({"a": "a" * 100_000 + "!"}, schema, tool="t")


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists)))
def test_whatever_a_model_writes_a_checker_refuses_it_or_lets_it_pass(value: dict[str, Any]) -> None:
    for name, builtin in BUILTINS.items():
        try:
            CHECKER.check(value, builtin.parameters, tool=name)
        except WrongArguments as refused:
            assert str(refused)
        else:
            assert set(builtin.parameters["required"]) <= value.keys() <= builtin.parameters["properties"].keys()

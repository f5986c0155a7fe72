"""Signatures as schemas, and arguments as what the signature says."""

from __future__ import annotations

import datetime
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest

from nimbos.adk import BadTool, Field
from nimbos.adk.schema import read_docstring, read_signature
from nimbos.chat.schema import read_schema


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


@dataclass
class Place:
    city: str
    country: str = "France"


class Options(TypedDict):
    deep: bool


def forecast(
    place: Place,
    days: Annotated[int, Field(ge=1, le=7, description="how far")] = 3,
    *,
    unit: Unit = Unit.CELSIUS,
    kind: Literal["rain", "sun"] | None = None,
    tags: list[str] = ["a"],  # noqa: B006
    options: Options | None = None,
    since: datetime.date | None = None,
) -> str:
    """What the weather will be.

    Says it in words.

    Args:
        place: where
        days: not this, the annotation has it
        kind (str, optional): of weather,
            of which there are two

    Returns:
        place: not a parameter's description
    """
    return f"{place} {days} {unit} {kind} {tags} {options} {since}"


def test_a_signature_is_a_schema_that_a_grammar_takes() -> None:
    signature = read_signature(forecast)
    properties = signature.schema["properties"]
    assert signature.description == "What the weather will be.\n\nSays it in words."
    assert signature.schema["required"] == ["place"]
    assert signature.schema["additionalProperties"] is False
    assert properties["days"] == {"type": "integer", "minimum": 1, "maximum": 7, "default": 3, "description": "how far"}
    assert properties["kind"]["description"] == "of weather, of which there are two"
    assert properties["place"]["description"] == "where"
    assert set(signature.schema["$defs"]) == {"Place", "Unit", "Options"}
    assert read_schema(signature.schema, where="tool", strict=True)["properties"].keys() == properties.keys()


def test_arguments_become_what_the_function_expects() -> None:
    given = b'{"place": {"city": "Paris"}, "unit": "kelvin", "since": "2026-01-02", "options": {"deep": true}}'
    arguments = read_signature(forecast).arguments(given)
    assert arguments["place"] == Place("Paris")
    assert (arguments["unit"], arguments["since"]) == (Unit.KELVIN, datetime.date(2026, 1, 2))
    assert arguments["tags"] == ["a"] and arguments["days"] == 3


def test_a_default_that_can_change_is_new_for_each_call() -> None:
    signature = read_signature(forecast)
    first = signature.arguments(b'{"place": {"city": "Paris"}}')["tags"]
    first.append("b")
    assert signature.arguments(b'{"place": {"city": "Paris"}}')["tags"] == ["a"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (b"{}", "`place`"),
        (b'{"place": {"city": 3}}', "$.place.city"),
        (b'{"place": {"city": "x"}, "days": 8}', "$.days"),
        (b'{"place": {"city": "x"}, "days": "3"}', "$.days"),
        (b'{"place": {"city": "x"}, "kind": "snow"}', "$.kind"),
        (b'{"place": {"city": "x"}, "what": 1}', "`what`"),
        (b"[]", "array"),
        (b"{", "truncated"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_their_place(given: bytes, says: str) -> None:
    with pytest.raises(msgspec.DecodeError, match=says.replace("$", r"\$").replace(".", r"\.")):
        read_signature(forecast).arguments(given)


def untyped(a) -> None:  # type: ignore[no-untyped-def]
    ...


def many(*a: int) -> None: ...


def named(**a: int) -> None: ...


def first(a: int, /) -> None: ...


def nowhere(a: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
    ...


def complex_one(a: complex) -> None: ...


@pytest.mark.parametrize("function", [untyped, many, named, first, nowhere, complex_one])
def test_a_signature_that_json_cannot_fill_is_refused_by_name(function: Callable[..., Any]) -> None:
    with pytest.raises(BadTool, match=function.__name__):
        read_signature(function)


def test_what_the_kernel_fills_is_not_in_the_schema() -> None:
    def pay(amount: int, key: str) -> None: ...

    assert list(read_signature(pay, without=frozenset({"key"})).schema["properties"]) == ["amount"]


def test_a_docstring_without_sections_is_all_description() -> None:
    assert read_docstring("One.\n\nTwo: three.") == ("One.\n\nTwo: three.", {})
    assert read_docstring("") == ("", {})

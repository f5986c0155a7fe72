"""`@tool`: what may be one, and that it stays a function."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

import nimbos.adk
from nimbos.adk import BadTool, Tool, tool
from nimbos.adk.loading import told
from nimbos.adk.values import write


@tool(effect="pure", deadline_s=5)
def double(number: int) -> int:
    """Twice as much."""
    return 2 * number


def test_a_tool_is_still_the_function() -> None:
    assert isinstance(double, Tool)
    assert double(4) == 8
    assert (double.function.__name__, double.__doc__, double.name) == ("double", "Twice as much.", "double")


def test_the_name_of_the_decorator_is_the_decorator_whatever_was_imported_before() -> None:
    importlib.import_module("nimbos.adk.tools")
    assert nimbos.adk.tool is tool


def test_a_key_is_the_kernels_only_where_an_effect_has_one() -> None:
    @tool(effect="pure")
    def look_up(key: str) -> str:
        """Looks a key up."""
        return key

    @tool(effect="idempotent")
    def store(value: int, key: str) -> None:
        """Stores."""

    assert list(look_up.signature.schema["properties"]) == ["key"] and not look_up.keyed
    assert list(store.signature.schema["properties"]) == ["value"] and store.keyed


def no_words(a: int) -> None: ...


def plain(a: int) -> None:
    """Some."""


def keyed(key: str) -> bool:
    """Some."""
    return True


@pytest.mark.parametrize(
    ("fields", "function", "says"),
    [
        ({"effect": "pure"}, no_words, "docstring"),
        ({"effect": "magic"}, plain, "magic"),
        ({"effect": "idempotent"}, plain, "key"),
        ({"effect": "checkable"}, plain, "verify"),
        ({"effect": "checkable", "verify": plain}, plain, "verify"),
        ({"effect": "pure", "verify": keyed}, plain, "checkable"),
        ({"effect": "pure", "name": "two words"}, plain, "two words"),
        ({"effect": "pure", "deadline_s": 0}, plain, "deadline"),
        ({"effect": "pure", "deadline_s": 1e9}, plain, "deadline"),
    ],
)
def test_what_cannot_be_a_tool_is_said_where_it_is_written(fields: dict[str, Any], function: Any, says: str) -> None:
    with pytest.raises(BadTool, match=says):
        tool(**fields)(function)


def test_an_exception_whose_words_cannot_be_made_is_told_by_its_name(tmp_path: Any) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("mute")

    assert "Mute" in told(Mute(), tmp_path)


class Array:
    """As numpy's are."""

    def tolist(self) -> list[int]:
        return [1, 2]


@pytest.mark.parametrize(
    ("value", "content", "error"),
    [
        ({"a": [1, None, "ü"]}, '{"a":[1,null,"ü"]}'.encode(), ""),
        (Array(), b"[1,2]", ""),
        (float("inf"), b"null", ""),
        (b"\xff", b"null", "not_utf8"),
        ("\ud800", b"null", "not_utf8"),
        (object(), b"null", "not_json"),
        ({1j: 2}, b"null", "not_json"),
        ("x" * 101, b"null", "too_large"),
    ],
)
def test_values_are_json_or_an_error_with_a_name(value: Any, content: bytes, error: str) -> None:
    written = write(value, limit=100)
    assert (written.value, written.error) == (content, error)

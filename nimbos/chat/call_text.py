"""How a tool call looks in text, read piece by piece.
Pure: `read_head` looks at what there is so far and says whether it is, may become, or cannot be a call.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_MAX_HEAD = 512  # characters; what is longer is no call
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_SPACE = re.compile(r"\s*")
_STRING_END = re.compile(r'["\\]')
_STRUCTURE = re.compile(r'["{}\[\]]')
_SCALAR_END = re.compile(r"[\s,}\]]")


@dataclass(frozen=True, slots=True)
class Head:
    """`{"name": "get_weather", "arguments": ` and its length. `empty`: the call ended after its name."""

    name: str
    length: int
    empty: bool = False


@dataclass(frozen=True, slots=True)
class Open:
    """It may still become a call; `name` is there when the name is complete."""

    name: str | None = None


def read_head(text: str) -> Head | Open | None:
    """None: this is no call, whatever comes next."""
    if len(text) > _MAX_HEAD:
        return None
    at, name = 0, ""
    for piece in ("{", '"name"', ":", "NAME", ",", "KEY", ":"):
        at = _skip_space(text, at)
        if at == len(text):
            return Open(name or None)
        if piece == "," and text[at] == "}":
            return Head(name, at, empty=True)
        found = _read_piece(text, at, piece)
        if found is None or found == -1:
            return None if found is None else Open(name or None)
        if piece == "NAME":
            name = text[at + 1 : found - 1]
        at = found
    at = _skip_space(text, at)
    return Head(name, at) if at < len(text) else Open(name)


def _read_piece(text: str, at: int, piece: str) -> int | Literal[-1] | None:
    """Where it ends; -1 when the text ends inside it; None when it is something else."""
    if piece == "NAME":
        return _read_name(text, at)
    for wanted in ('"arguments"', '"parameters"') if piece == "KEY" else (piece,):
        rest = text[at : at + len(wanted)]
        if rest == wanted:
            return at + len(wanted)
        if wanted.startswith(rest):
            return -1
    return None


def _read_name(text: str, at: int) -> int | Literal[-1] | None:
    if text[at] != '"':
        return None
    end = text.find('"', at + 1)
    name = text[at + 1 : end if end >= 0 else len(text)]
    if name and not _NAME.fullmatch(name):
        return None
    if end < 0:
        return -1
    return end + 1 if name else None


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


class JsonValue:
    """Finds the end of one JSON value in text that comes in pieces."""

    __slots__ = ("_depth", "_escaped", "_in_string", "_scalar", "_started")

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = self._scalar = self._started = False

    def feed(self, text: str) -> int | None:
        """How much of `text` belongs to the value, when the value ends in it; None: all, and more to come."""
        at = 0
        while at < len(text):
            if not self._started:
                self._started = True
                self._scalar = text[at] not in '"{['
            if self._scalar:
                end = _SCALAR_END.search(text, at)
                return end.start() if end else None
            at = self._inside_string(text, at) if self._in_string else self._outside_string(text, at)
            if self._depth == 0 and not self._in_string and at <= len(text):
                return at
        return None

    def _inside_string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        match = _STRING_END.search(text, at)
        if match is None:
            return len(text) + 1
        if match.group() == "\\":
            self._escaped = True
        else:
            self._in_string = False
        return match.end()

    def _outside_string(self, text: str, at: int) -> int:
        match = _STRUCTURE.search(text, at)
        if match is None:
            return len(text) + 1
        if match.group() == '"':
            self._in_string = True
        else:
            self._depth += 1 if match.group() in "{[" else -1
        return match.end()

"""Keeps a user's words from becoming control tokens.
Knows nothing of messages: it marks any strings, and cuts a rendered prompt where the marks came out.

Control tokens are written in the prompt as text, and the tokenizer turns them into tokens wherever they stand. So every
control string inside a message, a tool or an argument is broken after its first character by a marker, one random
private-use character that occurs nowhere else. The prompt is cut at the markers, and the
tokenizer sees each piece alone.
One character, because a template can cut a longer marker in half. Control tokens of one character cannot be broken.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from random import SystemRandom
from typing import Any

import msgspec

from nimbos.errors import InvalidRequest
from nimbos.types import ModelCard, Text

_LONGEST_CONTROL = 256
_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_MARKER_TRIES = 64
_MAX_DEPTH = 128


class ControlGuard:
    """Breaks the control strings of one vocabulary."""

    def __init__(self, control: Sequence[str]) -> None:
        words = sorted({word for word in control if 1 < len(word) <= _LONGEST_CONTROL})
        self._begun = frozenset(word[:length] for word in words for length in range(1, len(word)))
        self._longest = max(map(len, words), default=0)
        self._pattern = _compile(words)

    def mark(self, value: Any, marker: str, *, depth: int = 0) -> Any:
        """A copy of lists, dicts (keys too) and strings, with the marker in each control string, also in a cut one.

        Raises: InvalidRequest when it is nested too deeply.
        """
        if depth > _MAX_DEPTH:
            raise InvalidRequest(f"The request nests objects and lists more than {_MAX_DEPTH} deep. Flatten them.")
        if isinstance(value, str):
            return self._mark_text(value, marker)
        if isinstance(value, list | tuple):
            return [self.mark(item, marker, depth=depth + 1) for item in value]
        if isinstance(value, dict):
            return {
                self.mark(key, marker, depth=depth + 1): self.mark(item, marker, depth=depth + 1)
                for key, item in value.items()
            }
        return value

    def _mark_text(self, text: str, marker: str) -> str:
        if self._pattern is None or not text:
            return text
        breaks = {match.end() for match in self._pattern.finditer(text)}
        breaks.update(self._begun_at_end(text), self._begun_at_end(text.rstrip()))
        if not breaks:
            return text
        edges = [0, *sorted(breaks), len(text)]
        return marker.join(text[start:end] for start, end in itertools.pairwise(edges))

    def _begun_at_end(self, text: str) -> Iterable[int]:
        """Where to break what would be a control string if the next message went on with it."""
        for length in range(1, min(self._longest, len(text) + 1)):
            if text[-length:] in self._begun:
                yield len(text) - length + 1


def words_to_guard(card: ModelCard, template: str) -> list[str]:
    """Control tokens, and of the user-defined ones those that the template uses as marks.

    Others are ordinary text that was given a token (runs of line breaks, HTML tags); to break them protects nothing.
    """
    plain = set(card.user_defined or ())
    return [w for w in card.control if not w.isspace() and (w not in plain or (w[:1] in "<[" and w in template))]


def choose_marker(variables: Any) -> str:
    """A private-use character that occurs nowhere in `variables`.

    Raises: InvalidRequest when a string is not text, or every try was taken.
    """
    try:
        haystack = msgspec.json.encode(variables).decode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise InvalidRequest(
            "The request holds half a character (a lone surrogate) or is nested too deeply."
        ) from error
    chosen = SystemRandom()
    for _ in range(_MARKER_TRIES):
        marker = chr(chosen.choice(_PRIVATE_USE))
        if marker not in haystack:
            return marker
    raise InvalidRequest("The request uses up the private-use characters that Nimbos needs to keep its text literal.")


def cut(rendered: str, marker: str) -> tuple[Text, ...]:
    """The prompt in pieces; joined they are the prompt without its markers."""
    escaped = json.dumps(marker)[1:-1]  # how a template's own ASCII-only JSON writes it
    pieces = rendered.replace(escaped, marker).split(marker)
    return tuple(Text(piece, special=True) for piece in pieces if piece)


def _compile(words: list[str]) -> re.Pattern[str] | None:
    """Matches the first character of every control string, also of overlapping ones."""
    if not words:
        return None
    first = "".join(re.escape(character) for character in sorted({word[0] for word in words}))
    try:
        return re.compile(f"[{first}](?<=(?={_trie(words)}).)", re.DOTALL)
    except (RecursionError, re.error):  # a vocabulary made to nest deeply
        return re.compile(f"[{first}](?<=(?={'|'.join(map(re.escape, words))}).)", re.DOTALL)


def _trie(words: list[str]) -> str:
    """A regular expression for `words` that shares their beginnings, so that thousands of them stay fast."""
    if "" in words:
        return ""
    branches: dict[str, list[str]] = {}
    for word in words:
        branches.setdefault(word[0], []).append(word[1:])
    shapes = [re.escape(first) + _trie(rest) for first, rest in branches.items()]
    return shapes[0] if len(shapes) == 1 else f"(?:{'|'.join(shapes)})"

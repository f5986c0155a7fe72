"""The lines of an input file: where each begins and ends, and whether it is a request. Pure, in bounded memory.

    {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": {…}}

A line that is no good is told with the reason; the others go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from nimbos.batches.words import TEST_BYTES, TEST_LINES, TEST_MODEL

CUSTOM_ID_CHARACTERS = 512
_SHOWN_CHARACTERS = 200
_BLANKS = frozenset({b" ", b"\t", b"\r", b"\n"})
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")


@dataclass(frozen=True, slots=True)
class Piece:
    """One line of the file: bytes `[start, start + size)`. `content` is None where it is longer than allowed."""

    number: int
    start_byte: int
    size_bytes: int
    content: bytes | None


@dataclass(frozen=True, slots=True)
class Good:
    number: int
    custom_id: str
    start_byte: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Bad:
    """`custom_id`: as far as the line says one."""

    number: int
    custom_id: str | None
    start_byte: int
    size_bytes: int
    code: str
    message: str


class Splitter:
    """Pieces of a file as they come become its lines; blank ones are counted and passed over.

    `next_byte` is where the first line begins that was not given yet, `next_number` its number: enough to go on later.
    """

    def __init__(self, *, line_bytes: int, next_byte: int = 0, next_number: int = 1) -> None:
        self._line_bytes = line_bytes
        self._held: list[bytes] = []
        self._have = 0  # bytes of the line that is coming, those that were dropped included
        self._blank = True  # all of them
        self.next_byte = next_byte
        self.next_number = next_number

    def feed(self, content: bytes) -> Iterator[Piece]:
        at = self._behind_blank(content, 0)
        while (end := content.find(b"\n", at)) >= 0:
            self._hold(content[at:end])
            yield from self._line(ends_with=1)
            at = self._behind_blank(content, end + 1)
        self._hold(content[at:])

    def _behind_blank(self, content: bytes, at: int) -> int:
        """Where the next line begins that is not blank. At once: a file may be nothing but line ends."""
        if self._have or content[at : at + 1] not in _BLANKS:
            return at
        found = _NOT_BLANK.search(content, at)
        begins = content.rfind(b"\n", at, found.start() if found else len(content)) + 1
        if begins == 0:
            return at
        self.next_number += content.count(b"\n", at, begins)
        self.next_byte += begins - at
        return begins

    def finish(self) -> Iterator[Piece]:
        """The last line, where no line end follows it."""
        if self._have:
            yield from self._line(ends_with=0)

    def _hold(self, content: bytes) -> None:
        self._have += len(content)
        self._blank = self._blank and _NOT_BLANK.search(content) is None
        if self._have > self._line_bytes:
            self._held.clear()
        elif content:
            self._held.append(content)

    def _line(self, *, ends_with: int) -> Iterator[Piece]:
        content = b"".join(self._held) if self._have <= self._line_bytes else None
        piece = None if self._blank else Piece(self.next_number, self.next_byte, self._have, content)
        self.next_byte += self._have + ends_with
        self.next_number += 1
        self._held.clear()
        self._have, self._blank = 0, True
        if piece is not None:
            yield piece


class Checker:
    """What a line must be. Those that name the test model must be in a small file."""

    def __init__(self, *, endpoint: str, file_bytes: int, line_bytes: int) -> None:
        self._endpoint = endpoint
        self._file_bytes = file_bytes
        self._line_bytes = line_bytes

    def check(self, piece: Piece) -> Good | Bad:
        if piece.content is None:
            return self._bad(
                piece, "line_too_long", f"The line has {piece.size_bytes} bytes; {self._line_bytes} are allowed."
            )
        content = piece.content.removeprefix(b"\xef\xbb\xbf") if piece.number == 1 else piece.content
        try:
            line = msgspec.json.decode(content, type=Request)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            code = "invalid_line" if isinstance(error, msgspec.ValidationError) else "invalid_json_line"
            return self._bad(piece, code, f"The line is no request: {str(error)[:_SHOWN_CHARACTERS]}.", _id_in(content))
        fault = self._fault(line, piece.number)
        if fault is not None:
            return self._bad(piece, *fault, line.custom_id if _may_be_id(line.custom_id) else None)
        return Good(piece.number, line.custom_id, piece.start_byte, piece.size_bytes)

    def _fault(self, line: Request, number: int) -> tuple[str, str] | None:
        if not _may_be_id(line.custom_id):
            return (
                "invalid_custom_id",
                f"`custom_id` must have 1 to {CUSTOM_ID_CHARACTERS} characters, none of them NUL.",
            )
        if line.method != "POST":
            return "invalid_method", f"`method` is {line.method[:20]!r}; it must be 'POST'."
        if line.url != self._endpoint:
            shown = line.url[:_SHOWN_CHARACTERS]
            return "invalid_url", f"`url` is {shown!r}; this batch is for {self._endpoint!r}."
        if bytes(line.body).lstrip()[:1] != b"{":
            return "invalid_body", "`body` must be an object."
        return self._test_fault(line, number)

    def _test_fault(self, line: Request, number: int) -> tuple[str, str] | None:
        small = number <= TEST_LINES and self._file_bytes <= TEST_BYTES
        if small or _model_of(line.body) != TEST_MODEL:
            return None
        limits = f"{TEST_LINES} lines and {TEST_BYTES:,} bytes"
        return "test_model_limit", f"The model {TEST_MODEL!r} is for files of at most {limits}."

    def _bad(self, piece: Piece, code: str, message: str, custom_id: str | None = None) -> Bad:
        return Bad(piece.number, custom_id, piece.start_byte, piece.size_bytes, code, message)


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _Named(msgspec.Struct, frozen=True):
    custom_id: str


class _Modelled(msgspec.Struct, frozen=True):
    model: str = ""


def request_of(content: bytes) -> Request:
    """A line that was checked before."""
    return msgspec.json.decode(content.removeprefix(b"\xef\xbb\xbf"), type=Request)


def duplicate(line: Good) -> Bad:
    return Bad(
        line.number,
        line.custom_id,
        line.start_byte,
        line.size_bytes,
        "duplicate_custom_id",
        "An earlier line of this batch has the same `custom_id`.",
    )


def _may_be_id(custom_id: str) -> bool:
    return 0 < len(custom_id) <= CUSTOM_ID_CHARACTERS and "\0" not in custom_id


def _id_in(content: bytes) -> str | None:
    """The custom id of a line that is wrong otherwise."""
    try:
        custom_id = msgspec.json.decode(content, type=_Named).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return custom_id if _may_be_id(custom_id) else None


def _model_of(body: msgspec.Raw) -> str:
    try:
        return msgspec.json.decode(body, type=_Modelled).model
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""  # the route will say what is wrong with it

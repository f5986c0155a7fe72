"""A request's body: read up to a limit, decoded strictly, and refused with the path of what is wrong.

Everything here is hostile until it has passed: sizes, depth, numbers, encodings, names.
"""

from __future__ import annotations

import asyncio
import difflib
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from nimbos.api.unknown import handling
from nimbos.errors import InvalidRequest, PayloadTooLarge, UnsupportedField
from nimbos.integers import beyond_64_bits

DEPTH_LIMIT = 64
_DRAIN_FACTOR = 4  # so much more of a too large body is read and dropped, so that its client gets to read the answer
_SHOWN_CHARACTERS = 100  # of what the client wrote, in an error
_MESSAGE_CHARACTERS = 400

T = TypeVar("T", bound=msgspec.Struct)


async def read(request: Request, *, limit_bytes: int, stall_s: float) -> bytes:
    """Raises: PayloadTooLarge; InvalidRequest when the body stops coming; ClientDisconnect."""
    declared = request.headers.get("content-length", "")
    pieces: list[bytes] = []
    have = 0
    too_large = declared.isascii() and declared.isdigit() and int(declared[:20]) > limit_bytes
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(stall_s) as patience:
            async for piece in request.stream():
                have += len(piece)
                if have > limit_bytes:
                    too_large = True
                    pieces.clear()
                if too_large and have > _DRAIN_FACTOR * limit_bytes:
                    break
                if not too_large:
                    pieces.append(piece)
                if piece:
                    patience.reschedule(clock() + stall_s)
    except TimeoutError as error:
        raise InvalidRequest(f"The body stopped after {have} bytes for {stall_s:.0f} s.") from error
    if too_large:
        raise PayloadTooLarge(have=int(declared[:20]) if declared.isdigit() else None, limit=limit_bytes)
    return b"".join(pieces)


def decode(content: bytes, into: type[T], *, refused: dict[str, str] | None = None) -> T:
    """The body as a struct. `refused`: known fields that are not supported, with the reason. With the setting
    `server.unknown_fields = "warn"` unknown ones are left out, and named in the answer's header.

    Raises: InvalidRequest with the path; UnsupportedField for a top-level field that is unknown or refused.
    """
    table = _object(content)
    _check_depth(table)
    _check_integers(table)
    known, unknown = into.__struct_encode_fields__, handling()
    for name, value in table.items():
        if refused and name in refused and value is not None:
            raise UnsupportedField(name, why=f"not supported here: {refused[name]}")
        if name not in known and name not in (refused or {}):
            if unknown.policy == "warn":
                unknown.ignored[name] = None
                continue
            nearest = difflib.get_close_matches(name[:_SHOWN_CHARACTERS], sorted(known), n=1)
            raise UnsupportedField(name[:_SHOWN_CHARACTERS], why="unknown", nearest=nearest[0] if nearest else None)
    given = {name: value for name, value in table.items() if name in known}
    return convert(given, into)


def table_of(content: bytes) -> dict[str, Any]:
    """The body as an object that is neither too deep nor holds a number beyond 64 bits.

    Raises: InvalidRequest.
    """
    table = _object(content)
    _check_depth(table)
    _check_integers(table)
    return table


def convert(value: Any, into: type[T], *, at: str = "") -> T:
    """Raises: InvalidRequest with the path, which begins with `at`."""
    try:
        return msgspec.convert(value, into)
    except msgspec.ValidationError as error:
        message, path = _with_path(str(error), at)
        raise InvalidRequest(message, param=path) from error


def _object(content: bytes) -> dict[str, Any]:
    if not content.strip():
        raise InvalidRequest("The body is empty; it must be a JSON object.")
    try:
        table = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise _too_deep() from error
    if not isinstance(table, dict):
        raise InvalidRequest(f"The body is a JSON {_json_kind(table)}; it must be an object.")
    return table


def _check_depth(table: dict[str, Any]) -> None:
    """Level by level, so that depth costs us no stack."""
    level: list[Any] = [table]
    for _ in range(DEPTH_LIMIT):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _check_integers(table: dict[str, Any]) -> None:
    """No number beyond 64 bits gets further; floats beyond range are not JSON to the decoder."""
    place = beyond_64_bits(table)
    if place is not None:
        place = place[:_SHOWN_CHARACTERS]
        raise InvalidRequest(f"`{place}` is a number beyond 64 bits.", param=place)


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The body is nested deeper than {DEPTH_LIMIT} levels.")


def _with_path(message: str, at: str) -> tuple[str, str | None]:
    """msgspec says "Expected `int`, got `str` - at `$.a[0].b`"; the path becomes the error's `param`."""
    text, _, place = message.partition(" - at `$")
    text = text[:_MESSAGE_CHARACTERS]
    path = f"{at}{place.rstrip('`')}".lstrip(".")
    if not path:
        return f"The body is not as it should be: {text}.", None
    return f"`{path}`: {text}.", path


def _json_kind(value: Any) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return kinds.get(type(value), "value")


__all__ = ["DEPTH_LIMIT", "ClientDisconnect", "convert", "decode", "read", "table_of"]

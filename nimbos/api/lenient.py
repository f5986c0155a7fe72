"""Bodies of the dialects whose clients send fields that their users cannot turn off: what is not known is left out and
named in the header `x-nimbos-ignored`, unless the operator wants it refused. What is known and not supported is refused
all the same. OpenAI's is `body.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from nimbos.api import body as bodies
from nimbos.api import unknown
from nimbos.errors import InvalidRequest, UnsupportedField

_SHOWN_CHARACTERS = 100  # of what the client wrote, in an error

T = TypeVar("T", bound=msgspec.Struct)


class Ignored:
    """The fields of one request that nothing was done with, by their paths."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, name: str, *, known: bool = False) -> None:
        """`known`: it is one of the dialect's, and asks for what is never done here.

        Raises: UnsupportedField for another one, where the operator wants that (`server.unknown_fields`).
        """
        if not known and unknown.handling().policy == "strict":
            raise UnsupportedField(name[:_SHOWN_CHARACTERS], why="unknown")
        self._names[name] = None

    def header(self) -> dict[str, str]:
        """Nothing when all fields were known."""
        return unknown.header_of(self._names)


def read_known(
    table: Mapping[str, Any],
    into: type[T],
    ignored: Ignored,
    *,
    at: str = "",
    refused: Mapping[str, str] | None = None,
) -> T:
    """The known fields as a struct. `refused`: known ones that would change the answer and are not supported, with the
    reason; they may be there with nothing in them (null, false, 0, empty). `at`: the path of this object.

    Raises: InvalidRequest with the path; UnsupportedField.
    """
    prefix = f"{at}." if at else ""
    refused = refused or {}
    known = {field.encode_name for field in msgspec.structs.fields(into)}
    given: dict[str, Any] = {}
    for name, value in table.items():
        if name in known:
            given[name] = value
        elif name in refused:
            if value:
                raise UnsupportedField(f"{prefix}{name}", why=f"not supported here: {refused[name]}")
        elif value is not None:
            ignored.add(f"{prefix}{name}")
    return bodies.convert(given, into, at=at)


def object_at(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object in field `name`, empty when it is absent or null.

    Raises: InvalidRequest.
    """
    value = table.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{name}` must be an object.", param=name)
    return value

"""What a program's Python returns, as JSON: values that JSON cannot say are errors with a name, not guesses.

A number that is none (NaN, infinity) is null, as in JavaScript's JSON. Bytes are text if they are UTF-8.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, NamedTuple

import msgspec


class Written(NamedTuple):
    """`error`: `too_large`, `not_utf8` or `not_json`, and `value` is null then."""

    value: bytes
    error: str = ""
    message: str = ""


def write(value: Any, *, limit: int) -> Written:
    """`limit`: bytes of JSON."""
    try:
        if isinstance(value, bytes | bytearray):
            value = bytes(value).decode()
        content = msgspec.json.encode(value, enc_hook=_plain)
    except UnicodeError as error:
        return Written(
            b"null", "not_utf8", f"The result is not UTF-8 text: {error.reason if hasattr(error, 'reason') else error}."
        )
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        return Written(b"null", "not_json", f"The result cannot be said in JSON: {error}")
    if len(content) > limit:
        text = (
            f"The result has {len(content)} bytes as JSON and may have {limit}. Return a part, or write it to a file."
        )
        return Written(b"null", "too_large", text)
    return Written(content)


def _plain(value: Any) -> Any:
    """Of what msgspec does not know: paths, numpy's arrays and numbers, pandas' frames."""
    if isinstance(value, PurePath):
        return str(value)
    for method in ("tolist", "to_dict", "isoformat"):
        make = getattr(value, method, None)
        if callable(make):
            return make()
    raise TypeError(f"it has a {type(value).__name__}")

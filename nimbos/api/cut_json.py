"""A JSON object of which only the beginning came: what of it is whole."""

from __future__ import annotations

import msgspec

_CLOSERS = {"{": "}", "[": "]"}


def whole_object(text: str) -> str:
    """`text` itself when it is an object, else its members up to the last complete one; "{}" when there is none.

    An answer can end inside the arguments of a call, and those who read the whole reply want an object.
    """
    if _is_object(text):
        return text
    end, closers = 0, ""
    stack: list[str] = []
    in_string = escaped = False
    for place, character in enumerate(text):
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
            continue
        if character == '"':
            in_string = True
        elif character in _CLOSERS:
            stack.append(_CLOSERS[character])
        elif character in "}]" and stack:
            stack.pop()
        if character in "}]," and stack:
            end, closers = place + (character != ","), "".join(reversed(stack))
    best = text[:end] + closers
    return best if _is_object(best) else "{}"


def _is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError):
        return False

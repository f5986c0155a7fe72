"""What came of a call in a worker, as values: nothing that a tool does is an exception here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

# Codes that a worker may give; the server itself adds `died`, and `deadline` for what a worker could not stop.
WORKER_CODES = frozenset({"unknown_tool", "bad_arguments", "raised", "deadline", "too_large", "not_utf8", "not_json"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """`error`: a code, "" where it went well; `value` is then None, and `message` a sentence for the model.
    `perhaps`: the tool may have done what it does, nobody knows: it was cut off. `suspects`: by one of so many, itself
    among them; 0: by another. `size_bytes`: of the value as JSON. `printed`: by the program while it was under
    way, the last of it."""

    value: Any = None
    size_bytes: int = 0
    error: str = ""
    message: str = ""
    perhaps: bool = False
    suspects: int = 0
    printed: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """`happened` None: it cannot be told, and `message` says why. `result`: where it happened and that is known."""

    happened: bool | None
    result: Any = None
    message: str = ""


class NotJson(Exception):
    """A worker sent what no worker of ours sends."""


def read_value(content: bytes) -> Any:
    """Of a frame that was taken: its size is bounded. Raises: NotJson."""
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise NotJson(type(error).__name__) from error

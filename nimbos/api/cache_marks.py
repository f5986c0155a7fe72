"""`cache_control` in messages of OpenAI's shape, as Model Studio has it: up to where a prompt is to be kept.

The last marker counts, since what is kept up to it holds what is kept up to the others. Anthropic's blocks have a file
of their own, `anthropic_cache.py`; what becomes of both is in `pins.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nimbos.errors import InvalidRequest

_TTLS = (None, "5m")
_SENTINEL = {"type": "text", "text": "\x02"}


def behind_last_mark(messages: Sequence[Mapping[str, Any]], *, at: str = "messages") -> list[dict[str, Any]] | None:
    """The same messages with a part behind the last marker that stands nowhere else: where the prompts of both begin to
    differ, the marked prefix ends. None where nothing is marked. `at`: of the messages in the body.

    Raises: InvalidRequest for a marker that is none.
    """
    last: tuple[int, int] | None = None
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        for place, part in enumerate(content if isinstance(content, list) else ()):
            marker = part.get("cache_control") if isinstance(part, Mapping) else None
            if marker is not None:
                _check(marker, f"{at}[{number}].content[{place}].cache_control")
                last = number, place
    if last is None:
        return None
    number, place = last
    changed = [dict(message) for message in messages]
    parts = changed[number]["content"]
    changed[number]["content"] = [*parts[: place + 1], _SENTINEL, *parts[place + 1 :]]
    return changed


def _check(marker: Any, at: str) -> None:
    if not isinstance(marker, dict) or marker.get("type") != "ephemeral" or marker.get("ttl") not in _TTLS:
        raise InvalidRequest(f'`{at}` must be {{"type": "ephemeral"}}, which is kept for five minutes.', param=at)

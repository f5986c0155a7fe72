"""Tool results of dialects that may leave out which call they answer: by the tool's name, or else by their order."""

from __future__ import annotations

from collections import deque
from typing import Any


def pair_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in OpenAI's shape in which every call has an id, and every result that can be told the id of its call.

    A result without one answers the first open call of its `name`, or without a name the first open call at all.
    """
    paired: list[dict[str, Any]] = []
    waiting: deque[tuple[str, str]] = deque()  # (id, the tool's name) of calls without a result
    made = 0
    for message in messages:
        calls = message.get("tool_calls")
        if message.get("role") == "assistant" and isinstance(calls, list):
            named: list[Any] = []
            for call in calls:
                made += 1
                named.append(_with_id(call, f"call_{made}"))
            message = {**message, "tool_calls": named}
            waiting.extend(_known(named))
        elif message.get("role") == "tool":
            message = _answering(message, waiting)
        paired.append(message)
    return paired


def _with_id(call: Any, otherwise: str) -> Any:
    return {**call, "id": call.get("id") or otherwise} if isinstance(call, dict) else call


def _known(calls: list[Any]) -> list[tuple[str, str]]:
    """What is no proper call is left to the chat layer, which refuses it by its place."""
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(call["id"], str):
            found.append((call["id"], str(function.get("name"))))
    return found


def _answering(message: dict[str, Any], waiting: deque[tuple[str, str]]) -> dict[str, Any]:
    named, name = message.get("tool_call_id"), message.get("name")
    for known in waiting:
        if known[0] == named if named else name is None or known[1] == name:
            waiting.remove(known)
            return {**message, "tool_call_id": known[0]}
    return message

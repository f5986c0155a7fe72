"""What an answer is made of for a client: words, thoughts and calls, piece by piece or folded into one message."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """`id` and `name` come on a call's first delta only; `arguments` is a piece of JSON text, as the model wrote it."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Delta = ContentDelta | ReasoningDelta | ToolCallDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedMessage:
    """`content` and `reasoning` are None where there was not one character of it."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


def fold(deltas: Iterable[Delta]) -> FoldedMessage:
    """The message that a streaming client would have put together."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, list[str]] = {}
    heads: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case ToolCallDelta(index=index, id=id_, name=name, arguments=arguments):
                if id_ is not None and name is not None:
                    heads[index] = (id_, name)
                calls.setdefault(index, []).append(arguments)
    made = (ToolCall(id=heads[i][0], name=heads[i][1], arguments="".join(calls[i])) for i in sorted(calls))
    return FoldedMessage(content="".join(content) or None, reasoning="".join(reasoning) or None, tool_calls=tuple(made))

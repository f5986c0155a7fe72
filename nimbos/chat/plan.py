"""What goes into the chat layer and what comes out: a request in messages, a plan in prompt parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from nimbos.chat.dial import Dial
from nimbos.chat.tools import ToolUse
from nimbos.types import Grammar, Text, Thinking


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A chat in OpenAI's shape.

    `tool_choice`: "none", "auto", "required" or `{"name": …}`. `response_format`: None, "json_object", or a JSON Schema
    as JSON text. `grammar`: the caller's own, instead of a response format. `context_tokens`: the window,
    0 is the model's.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    response_format: str | None = None
    grammar: Grammar | None = None
    thinking: Dial = Dial()
    max_tokens: int | None = None
    context_tokens: int = 0
    template_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The parts of an ask that come from its messages. `stop`: strings the template needs besides the caller's.
    `tools`: what a `Splitter` looks for; None when there is nothing to call."""

    parts: tuple[Text, ...]
    grammar: Grammar | None = None
    thinking: Thinking | None = None
    stop: tuple[str, ...] = ()
    tools: ToolUse | None = None

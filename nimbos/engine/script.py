"""The file behind a scripted model, and which of its replies a conversation gets.

    {"replies": [{"match": REGEX, "times": N, "thinking": "…", "text": "…",
                  "tool_calls": [{"name": "…", "arguments": {…}}], "tokens_per_second": R}],
     "default": {…}}

`match` is searched in the last user or tool message; the first reply that matches is given. With `times`, a reply that
already stands N times in the conversation is passed over. An unknown key is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from nimbos.errors import InvalidRequest, ModelUnusable

MATCHED_CHARACTERS = 20_000  # a pattern sees no more of a message: a slow one must not hold the server
PATTERN_CHARACTERS = 2_000

_DECODER = json.JSONDecoder()


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)


class Reply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    match: str | None = None
    times: int | None = None
    thinking: str = ""
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tokens_per_second: float | None = None

    def answer(self) -> str:
        """Text and tool calls as a Hermes-style model would write them."""
        blocks = [self.text] if self.text else []
        for call in self.tool_calls:
            body = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
            blocks.append(f"<tool_call>\n{body}\n</tool_call>")
        return "\n".join(blocks)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    replies: tuple[Reply, ...] = ()
    default: Reply | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """`calls`: (name, arguments) of an assistant's tool calls."""

    role: str
    text: str
    calls: tuple[tuple[str, Any], ...] = ()


class Script:
    def __init__(self, replies: tuple[tuple[re.Pattern[str], Reply], ...], default: Reply | None) -> None:
        self._replies = replies
        self._default = default

    @classmethod
    def read(cls, path: Path) -> tuple[Script, bytes]:
        """The script and the file's bytes.

        Raises: ModelUnusable naming the file and the key at fault.
        """
        try:
            content = path.read_bytes()
            file = msgspec.json.decode(content, type=_File)
        except OSError as error:
            raise ModelUnusable(str(path), reason=error.strerror or "it cannot be read") from error
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ModelUnusable(str(path), reason=f"it is not a script: {error}") from error
        replies = tuple((_compile(path, number, reply), reply) for number, reply in enumerate(file.replies))
        if file.default is not None:
            _check(path, "$.default", file.default)
            if file.default.match is not None or file.default.times is not None:
                raise ModelUnusable(str(path), reason="`match` and `times` have no meaning in $.default")
        return cls(replies, file.default), content

    def reply_to(self, conversation: tuple[Message, ...], *, model_id: str) -> Reply:
        """Raises: InvalidRequest when no reply matches and the file has no default."""
        asked = next((m.text for m in reversed(conversation) if m.role in ("user", "tool")), "")
        for pattern, reply in self._replies:
            if pattern.search(asked[:MATCHED_CHARACTERS]) is None:
                continue
            if reply.times is None or _standing(reply, conversation) < reply.times:
                return reply
        if self._default is None:
            raise InvalidRequest(
                f"No reply of the scripted model {model_id!r} matches the last message, and its file has no default.",
                param="messages",
            )
        return self._default


def conversation_of(prompt: str) -> tuple[Message, ...]:
    """The messages in a prompt that the scripted chat template wrote (JSON); any other prompt is one user message.

    Behind the JSON there may be a mark that opens thinking.
    """
    try:
        found, _ = _DECODER.raw_decode(prompt)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(map(_is_message, found)):
        return (Message(role="user", text=prompt),)
    return tuple(_message(message) for message in found)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _message(message: dict[str, Any]) -> Message:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    calls = message.get("tool_calls")
    found = [_call(call) for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return Message(role=message["role"], text=content if isinstance(content, str) else "", calls=tuple(found))


def _call(call: dict[str, Any]) -> tuple[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict):
        return "", None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.MsgspecError, RecursionError):
            return str(function.get("name")), arguments
    return str(function.get("name")), arguments


def _standing(reply: Reply, conversation: tuple[Message, ...]) -> int:
    """How often the assistant already said exactly this (thinking aside, which clients drop)."""
    calls = tuple((call.name, call.arguments) for call in reply.tool_calls)
    return sum(
        1
        for message in conversation
        if message.role == "assistant" and message.text.strip() == reply.text.strip() and message.calls == calls
    )


def _compile(path: Path, number: int, reply: Reply) -> re.Pattern[str]:
    where = f"$.replies[{number}]"
    _check(path, where, reply)
    if reply.match is None:
        raise ModelUnusable(str(path), reason=f"{where} has no `match`; a reply to everything is `default`")
    if len(reply.match) > PATTERN_CHARACTERS:
        raise ModelUnusable(str(path), reason=f"{where}.match is longer than {PATTERN_CHARACTERS} characters")
    try:
        return re.compile(reply.match)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelUnusable(str(path), reason=f"{where}.match is not a regular expression: {error}") from error


def _check(path: Path, where: str, reply: Reply) -> None:
    if reply.times is not None and reply.times < 1:
        raise ModelUnusable(str(path), reason=f"{where}.times is {reply.times}; it must be 1 or more")
    if reply.tokens_per_second is not None and reply.tokens_per_second <= 0:
        raise ModelUnusable(str(path), reason=f"{where}.tokens_per_second must be above 0")

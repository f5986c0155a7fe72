"""What Anthropic's clients read: messages, their blocks, and the events of a stream."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from nimbos.api.openai_wire import ReceiptBody
from nimbos.api.pins import written_tokens
from nimbos.types import Usage


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    text: str = ""
    citations: None = None


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    thinking: str = ""
    signature: str = ""


class Direct(msgspec.Struct, frozen=True, tag_field="type", tag="direct"):
    """Who called a tool: the model itself."""


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: msgspec.Raw = msgspec.Raw(b"{}")
    caller: Direct = Direct()


Block = TextBlock | ThinkingBlock | ToolUseBlock


class CacheCreation(msgspec.Struct, kw_only=True):
    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int = 0


class OutputDetails(msgspec.Struct, kw_only=True):
    thinking_tokens: int


class UsageBody(msgspec.Struct, kw_only=True):
    """`input_tokens` is what was neither in memory nor newly kept for a marker; all three together are the prompt."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    cache_creation: CacheCreation
    output_tokens: int
    output_tokens_details: OutputDetails
    server_tool_use: None = None
    inference_geo: None = None
    service_tier: str | UnsetType = UNSET

    @staticmethod
    def of(usage: Usage, *, pin_tokens: int) -> UsageBody:
        written = written_tokens(usage, pin_tokens)
        return UsageBody(
            input_tokens=usage.input - usage.cached - written,
            cache_creation_input_tokens=written,
            cache_read_input_tokens=usage.cached,
            cache_creation=CacheCreation(ephemeral_5m_input_tokens=written),
            output_tokens=usage.output,
            output_tokens_details=OutputDetails(thinking_tokens=usage.thinking),
        )


class ContextManagement(msgspec.Struct, kw_only=True):
    """Contexts are never edited here."""

    applied_edits: list[str] = msgspec.field(default_factory=list)


class Message(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """`model` is the name that the client asked for."""

    id: str
    role: str = "assistant"
    model: str
    content: list[Block] = msgspec.field(default_factory=list)
    stop_reason: str | None = None
    stop_sequence: str | None = None
    stop_details: None = None
    container: None = None
    usage: UsageBody
    context_management: ContextManagement | UnsetType = UNSET
    x_nimbos: ReceiptBody | UnsetType = UNSET


class TextDelta(msgspec.Struct, tag_field="type", tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    thinking: str


class SignatureDelta(msgspec.Struct, tag_field="type", tag="signature_delta"):
    signature: str


class InputJsonDelta(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    partial_json: str


Delta = TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    message: Message


class Ping(msgspec.Struct, tag_field="type", tag="ping"):
    pass


class BlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    index: int
    content_block: Block


class BlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    index: int
    delta: Delta


class BlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    index: int


class Stopped(msgspec.Struct, kw_only=True):
    stop_reason: str
    stop_sequence: str | None
    stop_details: None = None
    container: None = None


class MessageDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="message_delta"):
    delta: Stopped
    usage: UsageBody
    context_management: ContextManagement | UnsetType = UNSET
    x_nimbos: ReceiptBody | UnsetType = UNSET


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    pass


Event = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


class TokenCount(msgspec.Struct, kw_only=True):
    input_tokens: int
    context_management: dict[str, Any] | UnsetType = UNSET


_encoder = msgspec.json.Encoder()


def encode(body: Any) -> bytes:
    return _encoder.encode(body)


def event(one: Event) -> bytes:
    """One server-sent event, named after its type."""
    name = str(one.__struct_config__.tag).encode()
    return b"event: " + name + b"\ndata: " + _encoder.encode(one) + b"\n\n"


PING = b'event: ping\ndata: {"type":"ping"}\n\n'

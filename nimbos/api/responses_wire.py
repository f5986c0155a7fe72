"""What the Responses routes answer, as structs. Read `responses_request.py` for what they take."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from nimbos.api import openai_wire as wire
from nimbos.api.responses_items import Item
from nimbos.errors import BudgetExhausted, InvalidRequest, NimbosError, Overloaded
from nimbos.types import Usage


class InputDetails(msgspec.Struct):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class UsageBody(msgspec.Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> UsageBody:
        return cls(
            input_tokens=usage.input,
            input_tokens_details=InputDetails(usage.cached),
            output_tokens=usage.output,
            output_tokens_details=OutputDetails(usage.thinking),
            total_tokens=usage.input + usage.output,
        )


class ErrorBody(msgspec.Struct, kw_only=True):
    code: str
    message: str

    @classmethod
    def of(cls, error: NimbosError) -> ErrorBody:
        """In the few codes that OpenAI has for an answer that failed after it had begun."""
        if isinstance(error, Overloaded | BudgetExhausted):
            return cls(code="rate_limit_exceeded", message=error.message)
        if isinstance(error, InvalidRequest):
            return cls(code="invalid_prompt", message=error.message)
        return cls(code="server_error", message=error.message)


class IncompleteDetails(msgspec.Struct):
    reason: str


class ConversationRef(msgspec.Struct):
    id: str


class Truncated(msgspec.Struct, kw_only=True):
    """What `truncation: "auto"` left out of the prompt, oldest first."""

    dropped_items: list[str]
    prompt_tokens: int
    limit_tokens: int


class Extension(msgspec.Struct, kw_only=True):
    """`x_nimbos` of a response. `stop`: "budget" when that ended the answer."""

    receipt: wire.ReceiptBody | UnsetType = UNSET
    truncated: Truncated | UnsetType = UNSET
    stop: str | UnsetType = UNSET


class Response(msgspec.Struct, kw_only=True):
    """Fields up to `user` echo the request and are the same in every event of an answer."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    background: bool
    conversation: ConversationRef | None
    include: list[str] | UnsetType = UNSET
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    user: str | None
    completed_at: int | None = None
    error: ErrorBody | None = None
    incomplete_details: IncompleteDetails | None = None
    output: list[Item] = msgspec.field(default_factory=list)
    usage: UsageBody | None = None
    x_nimbos: Extension | UnsetType = UNSET


class Page(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(msgspec.Struct, kw_only=True):
    id: str
    object: str
    deleted: bool = True


class TokenCount(msgspec.Struct, kw_only=True):
    object: str = "response.input_tokens"
    input_tokens: int


class Compacted(msgspec.Struct, kw_only=True):
    id: str
    object: str = "response.compaction"
    created_at: int
    output: list[Item]
    usage: UsageBody
    x_nimbos: Extension | UnsetType = UNSET


class Conversation(msgspec.Struct, kw_only=True):
    id: str
    object: str = "conversation"
    created_at: int
    metadata: dict[str, str]


Event = dict[str, Any]  # with `type` and `sequence_number`


def event(body: Event) -> bytes:
    """One server-sent event; the official clients read the type of both lines."""
    return b"event: " + str(body["type"]).encode() + b"\ndata: " + wire.encode(body) + b"\n\n"


def failure(error: NimbosError) -> bytes:
    """For a stream that cannot go on and has no response to tell of."""
    code = error.code
    return event({"type": "error", "code": code, "message": error.message, "param": error.param, "sequence_number": 0})

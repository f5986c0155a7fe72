"""What DashScope's routes answer, and how it frames a stream: numbered events with the status in a comment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import msgspec
from msgspec import UNSET, UnsetType

from nimbos.api import openai_wire as wire
from nimbos.api.errors import Shape
from nimbos.api.sse import Framing
from nimbos.errors import BudgetExhausted, InvalidRequest, NimbosError, NotFound, Overloaded
from nimbos.types import Usage, new_id

PREFIXES = ("/api/v1/",)

_CODES = {
    "invalid_api_key": "InvalidApiKey",
    "forbidden": "AccessDenied",
    "model_not_found": "ModelNotFound",
    "not_found": "InvalidURL",
    "method_not_allowed": "UnsupportedOperation",
    "conflict": "Conflict",
    "payload_too_large": "BadRequest.TooLarge",
    "headers_too_large": "BadRequest.TooLarge",
    "model_unusable": "ModelUnavailable",
    "not_ready": "ModelUnavailable",
    "engine_failed": "InternalError.Algo",
    "answer_failed": "InternalError.Algo",
    "storage_unavailable": "ServiceUnavailable",
}
_LIMITS = {"requests": "Throttling.RateQuota", "tokens": "Throttling.AllocationQuota"}


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int


class UsageBody(msgspec.Struct, kw_only=True):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    prompt_tokens_details: wire.PromptDetails
    output_tokens_details: OutputDetails

    @classmethod
    def of(cls, usage: Usage, *, pin_tokens: int = 0) -> UsageBody:
        """`pin_tokens`: of the ask."""
        return cls(
            input_tokens=usage.input,
            output_tokens=usage.output,
            total_tokens=usage.input + usage.output,
            prompt_tokens_details=wire.PromptDetails.of(usage, pin_tokens),
            output_tokens_details=OutputDetails(usage.thinking),
        )


class TextPart(msgspec.Struct):
    text: str


class Message(msgspec.Struct, kw_only=True):
    """`reasoning_content` is always there: the official examples read it without asking."""

    role: str = "assistant"
    content: str | list[TextPart]
    reasoning_content: str
    tool_calls: list[wire.ToolCall] | UnsetType = UNSET


class Choice(msgspec.Struct, kw_only=True):
    """`finish_reason` is the word "null" while the choice goes on."""

    index: int
    finish_reason: str
    message: Message
    logprobs: wire.ChoiceLogprobs | UnsetType = UNSET


class Output(msgspec.Struct, kw_only=True):
    """Either `choices`, or `text` with what belongs to it."""

    text: str | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    choices: list[Choice] | UnsetType = UNSET


class Reply(msgspec.Struct, kw_only=True):
    """A whole answer, or one event of a stream; usage and receipt stand in the last."""

    output: Output
    usage: UsageBody | UnsetType = UNSET
    request_id: str
    x_nimbos: wire.ReceiptBody | UnsetType = UNSET


class Embedding(msgspec.Struct, kw_only=True):
    text_index: int
    embedding: list[float]


class Embeddings(msgspec.Struct):
    embeddings: list[Embedding]


class TotalUsage(msgspec.Struct):
    total_tokens: int


class EmbeddingsReply(msgspec.Struct, kw_only=True):
    output: Embeddings
    usage: TotalUsage
    request_id: str


class Document(msgspec.Struct):
    text: str


class Ranked(msgspec.Struct, kw_only=True):
    index: int
    relevance_score: float
    document: Document | UnsetType = UNSET


class Ranking(msgspec.Struct):
    results: list[Ranked]


class RankingReply(msgspec.Struct, kw_only=True):
    output: Ranking
    usage: TotalUsage
    request_id: str


class ErrorBody(msgspec.Struct, kw_only=True):
    code: str
    message: str
    request_id: str


def code_of(error: NimbosError) -> str:
    """DashScope's word for an error of ours; the status stays ours."""
    if isinstance(error, BudgetExhausted):
        return "Arrearage"
    if isinstance(error, Overloaded):
        return _LIMITS.get(error.limit, "Throttling")
    if isinstance(error, NotFound):
        return _CODES.get(error.code, "InvalidURL")
    if isinstance(error, InvalidRequest):
        return "InvalidParameter"
    return _CODES.get(error.code, "InternalError")


def error_of(error: NimbosError, request_id: str | None = None) -> bytes:
    """`request_id`: of the ask, where it came to one."""
    body = ErrorBody(code=code_of(error), message=error.message, request_id=request_id or new_id("req"))
    return wire.encode(body)


SHAPE = Shape(prefixes=PREFIXES, body=error_of)


def shape_of(request_id: str) -> Shape:
    return Shape(prefixes=PREFIXES, body=lambda error: error_of(error, request_id))


@dataclass(frozen=True, slots=True)
class Numbered:
    """The events of one stream."""

    request_id: str
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def result(self, reply: Reply) -> bytes:
        return b"id:%d\nevent:result\n:HTTP_STATUS/200\ndata:%s\n\n" % (next(self._numbers), wire.encode(reply))

    def framing(self) -> Framing:
        """`status` besides the comment: the official package reads it there."""
        return Framing(error=self._error)

    def _error(self, error: NimbosError) -> bytes:
        head = b"id:%d\nevent:error\n:HTTP_STATUS/%d\nstatus:%d\n" % (next(self._numbers), error.status, error.status)
        return head + b"data:" + error_of(error, self.request_id) + b"\n\n"

"""What Ollama's routes answer: JSON lines, durations in nanoseconds, times with their zone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from nimbos.api import openai_wire as wire
from nimbos.api.errors import Shape
from nimbos.api.sse import Framing
from nimbos.errors import NimbosError
from nimbos.types import ChosenLogprob

VERSION = "0.12.6"  # of Ollama's API, as far as these routes follow it; clients compare it with what they need


class Function(msgspec.Struct, kw_only=True):
    index: int
    name: str
    arguments: dict[str, Any]


class ToolCall(msgspec.Struct, kw_only=True):
    id: str
    function: Function


class Message(msgspec.Struct, kw_only=True):
    role: str = "assistant"
    content: str
    thinking: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class TokenLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenLogprob] | UnsetType = UNSET

    @classmethod
    def of(cls, chosen: ChosenLogprob) -> TokenLogprob:
        own, others = wire.TokenBody.of(chosen.chosen), map(wire.TokenBody.of, chosen.top)
        top = [cls(token=one.token, logprob=one.logprob, bytes=one.bytes) for one in others]
        return cls(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top or UNSET)


class Line(msgspec.Struct, kw_only=True):
    """A piece of an answer, or all of it. `message` is `/api/chat`'s, `response` and `thinking` are `/api/generate`'s.
    What stands after `done_reason` comes with the last line."""

    model: str
    created_at: str
    message: Message | UnsetType = UNSET
    response: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET
    done: bool = False
    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    x_nimbos: wire.ReceiptBody | UnsetType = UNSET


class EmbedReply(msgspec.Struct, kw_only=True):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class EmbeddingsReply(msgspec.Struct):
    embedding: list[float]


class Details(msgspec.Struct, kw_only=True):
    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class ModelEntry(msgspec.Struct, kw_only=True):
    """Of `/api/tags`, and with the last three of `/api/ps`."""

    name: str
    model: str
    modified_at: str | UnsetType = UNSET
    size: int
    digest: str
    details: Details
    expires_at: str | UnsetType = UNSET
    size_vram: int | UnsetType = UNSET
    context_length: int | UnsetType = UNSET


class ModelEntries(msgspec.Struct):
    models: list[ModelEntry]


class Shown(msgspec.Struct, kw_only=True):
    license: str
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Status(msgspec.Struct, kw_only=True):
    """`digest` names the file that is being fetched; it is a label, not a hash."""

    status: str
    digest: str | UnsetType = UNSET
    total: int | UnsetType = UNSET
    completed: int | UnsetType = UNSET


class Version(msgspec.Struct):
    version: str


class ErrorBody(msgspec.Struct):
    error: str


@dataclass(slots=True, eq=False)
class Clock:
    """When an ask came, when its model was there and when it began to answer; all in nanoseconds."""

    came: int = field(default_factory=time.perf_counter_ns)
    loaded: int = 0
    opened: int = 0

    def load(self) -> None:
        self.loaded = time.perf_counter_ns()

    def open(self) -> None:
        self.opened = time.perf_counter_ns()


def now() -> str:
    return written_time(time.time())


def written_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def line(body: msgspec.Struct) -> bytes:
    return wire.encode(body) + b"\n"


def error_of(error: NimbosError) -> bytes:
    return wire.encode(ErrorBody(error.message))


SHAPE = Shape(prefixes=("/api/",), body=error_of)
FRAMING = Framing(
    media_type="application/x-ndjson", keep_alive=None, error=lambda error: line(ErrorBody(error.message))
)

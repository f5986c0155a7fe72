"""What OpenAI's routes answer, as structs, with our receipt in `x_nimbos`."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from nimbos.types import Ask, AskClass, ChosenLogprob, Final, FinishReason, ModelCard, Receipt, TokenLogprob, Usage


class CacheCreation(msgspec.Struct):
    ephemeral_5m_input_tokens: int


class PromptDetails(msgspec.Struct):
    """What is behind `cached_tokens` is there where a prefix was marked, in Model Studio's words."""

    cached_tokens: int = 0
    cache_creation_input_tokens: int | UnsetType = UNSET
    cache_creation: CacheCreation | UnsetType = UNSET
    cache_type: str | UnsetType = UNSET

    @classmethod
    def of(cls, usage: Usage, pin_tokens: int) -> PromptDetails:
        if not pin_tokens:
            return cls(usage.cached)
        written = max(0, min(pin_tokens, usage.input) - usage.cached)
        return cls(usage.cached, written, CacheCreation(written), "ephemeral")


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class UsageBody(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails

    @classmethod
    def of(cls, usage: Usage, *, pin_tokens: int = 0) -> UsageBody:
        """`pin_tokens`: of the ask."""
        return cls(
            prompt_tokens=usage.input,
            completion_tokens=usage.output,
            total_tokens=usage.input + usage.output,
            prompt_tokens_details=PromptDetails.of(usage, pin_tokens),
            completion_tokens_details=CompletionDetails(usage.thinking),
        )


class ReceiptBody(msgspec.Struct, kw_only=True):
    """How the ask was served. Over several branches: times are the longest, counts are summed."""

    ask_id: str
    ask_class: str = msgspec.field(name="class")
    queue_ms: int
    compute_ms: int
    steps: int
    mean_batch: float
    cached_tokens: int
    recomputed_tokens: int
    preemptions: int
    restarts: int
    model_hash: str
    seed: int
    stopped_by: list[str | None] | UnsetType = UNSET
    stop: str | UnsetType = UNSET  # "budget": a budget ended an answer before its limit


class Function(msgspec.Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCall(msgspec.Struct, kw_only=True):
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: Function


class TokenBody(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, given: TokenLogprob) -> TokenBody:
        return cls(given.piece.decode(errors="replace"), given.logprob, list(given.piece))


class ChosenBody(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenBody]

    @classmethod
    def of(cls, given: ChosenLogprob) -> ChosenBody:
        chosen = TokenBody.of(given.chosen)
        return cls(chosen.token, chosen.logprob, chosen.bytes, [TokenBody.of(other) for other in given.top])


class ChoiceLogprobs(msgspec.Struct):
    content: list[ChosenBody]
    refusal: None = None


class Delta(msgspec.Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    service_tier: str | UnsetType = UNSET
    usage: UsageBody | UnsetType | None = UNSET
    x_nimbos: ReceiptBody | UnsetType = UNSET


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str = "assistant"
    content: str | None = None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatMessage
    finish_reason: str
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    service_tier: str | UnsetType = UNSET
    usage: UsageBody
    x_nimbos: ReceiptBody


class TextLogprobs(msgspec.Struct):
    """The older shape of `/v1/completions`: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: TextLogprobs | None = None


class TextCompletion(msgspec.Struct, kw_only=True):
    """Also each chunk of a stream, as OpenAI has it."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: UsageBody | UnsetType | None = UNSET
    x_nimbos: ReceiptBody | UnsetType = UNSET


class EmbeddingBody(msgspec.Struct, kw_only=True):
    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[EmbeddingBody]
    model: str
    usage: EmbeddingUsage


_encoder = msgspec.json.Encoder()


def encode(body: Any) -> bytes:
    return _encoder.encode(body)


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(body) + b"\n\n"


def fingerprint(card: ModelCard) -> str:
    return f"fp_{card.model_hash[:12]}"


def completion_id(ask: Ask, prefix: str) -> str:
    """The ask's own id behind OpenAI's prefix, so that an answer can be found in the log."""
    return f"{prefix}-{ask.id.removeprefix('ask_')}"


def finish_reason(reason: FinishReason, *, called: bool) -> str:
    if reason is FinishReason.STOP and called:
        return "tool_calls"
    return reason.value


def tier_of(ask_class: AskClass) -> str:
    return {AskClass.INTERACTIVE: "priority", AskClass.BATCH: "flex"}.get(ask_class, "default")


def receipt(asks: list[Ask], finals: list[Final], card: ModelCard) -> ReceiptBody:
    """Of one answer, which may have taken several asks (a list of prompts)."""
    receipts = [final.receipt for final in finals] or [Receipt()]
    usage = sum((final.usage for final in finals), Usage())
    steps = sum(one.steps for one in receipts)
    weighted = sum(one.mean_batch * one.steps for one in receipts)
    stops = [final.stopped_by for final in sorted(finals, key=lambda final: final.branch)]
    return ReceiptBody(
        ask_id=asks[0].id,
        ask_class=asks[0].ask_class.value,
        queue_ms=max(one.queue_ms for one in receipts),
        compute_ms=max(one.compute_ms for one in receipts),
        steps=steps,
        mean_batch=round(weighted / steps, 3) if steps else 0.0,
        cached_tokens=usage.cached,
        recomputed_tokens=usage.recomputed,
        preemptions=sum(one.preemptions for one in receipts),
        restarts=max(one.restarts for one in receipts),
        model_hash=card.model_hash,
        seed=asks[0].sampling.seed,
        stopped_by=stops if any(stops) else UNSET,
        stop="budget" if any(final.budget_ended for final in finals) else UNSET,
    )

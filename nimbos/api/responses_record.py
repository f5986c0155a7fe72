"""A response as it begins, and as it is kept: what repeats its request, what tells of its answer, and its items."""

from __future__ import annotations

import time

import msgspec
from msgspec import UNSET

from nimbos.api import openai_wire as wire
from nimbos.api import responses_request as requests
from nimbos.api.dialogue import Question
from nimbos.api.responses_items import Item, canonical, restored
from nimbos.api.responses_tools import echoed
from nimbos.api.responses_wire import ConversationRef, Response
from nimbos.responses import Piece, Status
from nimbos.types import Sampling, new_id

# What of a response repeats its request. It is kept apart from the rest, and once for a whole chain.
_ECHOED = (
    "include",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "model",
    "parallel_tool_calls",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "store",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
)


def items_of(pieces: tuple[Piece, ...]) -> list[Item]:
    return [restored(piece.id, piece.content) for piece in pieces]


def pieces_of(items: tuple[Item, ...] | list[Item]) -> tuple[Piece, ...]:
    return tuple(Piece(id=item["id"], content=canonical(item)) for item in items)


def split(response: Response) -> tuple[bytes, bytes]:
    """What repeats the request, and the rest without output and status, which are kept apart."""
    table = msgspec.to_builtins(response)
    echo = {name: table.pop(name) for name in _ECHOED if name in table}
    for name in ("output", "status"):
        del table[name]
    return msgspec.json.encode(echo, order="deterministic"), msgspec.json.encode(table)


def joined(echo: bytes, body: bytes, *, status: str, output: list[Item]) -> Response:
    table = {**msgspec.json.decode(echo), **msgspec.json.decode(body), "status": status, "output": output}
    return msgspec.convert(table, Response)


def begun_of(body: requests.ResponsesBody, question: Question, sampling: Sampling) -> Response:
    text = body.text or requests.TextConfig()
    shape = {"type": "text"} if text.format is None else _given(text.format)
    reasoning = body.reasoning or requests.Reasoning()
    return Response(
        id=new_id("resp"),
        created_at=int(time.time()),
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        conversation=ConversationRef(body.conversation_id) if body.conversation_id is not None else None,
        include=body.include if body.include else UNSET,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=question.card.id,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": reasoning.effort, "summary": requests.summary_asked(body)},
        safety_identifier=body.safety_identifier,
        service_tier=wire.tier_of(question.ask.ask_class) if body.service_tier is not None else "default",
        store=body.store is not False,
        temperature=sampling.temperature,
        text={"format": shape, "verbosity": text.verbosity or "medium"},
        tool_choice=body.tool_choice or "auto",
        tools=echoed(body.tools),
        top_logprobs=body.top_logprobs or 0,
        top_p=sampling.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )


def _given(shape: requests.TextFormat) -> dict[str, object]:
    table: dict[str, object] = msgspec.to_builtins(shape)
    return {name: value for name, value in table.items() if value is not None}


def status_of(response: Response) -> Status:
    status: Status = msgspec.convert(response.status, Status)
    return status

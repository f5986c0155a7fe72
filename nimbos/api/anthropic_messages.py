"""`POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's chat, streamed or whole.

The body is read in `anthropic_body.py`, the answer written in `anthropic_answer.py`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import anthropic_wire as wire
from nimbos.api import body as bodies
from nimbos.api.access import account_of
from nimbos.api.anthropic_answer import Manner, events_of, fold, reply_of
from nimbos.api.anthropic_body import Wanted, read
from nimbos.api.anthropic_errors import event_of, limit_headers
from nimbos.api.dialogue import Question, understand
from nimbos.api.exchange import ask_headers, event_stream, json_reply
from nimbos.api.fields import check_unstreamed
from nimbos.api.pins import pinned
from nimbos.api.sse import Framing, or_gone
from nimbos.batches import AnswerJournal, Reply
from nimbos.config import ServerSettings
from nimbos.errors import PromptTooLong
from nimbos.runtime import Runtime
from nimbos.service import Service
from nimbos.types import Account, Origin, Text


class Messages:
    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> Response:
        wanted = await self._read(request, counting=False)
        question = await or_gone(request, question_of(self._service, account_of(request), wanted))
        events = events_of(self._service, question, manner_of(wanted))
        if not wanted.body.stream:
            message = await or_gone(request, fold(question, events))
            return json_reply(message, headers=headers_of(question, wanted))
        request_id = _request_id(question)
        return await event_stream(
            request,
            _written(events),
            headers=lambda: headers_of(question, wanted),
            settings=self._settings,
            framing=Framing(keep_alive=wire.PING, error=lambda error: event_of(error, request_id)),
        )

    async def count(self, request: Request) -> Response:
        """Also of a prompt that is too long: that is what a client wants to know."""
        wanted = await self._read(request, counting=True)
        question = await or_gone(request, question_of(self._service, account_of(request), wanted, pin=False))
        try:
            tokens = await or_gone(request, self._service.count(question.account, question.ask))
        except PromptTooLong as error:
            tokens = error.have
        edits = {"original_input_tokens": tokens} if wanted.body.context_management is not None else UNSET
        counted = wire.TokenCount(input_tokens=tokens, context_management=edits)
        return json_reply(counted, headers={"request-id": _request_id(question), **wanted.ignored.header()})

    async def _read(self, request: Request, *, counting: bool) -> Wanted:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        header_class = request.headers.get("x-nimbos-class")
        return read(content, account_of(request), header_class=header_class, counting=counting)


async def perform(
    runtime: Runtime, account: Account, body: bytes, *, origin: Origin, journal: AnswerJournal | None = None
) -> Reply:
    """The route without HTTP, for a request of a batch. Raises: what the route would answer with an error."""
    wanted = read(body, account, header_class=None, origin=origin)
    check_unstreamed(wanted.body.stream)
    question = await question_of(runtime.service, account, wanted, journal=journal)
    return reply_of(question, await fold(question, events_of(runtime.service, question, manner_of(wanted))))


async def question_of(
    service: Service, account: Account, wanted: Wanted, *, pin: bool = True, journal: AnswerJournal | None = None
) -> Question:
    """Raises: what `understand` raises."""
    question = await understand(service, account, wanted.asked, journal=journal)
    if wanted.prefill:
        parts = (*question.ask.parts, Text(wanted.prefill, special=False))
        question = replace(question, ask=msgspec.structs.replace(question.ask, parts=parts))
    if pin and wanted.marked is not None:
        question = await pinned(service, question, wanted.marked)
    return question


def manner_of(wanted: Wanted) -> Manner:
    return Manner(
        model=wanted.body.model,
        stops=wanted.asked.stops,
        hidden=wanted.hidden,
        silent=wanted.silent,
        edits=wanted.body.context_management is not None,
    )


def headers_of(question: Question, wanted: Wanted) -> dict[str, str]:
    """Complete once the ask was let in."""
    ours = ask_headers(question)
    return {**ours, **limit_headers(ours), "request-id": _request_id(question), **wanted.ignored.header()}


def _request_id(question: Question) -> str:
    """The ask's own digits, so that an answer can be found in the log."""
    return f"req_{question.ask.id.removeprefix('ask_')}"


async def _written(events: AsyncGenerator[wire.Event, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            yield wire.event(event)

"""`POST /api/chat` and `POST /api/generate`, as lines or whole. A call without a prompt only loads the model."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import body as bodies
from nimbos.api import chat_request as asked
from nimbos.api import ollama_wire as told
from nimbos.api.access import account_of
from nimbos.api.dialogue import Asked, Question, answer, understand
from nimbos.api.exchange import ask_headers, event_stream, json_reply
from nimbos.api.lenient import Ignored
from nimbos.api.ollama_models import check_model
from nimbos.api.ollama_request import GenerateCall, Wanted, read_chat, read_generate
from nimbos.api.ollama_telling import Telling
from nimbos.api.sse import or_gone
from nimbos.chat import ChatRequest, Plan
from nimbos.config import ServerSettings
from nimbos.errors import UnsupportedField
from nimbos.service import Service
from nimbos.types import Account, Ask, Grammar, ModelCard, Origin, Text, new_id

_ANY_OBJECT = '{"type": "object"}'


class Conversations:
    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings

    async def chat(self, request: Request) -> Response:
        clock, ignored = told.Clock(), Ignored()
        wanted = read_chat(await self._table(request), ignored)
        if not wanted.body.messages:
            return await self._loaded(request, wanted, ignored, chat=True)
        question = await or_gone(request, self._understood(request, wanted, clock))
        return await self._reply(request, wanted, question, clock, ignored, chat=True)

    async def generate(self, request: Request) -> Response:
        clock, ignored = told.Clock(), Ignored()
        wanted, call = read_generate(await self._table(request), ignored)
        if not call.prompt and not call.suffix:
            return await self._loaded(request, wanted, ignored, chat=False)
        bare = call.raw or call.suffix
        work = self._bare(request, wanted, call, clock) if bare else self._understood(request, wanted, clock)
        question = await or_gone(request, work)
        return await self._reply(request, wanted, question, clock, ignored, chat=False)

    async def _table(self, request: Request) -> dict[str, object]:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        return bodies.table_of(content)

    def _asked(self, request: Request, wanted: Wanted, account: Account) -> Asked:
        """Checked before the model is loaded, and its window after."""
        plain = asked.asked(
            wanted.body,
            account,
            header_class=request.headers.get("x-nimbos-class"),
            origin=Origin(route=request.url.path),
        )

        def chat_request(card: ModelCard) -> ChatRequest:
            wanted.check_window(card)
            return plain.request(card)

        return replace(plain, request=chat_request)

    async def _understood(self, request: Request, wanted: Wanted, clock: told.Clock) -> Question:
        account = account_of(request)
        question_asked = self._asked(request, wanted, account)
        await self._service.card(wanted.body.model, account)
        clock.load()
        question = await understand(self._service, account, question_asked)
        sampling = wanted.penalised(question.ask.sampling, question.card)
        return replace(question, ask=msgspec.structs.replace(question.ask, sampling=sampling))

    async def _bare(self, request: Request, wanted: Wanted, call: GenerateCall, clock: told.Clock) -> Question:
        """A prompt without a template: as it stands, or with what shall follow it."""
        account = account_of(request)
        plain = self._asked(request, wanted, account)
        card = await self._service.card(wanted.body.model, account)
        clock.load()
        wanted.check_window(card)
        parts = _parts(call, card)
        ask = Ask(
            id=new_id("ask"),
            account=account.id,
            model=card.id,
            parts=parts,
            ask_class=plain.ask_class,
            limit_tokens=plain.limit_tokens,
            sampling=wanted.penalised(plain.sampling, card),
            stop=plain.stops,
            grammar=_grammar(wanted),
        )
        return Question(account=account, ask=ask, plan=Plan(parts=parts), card=card, origin=plain.origin)

    async def _reply(
        self, request: Request, wanted: Wanted, question: Question, clock: told.Clock, ignored: Ignored, *, chat: bool
    ) -> Response:
        telling = Telling(question=question, model=wanted.model, chat=chat, clock=clock)
        events = answer(self._service, question)
        if not wanted.stream:
            whole = await or_gone(request, telling.whole(events))
            return json_reply(whole, headers={**ask_headers(question), **ignored.header()})
        return await event_stream(
            request,
            _written(telling.lines(events)),
            headers=lambda: {**ask_headers(question), **ignored.header()},
            settings=self._settings,
            framing=told.FRAMING,
        )

    async def _loaded(self, request: Request, wanted: Wanted, ignored: Ignored, *, chat: bool) -> Response:
        """Loads the model. One that may go stays until its memory is needed, as every model here."""
        leaves = wanted.keep_alive in (0, "0")
        if not leaves:
            card = await or_gone(request, self._service.card(wanted.body.model, account_of(request)))
            check_model(account_of(request), card.id)
        line = told.Line(
            model=wanted.model, created_at=told.now(), done=True, done_reason="unload" if leaves else "load"
        )
        if chat:
            line.message = told.Message(content="")
        else:
            line.response = ""
        return json_reply(line, headers=ignored.header())


async def _written(lines: AsyncGenerator[told.Line, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(lines):
        async for line in lines:
            yield told.line(line)


def _parts(call: GenerateCall, card: ModelCard) -> tuple[Text, ...]:
    """Raises: UnsupportedField where the model has no marks for a suffix."""
    prompt = call.prompt or ""
    if not call.suffix:
        return (Text(prompt),)
    if card.fim is None:
        raise UnsupportedField("suffix", why=f"not supported by the model {card.id!r}, which has no tokens for it")
    before, after, middle = card.fim
    return Text(before), Text(prompt, special=False), Text(after), Text(call.suffix, special=False), Text(middle)


def _grammar(wanted: Wanted) -> Grammar | None:
    given = wanted.body.response_format
    if given is None:
        return None
    schema = given.json_schema.schema if given.json_schema is not None else None
    source = msgspec.json.encode(schema).decode() if schema is not None else _ANY_OBJECT
    return Grammar(kind="json_schema", source=source)

"""`text-generation/generation` and `multimodal-generation/generation`: DashScope's own chat, streamed or whole.

Without `incremental_output` each event of a stream repeats all that was said so far, so both forms and the whole answer
are one state (`_Choice`) told in different pieces.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import body as bodies
from nimbos.api import chat_request as asked
from nimbos.api import dashscope_wire as told
from nimbos.api import errors
from nimbos.api import openai_wire as wire
from nimbos.api.access import account_of
from nimbos.api.dashscope_request import Form, read_chat, wants_stream
from nimbos.api.dialogue import Ended, Event, Opened, Question, Said, Told, answer
from nimbos.api.exchange import ask_headers, event_stream, json_reply
from nimbos.api.lenient import Ignored
from nimbos.api.pins import understand_pinned
from nimbos.api.sse import or_gone
from nimbos.chat import ContentDelta, ReasoningDelta, ToolCallDelta
from nimbos.config import ServerSettings
from nimbos.errors import NimbosError
from nimbos.service import Service
from nimbos.types import ChosenLogprob, Origin, Usage

UNFINISHED = "null"  # the word, as the original has it


class Generation:
    def __init__(self, service: Service, settings: ServerSettings, *, parts: bool) -> None:
        """`parts`: contents are lists of parts, as the multimodal route has them."""
        self._service = service
        self._settings = settings
        self._parts = parts

    async def create(self, request: Request) -> Response:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        table = bodies.table_of(content)
        ignored = Ignored()
        body, form = read_chat(table, ignored, request.headers, parts=self._parts)
        wanted = asked.asked(
            body,
            account_of(request),
            header_class=request.headers.get("x-nimbos-class"),
            origin=Origin(route=request.url.path),
            at="input.messages",
        )
        question = await or_gone(request, understand_pinned(self._service, account_of(request), wanted))
        try:
            return await self._reply(request, question, form, ignored, streamed=wants_stream(request.headers, table))
        except NimbosError as error:  # from here on it can be found by the ask's id
            return errors.response_to(error, told.shape_of(question.ask.id))

    async def _reply(
        self, request: Request, question: Question, form: Form, ignored: Ignored, *, streamed: bool
    ) -> Response:
        events = answer(self._service, question)
        if not streamed:
            reply = await or_gone(request, whole(question, events, form))
            return json_reply(reply, headers={**ask_headers(question), **ignored.header()})
        numbered = told.Numbered(question.ask.id)
        return await event_stream(
            request,
            _written(numbered, replies(question, events, form, used=lambda: self._service.used(question.ask.id))),
            headers=lambda: {**ask_headers(question), **ignored.header()},
            settings=self._settings,
            framing=numbered.framing(),
        )


async def _written(numbered: told.Numbered, pieces: AsyncGenerator[told.Reply, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces):
        async for piece in pieces:
            yield numbered.result(piece)


async def replies(
    question: Question, events: AsyncGenerator[Event, None], form: Form, *, used: Callable[[], Usage]
) -> AsyncGenerator[told.Reply, None]:
    """The answer as events, each with the usage so far. The last choice to end waits for the whole one.

    Of several choices only the last event has a usage: the official package adds up one of each choice.
    """
    choices = [_Choice(number, form) for number in range(question.ask.n)]
    last: Ended | None = None

    def reply(told_now: list[told.Choice]) -> told.Reply:
        usage = told.UsageBody.of(used(), pin_tokens=question.ask.pin_tokens) if len(choices) == 1 else UNSET
        return msgspec.structs.replace(_reply(question, form, told_now), usage=usage)

    async with aclosing(events):
        async for event in events:
            if isinstance(event, Opened):
                yield reply([choice.piece() for choice in choices])
            elif isinstance(event, Said):
                yield reply([choices[event.branch].said(event)])
            elif isinstance(event, Ended):
                if last is not None:
                    yield reply([choices[last.branch].ended(last)])
                last = event
            else:
                assert last is not None
                yield _with_usage(_reply(question, form, [choices[last.branch].ended(last)]), question, event)


async def whole(question: Question, events: AsyncGenerator[Event, None], form: Form) -> told.Reply:
    """The same answer at once."""
    form = Form(text=form.text, incremental=False, parts=form.parts)
    choices = [_Choice(number, form) for number in range(question.ask.n)]
    last: Told | None = None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Said):
                choices[event.branch].add(event)
            elif isinstance(event, Ended):
                choices[event.branch].end(event)
            elif isinstance(event, Told):
                last = event
    assert last is not None
    return _with_usage(_reply(question, form, [choice.piece() for choice in choices]), question, last)


def _with_usage(reply: told.Reply, question: Question, event: Told) -> told.Reply:
    receipt = wire.receipt([question.ask], list(event.finals), question.card)
    usage = told.UsageBody.of(event.usage, pin_tokens=question.ask.pin_tokens)
    return msgspec.structs.replace(reply, usage=usage, x_nimbos=receipt)


def _reply(question: Question, form: Form, choices: list[told.Choice]) -> told.Reply:
    if not form.text:
        return told.Reply(output=told.Output(choices=choices), request_id=question.ask.id)
    message = choices[0].message
    assert isinstance(message.content, str)
    output = told.Output(
        text=message.content,
        finish_reason=choices[0].finish_reason,
        reasoning_content=message.reasoning_content or UNSET,
    )
    return told.Reply(output=output, request_id=question.ask.id)


@dataclass(slots=True, eq=False)
class _Choice:
    """All that one choice has said so far."""

    number: int
    form: Form
    content: str = ""
    reasoning: str = ""
    calls: list[wire.ToolCall] = field(default_factory=list)
    logprobs: list[wire.ChosenBody] = field(default_factory=list)
    finish_reason: str = UNFINISHED

    def add(self, said: Said) -> None:
        delta = said.delta
        if isinstance(delta, ContentDelta):
            self.content += delta.text
        elif isinstance(delta, ReasoningDelta):
            self.reasoning += delta.text
        elif delta.index < len(self.calls):
            self.calls[delta.index].function.arguments += delta.arguments
        else:
            self.calls.append(_call(delta))
        self.logprobs += map(wire.ChosenBody.of, said.logprobs)

    def end(self, ended: Ended) -> None:
        self.finish_reason = wire.finish_reason(ended.final.reason, called=ended.called)
        self.logprobs += map(wire.ChosenBody.of, ended.logprobs)

    def said(self, said: Said) -> told.Choice:
        if not self.form.incremental:
            self.add(said)
            return self.piece()
        delta = said.delta
        return self._choice(
            content=delta.text if isinstance(delta, ContentDelta) else "",
            reasoning=delta.text if isinstance(delta, ReasoningDelta) else "",
            calls=[_call(delta)] if isinstance(delta, ToolCallDelta) else [],
            logprobs=_logprobs(said.logprobs),
        )

    def ended(self, ended: Ended) -> told.Choice:
        self.end(ended)
        if not self.form.incremental:
            return self.piece()
        return self._choice(content="", reasoning="", calls=[], logprobs=_logprobs(ended.logprobs))

    def piece(self) -> told.Choice:
        """Everything so far."""
        return self._choice(
            content=self.content, reasoning=self.reasoning, calls=self.calls, logprobs=list(self.logprobs)
        )

    def _choice(
        self, *, content: str, reasoning: str, calls: list[wire.ToolCall], logprobs: list[wire.ChosenBody]
    ) -> told.Choice:
        parts: Any = [told.TextPart(content)] if content else []
        message = told.Message(
            content=parts if self.form.parts else content,
            reasoning_content=reasoning,
            tool_calls=calls or UNSET,
        )
        return told.Choice(
            index=self.number,
            finish_reason=self.finish_reason,
            message=message,
            logprobs=wire.ChoiceLogprobs(logprobs) if logprobs else UNSET,
        )


def _logprobs(chosen: tuple[ChosenLogprob, ...]) -> list[wire.ChosenBody]:
    return [wire.ChosenBody.of(one) for one in chosen]


def _call(delta: ToolCallDelta) -> wire.ToolCall:
    """A call's first piece has its id and name; the others an empty id, as the official package joins them."""
    name = delta.name if delta.name is not None else UNSET
    function = wire.Function(name=name, arguments=delta.arguments)
    return wire.ToolCall(index=delta.index, id=delta.id or "", type="function", function=function)

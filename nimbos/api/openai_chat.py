"""`POST /v1/chat/completions`: OpenAI's chat, streamed or whole.

Both forms fold the same chunks, so they cannot disagree. The question is in `chat_request.py`, the answer in
`openai_wire.py`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import body as bodies
from nimbos.api import chat_request as asked
from nimbos.api import openai_wire as wire
from nimbos.api.access import account_of
from nimbos.api.dialogue import Asked, Ended, Event, Opened, Question, Said, answer
from nimbos.api.exchange import ask_headers, json_reply, stream_reply
from nimbos.api.fields import check_unstreamed
from nimbos.api.pins import understand_pinned
from nimbos.api.sse import DONE, or_gone
from nimbos.batches import AnswerJournal, Reply
from nimbos.chat import ContentDelta, ReasoningDelta, ToolCallDelta
from nimbos.config import ServerSettings
from nimbos.runtime import Runtime
from nimbos.service import Service
from nimbos.types import Account, ChosenLogprob, Final, Origin


class ChatCompletions:
    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> Response:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        body = bodies.decode(content, asked.ChatBody, refused=asked.REFUSED)
        account = account_of(request)
        wanted = asked.asked(body, account, header_class=request.headers.get("x-nimbos-class"))
        if body.stream:
            question = await or_gone(request, understand_pinned(self._service, account, wanted))
            include = body.stream_options is not None and body.stream_options.include_usage
            chunks = chunks_of(question, answer(self._service, question), tier=tier_of(body, question), usage=include)
            return await stream_reply(request, _events(chunks), question=question, settings=self._settings)
        question, completion = await or_gone(request, self._whole(account, body, wanted))
        return json_reply(completion, headers=ask_headers(question))

    async def _whole(
        self, account: Account, body: asked.ChatBody, wanted: Asked
    ) -> tuple[Question, wire.ChatCompletion]:
        question = await understand_pinned(self._service, account, wanted)
        return question, await complete(self._service, question, tier=tier_of(body, question))


async def perform(
    runtime: Runtime, account: Account, body: bytes, *, origin: Origin, journal: AnswerJournal | None = None
) -> Reply:
    """The route without HTTP, for a line of a batch. Raises: what the route would answer with an error."""
    decoded = bodies.decode(body, asked.ChatBody, refused=asked.REFUSED)
    check_unstreamed(decoded.stream)
    wanted = asked.asked(decoded, account, header_class=None, origin=origin)
    question = await understand_pinned(runtime.service, account, wanted, journal=journal)
    completion = await complete(runtime.service, question, tier=tier_of(decoded, question))
    return _reply(question, completion)


async def complete(service: Service, question: Question, *, tier: str | UnsetType) -> wire.ChatCompletion:
    """The whole answer."""
    return await fold(question, chunks_of(question, answer(service, question), tier=tier, usage=True))


def tier_of(body: asked.ChatBody, question: Question) -> str | UnsetType:
    return wire.tier_of(question.ask.ask_class) if body.service_tier is not None else UNSET


async def _events(chunks: AsyncGenerator[wire.ChatChunk, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            yield wire.event(chunk)
    yield DONE


async def chunks_of(
    question: Question, events: AsyncGenerator[Event, None], *, tier: str | UnsetType, usage: bool
) -> AsyncGenerator[wire.ChatChunk, None]:
    """The answer in OpenAI's chunks. The last one carries the receipt, and with `usage` also the usage and no
    choice."""
    ask = question.ask
    template = wire.ChatChunk(
        id=wire.completion_id(ask, "chatcmpl"),
        created=question.created,
        model=question.card.id,
        system_fingerprint=wire.fingerprint(question.card),
        choices=[],
        service_tier=tier,
        usage=None if usage else UNSET,
    )

    def with_choice(choice: wire.ChunkChoice) -> wire.ChatChunk:
        return msgspec.structs.replace(template, choices=[choice])

    finals: list[Final] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Opened):
                for number in range(ask.n):
                    delta = wire.Delta(role="assistant", content="")
                    yield with_choice(wire.ChunkChoice(index=number, delta=delta))
            elif isinstance(event, Said):
                yield with_choice(_choice(event))
            elif isinstance(event, Ended):
                finals.append(event.final)
                ending = with_choice(_ending(event))
                if len(finals) == ask.n and not usage:
                    ending.x_nimbos = wire.receipt([ask], finals, question.card)
                yield ending
            elif usage:
                receipt = wire.receipt([ask], list(event.finals), question.card)
                yield msgspec.structs.replace(
                    template, usage=wire.UsageBody.of(event.usage, pin_tokens=ask.pin_tokens), x_nimbos=receipt
                )


def _choice(said: Said) -> wire.ChunkChoice:
    delta = said.delta
    if isinstance(delta, ContentDelta):
        logprobs = _logprobs(said.logprobs)
        return wire.ChunkChoice(index=said.branch, delta=wire.Delta(content=delta.text), logprobs=logprobs)
    if isinstance(delta, ReasoningDelta):
        return wire.ChunkChoice(index=said.branch, delta=wire.Delta(reasoning_content=delta.text))
    return wire.ChunkChoice(index=said.branch, delta=wire.Delta(tool_calls=[_call(delta)]))


def _ending(ended: Ended) -> wire.ChunkChoice:
    reason = wire.finish_reason(ended.final.reason, called=ended.called)
    return wire.ChunkChoice(
        index=ended.branch, delta=wire.Delta(), finish_reason=reason, logprobs=_logprobs(ended.logprobs)
    )


def _logprobs(chosen: tuple[ChosenLogprob, ...]) -> wire.ChoiceLogprobs | None:
    return wire.ChoiceLogprobs([wire.ChosenBody.of(one) for one in chosen]) if chosen else None


def _call(delta: ToolCallDelta) -> wire.ToolCall:
    if delta.id is None:
        return wire.ToolCall(index=delta.index, function=wire.Function(arguments=delta.arguments))
    function = wire.Function(name=delta.name if delta.name is not None else UNSET, arguments=delta.arguments)
    return wire.ToolCall(index=delta.index, id=delta.id, type="function", function=function)


@dataclass(slots=True, eq=False)
class _Folded:
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, wire.ToolCall] = field(default_factory=dict)
    logprobs: list[wire.ChosenBody] = field(default_factory=list)
    finish_reason: str = "stop"

    def add(self, choice: wire.ChunkChoice) -> None:
        delta = choice.delta
        if delta.content is not UNSET:
            self.content.append(delta.content)
        if delta.reasoning_content is not UNSET:
            self.reasoning.append(delta.reasoning_content)
        if delta.tool_calls is not UNSET:
            for call in delta.tool_calls:
                self._add_call(call)
        if choice.logprobs is not None:
            self.logprobs.extend(choice.logprobs.content)
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason

    def _add_call(self, call: wire.ToolCall) -> None:
        assert call.index is not UNSET
        held = self.calls.get(call.index)
        if held is None:
            self.calls[call.index] = msgspec.structs.replace(call, index=UNSET)
        else:
            held.function.arguments += call.function.arguments

    def choice(self, index: int) -> wire.ChatChoice:
        text = "".join(self.content)
        message = wire.ChatMessage(content=text if text or not self.calls else None)
        if self.reasoning:
            message.reasoning_content = "".join(self.reasoning)
        if self.calls:
            message.tool_calls = [self.calls[number] for number in sorted(self.calls)]
        logprobs = wire.ChoiceLogprobs(self.logprobs) if self.logprobs else None
        return wire.ChatChoice(index=index, message=message, finish_reason=self.finish_reason, logprobs=logprobs)


async def fold(question: Question, chunks: AsyncGenerator[wire.ChatChunk, None]) -> wire.ChatCompletion:
    """A stream's chunks as one reply."""
    folded = [_Folded() for _ in range(question.ask.n)]
    completion: wire.ChatCompletion | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            for choice in chunk.choices:
                folded[choice.index].add(choice)
            if isinstance(chunk.usage, wire.UsageBody):
                completion = _completion(folded, chunk)
                if question.journal is not None:
                    question.journal.answered(_reply(question, completion))
    assert completion is not None
    return completion


def _completion(folded: list[_Folded], last: wire.ChatChunk) -> wire.ChatCompletion:
    assert isinstance(last.usage, wire.UsageBody)
    assert last.x_nimbos is not UNSET
    return wire.ChatCompletion(
        id=last.id,
        created=last.created,
        model=last.model,
        system_fingerprint=last.system_fingerprint,
        choices=[one.choice(number) for number, one in enumerate(folded)],
        service_tier=last.service_tier,
        usage=last.usage,
        x_nimbos=last.x_nimbos,
    )


def _reply(question: Question, completion: wire.ChatCompletion) -> Reply:
    return Reply(200, wire.encode(completion), question.ask.id)

"""`POST /v1/chat/completions`: OpenAI's chat, streamed or whole.

Both forms fold the same chunks, so they cannot disagree. The question is in `chat_request.py`, the answer in
`openai_wire.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import body as bodies
from nimbos.api import chat_request as asked
from nimbos.api import fields as shared
from nimbos.api import openai_wire as wire
from nimbos.api.access import account_of
from nimbos.api.exchange import ask_headers, json_reply, stream_reply
from nimbos.api.sse import DONE, or_gone
from nimbos.chat import ContentDelta, Delta, Plan, ReasoningDelta, Splitter, ToolCallDelta
from nimbos.config import ServerSettings
from nimbos.errors import NotReady
from nimbos.service import Service
from nimbos.types import Account, Ask, Channel, Final, FinishReason, ModelCard, TokenChunk, new_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A chat request that is ready to be asked."""

    account: Account
    ask: Ask
    plan: Plan
    card: ModelCard
    tier: str | UnsetType
    created: int = field(default_factory=lambda: int(time.time()))


class ChatCompletions:
    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> Response:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        body = bodies.decode(content, asked.ChatBody, refused=asked.REFUSED)
        question = await or_gone(request, self._understand(request, body))
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(question, include_usage=usage)
            return await stream_reply(request, events, headers=ask_headers(question.ask), settings=self._settings)
        completion = await or_gone(request, fold(question, self._chunks(question, include_usage=True)))
        return json_reply(completion, headers=ask_headers(question.ask))

    async def _understand(self, request: Request, body: asked.ChatBody) -> Question:
        account = account_of(request)
        shared.check_stream(body)
        limit = asked.limit_of(body)
        sampling = shared.sampling_of(body, logprobs=asked.logprobs_of(body))
        ask_class = shared.class_of(
            body.service_tier, shared.extension_class(body), request.headers.get("x-nimbos-class"), account
        )
        stops = shared.stops_of(body)
        choices, least = shared.count_of(body), shared.min_tokens_of(body, limit)
        card = await self._service.card(body.model)
        chat = await self._service.chat(body.model)
        plan = await chat.plan(asked.chat_request(body, card))
        ask = Ask(
            id=new_id("ask"),
            account=account.id,
            model=card.id,
            parts=plan.parts,
            n=choices,
            ask_class=ask_class,
            limit_tokens=limit,
            min_tokens=least,
            sampling=sampling,
            stop=(*stops, *(stop for stop in plan.stop if stop not in stops)),
            ignore_eos=bool(body.ignore_eos),
            grammar=plan.grammar,
            thinking=plan.thinking,
        )
        tier = wire.tier_of(ask_class) if body.service_tier is not None else UNSET
        return Question(account=account, ask=ask, plan=plan, card=card, tier=tier)

    async def _events(self, question: Question, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._chunks(question, include_usage=include_usage)) as chunks:
            async for chunk in chunks:
                yield wire.event(chunk)
        yield DONE

    async def _chunks(self, question: Question, *, include_usage: bool) -> AsyncGenerator[wire.ChatChunk, None]:
        """The answer in OpenAI's chunks. The last one carries the receipt, and with `include_usage` also the usage
        and no choice."""
        ask = question.ask
        branches = [_Branch(number, question.plan) for number in range(ask.n)]
        template = wire.ChatChunk(
            id=wire.completion_id(ask, "chatcmpl"),
            created=question.created,
            model=question.card.id,
            system_fingerprint=wire.fingerprint(question.card),
            choices=[],
            service_tier=question.tier,
            usage=None if include_usage else UNSET,
        )

        def with_choice(choice: wire.ChunkChoice) -> wire.ChatChunk:
            return msgspec.structs.replace(template, choices=[choice])

        finals: list[Final] = []
        opened = False
        async with aclosing(self._service.generate(question.account, ask)) as chunks:
            async for chunk in chunks:
                if not opened:
                    opened = True
                    for branch in branches:
                        yield with_choice(branch.opening())
                if isinstance(chunk, TokenChunk):
                    for choice in branches[chunk.branch].add(chunk):
                        yield with_choice(choice)
                elif isinstance(chunk, Final):
                    finals.append(chunk)
                    *before, last = branches[chunk.branch].end(chunk)
                    for choice in before:
                        yield with_choice(choice)
                    ending = with_choice(last)
                    if len(finals) == ask.n and not include_usage:
                        ending.x_nimbos = wire.receipt([ask], finals, question.card)
                    yield ending
        if include_usage:
            usage = sum((final.usage for final in finals[1:]), finals[0].usage)
            receipt = wire.receipt([ask], finals, question.card)
            yield msgspec.structs.replace(template, usage=wire.UsageBody.of(usage), x_nimbos=receipt)


class _Branch:
    """One choice: its splitter, and log-probabilities that wait for their text."""

    def __init__(self, number: int, plan: Plan) -> None:
        self._number = number
        self._splitter = Splitter(plan)
        self._called = False
        self._logprobs: list[wire.ChosenBody] = []

    def opening(self) -> wire.ChunkChoice:
        return wire.ChunkChoice(index=self._number, delta=wire.Delta(role="assistant", content=""))

    def add(self, chunk: TokenChunk) -> list[wire.ChunkChoice]:
        if chunk.logprobs is not None and chunk.channel is Channel.TEXT:
            self._logprobs.extend(wire.ChosenBody.of(chosen) for chosen in chunk.logprobs)
        return [self._choice(delta) for delta in self._splitter.feed(chunk)]

    def end(self, final: Final) -> list[wire.ChunkChoice]:
        """What was held back, then the choice with the reason."""
        if final.reason is FinishReason.CANCELLED:
            raise NotReady("This answer was cancelled because the server is shutting down. Ask again.")
        choices = [self._choice(delta) for delta in self._splitter.finish()]
        reason = wire.finish_reason(final.reason, called=self._called)
        last = wire.ChunkChoice(index=self._number, delta=wire.Delta(), finish_reason=reason)
        if self._logprobs and not self._called:
            last.logprobs = wire.ChoiceLogprobs(self._take_logprobs())
        return [*choices, last]

    def _choice(self, delta: Delta) -> wire.ChunkChoice:
        if isinstance(delta, ContentDelta):
            logprobs = wire.ChoiceLogprobs(self._take_logprobs()) if self._logprobs else None
            return wire.ChunkChoice(index=self._number, delta=wire.Delta(content=delta.text), logprobs=logprobs)
        if isinstance(delta, ReasoningDelta):
            return wire.ChunkChoice(index=self._number, delta=wire.Delta(reasoning_content=delta.text))
        self._called = True
        self._logprobs.clear()  # of a call's own text, which is no content
        return wire.ChunkChoice(index=self._number, delta=wire.Delta(tool_calls=[_call(delta)]))

    def _take_logprobs(self) -> list[wire.ChosenBody]:
        taken, self._logprobs = self._logprobs, []
        return taken


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
    last: wire.ChatChunk | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            for choice in chunk.choices:
                folded[choice.index].add(choice)
            last = chunk
    assert last is not None
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

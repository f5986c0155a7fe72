"""`POST /v1/completions`: a prompt goes on; the older route, without messages.

Each prompt of the list is an ask of its own, and they run at once. Choice numbers go prompt by prompt.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from nimbos.api import body as bodies
from nimbos.api import fields as shared
from nimbos.api import openai_wire as wire
from nimbos.api.access import account_of
from nimbos.api.exchange import event_stream, headers_of, json_reply
from nimbos.api.merge import merge
from nimbos.api.prompts import Prompts, prompts_of
from nimbos.api.sse import DONE, or_gone
from nimbos.api.text_choice import TextBranch, best
from nimbos.batches import AnswerJournal, Reply
from nimbos.config import ServerSettings
from nimbos.errors import InvalidRequest, NotReady, UnsupportedField
from nimbos.runtime import Runtime
from nimbos.service import Service
from nimbos.types import (
    Account,
    Admission,
    Ask,
    Chunk,
    Final,
    FinishReason,
    ModelCard,
    Origin,
    Part,
    Text,
    TokenChunk,
    Usage,
    new_id,
)

ORIGIN = Origin(route="/v1/completions")
PROMPTS_MAX = 128
LOGPROBS_MAX = 5


class CompletionsBody(shared.SamplingFields, kw_only=True):
    model: str
    prompt: Prompts
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`echoes[i]`: the text that goes before the answers to prompt `i`. `keep`: choices of each prompt, the best."""

    account: Account
    asks: list[Ask]
    echoes: list[str]
    card: ModelCard
    keep: int
    logprobs: int | None
    id: str
    origin: Origin = ORIGIN
    journal: AnswerJournal | None = None
    admission: Admission = field(default_factory=Admission)
    created: int = field(default_factory=lambda: int(time.time()))

    def headers(self) -> dict[str, str]:
        return headers_of(self.asks[0], self.admission)

    def completion(self, choices: list[wire.TextChoice]) -> wire.TextCompletion:
        return wire.TextCompletion(
            id=self.id,
            created=self.created,
            model=self.card.id,
            system_fingerprint=wire.fingerprint(self.card),
            choices=choices,
        )


class Completions:
    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._service = service
        self._settings = settings

    async def create(self, request: Request) -> Response:
        content = await bodies.read(
            request, limit_bytes=self._settings.max_body_bytes, stall_s=self._settings.stall_write_s
        )
        body = bodies.decode(content, CompletionsBody)
        wanted = self.understand(account_of(request), body, header_class=request.headers.get("x-nimbos-class"))
        question = await or_gone(request, wanted)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(question, include_usage=usage)
            return await event_stream(request, events, headers=question.headers, settings=self._settings)
        completion = await or_gone(request, self.whole(question))
        return json_reply(completion, headers=question.headers())

    async def understand(
        self,
        account: Account,
        body: CompletionsBody,
        *,
        header_class: str | None,
        origin: Origin = ORIGIN,
        journal: AnswerJournal | None = None,
    ) -> Question:
        shared.check_stream(body)
        count, most = shared.count_of(body), _best_of(body)
        sampling = shared.sampling_of(body, logprobs=_logprobs(body, picks=most > count))
        limit = shared.limit_of(body)
        ask_class = shared.class_of(body.service_tier, shared.extension_class(body), header_class, account)
        prompts = prompts_of(body.prompt, param="prompt", most=PROMPTS_MAX, special=True)
        echoes = [_echo(prompt, body) for prompt in prompts]
        stops, stop_ids = shared.stops_of(body), shared.stop_ids_of(body)
        least, grammar = shared.min_tokens_of(body, limit), shared.grammar_of(body)
        card = await self._service.card(body.model, account)
        asks = [
            Ask(
                id=new_id("ask"),
                account=account.id,
                model=card.id,
                parts=_parts(prompt, body.suffix, card),
                n=most,
                ask_class=ask_class,
                limit_tokens=limit,
                min_tokens=least,
                sampling=sampling,
                stop=stops,
                stop_ids=stop_ids,
                ignore_eos=bool(body.ignore_eos),
                grammar=grammar,
            )
            for prompt in prompts
        ]
        return Question(
            account=account,
            asks=asks,
            echoes=echoes,
            card=card,
            keep=count,
            logprobs=body.logprobs,
            id=wire.completion_id(asks[0], "cmpl"),
            origin=origin,
            journal=journal,
        )

    def _chunks(self, question: Question) -> AsyncGenerator[tuple[int, Chunk], None]:
        """(number of the prompt, chunk), of all prompts at once."""
        return merge([self._answers(question, number) for number in range(len(question.asks))])

    def _answers(self, question: Question, number: int) -> AsyncGenerator[Chunk, None]:
        journal = question.journal.of(number) if question.journal is not None else None
        return self._service.generate(
            question.account,
            question.asks[number],
            origin=question.origin,
            admission=question.admission,
            journal=journal,
        )

    async def _events(self, question: Question, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        finals: list[Final] = []
        branches = _branches(question)
        expected = sum(len(row) for row in branches)
        opened = False
        async with aclosing(self._chunks(question)) as chunks:
            async for number, chunk in chunks:
                if not opened:
                    opened = True
                    for event in _openings(question, branches):
                        yield event
                if isinstance(chunk, TokenChunk):
                    choice = branches[number][chunk.branch].piece(chunk)
                    if choice is not None:
                        yield wire.event(question.completion([choice]))
                elif isinstance(chunk, Final):
                    finals.append(chunk)
                    ending = question.completion([branches[number][chunk.branch].ending(_checked(chunk))])
                    if len(finals) == expected and not include_usage:
                        ending.x_nimbos = wire.receipt(question.asks, finals, question.card)
                    yield wire.event(ending)
        if include_usage:
            yield wire.event(_with_usage(question.completion([]), question, finals))
        yield DONE

    async def whole(self, question: Question) -> wire.TextCompletion:
        heard = _Heard(question)
        sources = [heard.hearing(number, self._answers(question, number)) for number in range(len(question.asks))]
        async with aclosing(merge(sources)) as chunks:
            async for _ in chunks:
                pass
        assert heard.completion is not None
        return heard.completion


class _Heard:
    """All that was said; a journal is told the whole answer before the ask that said the last of it is settled."""

    def __init__(self, question: Question) -> None:
        self.completion: wire.TextCompletion | None = None
        self._question = question
        self._finals: list[Final] = []
        self._branches = _branches(question)
        self._expected = sum(len(row) for row in self._branches)

    async def hearing(self, number: int, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[None, None]:
        """Of one prompt. An ask is settled when its iterator goes on behind its last chunk."""
        async with aclosing(chunks):
            async for chunk in chunks:
                self._hear(number, chunk)
                yield

    def _hear(self, number: int, chunk: Chunk) -> None:
        if isinstance(chunk, TokenChunk):
            self._branches[number][chunk.branch].add(chunk)
        elif isinstance(chunk, Final):
            self._finals.append(chunk)
            self._branches[number][chunk.branch].reason = _checked(chunk).reason
            if len(self._finals) == self._expected:
                self.completion = _complete(self._question, self._branches, self._finals)
                if self._question.journal is not None:
                    self._question.journal.answered(_reply(self._question, self.completion))


async def perform(
    runtime: Runtime, account: Account, body: bytes, *, origin: Origin, journal: AnswerJournal | None = None
) -> Reply:
    """The route without HTTP, for a line of a batch. Raises: what the route would answer with an error."""
    decoded = bodies.decode(body, CompletionsBody)
    shared.check_unstreamed(decoded.stream)
    route = Completions(runtime.service, runtime.settings.server)
    question = await route.understand(account, decoded, header_class=None, origin=origin, journal=journal)
    return _reply(question, await route.whole(question))


def _reply(question: Question, completion: wire.TextCompletion) -> Reply:
    return Reply(200, wire.encode(completion), question.asks[0].id)


def _complete(question: Question, branches: list[list[TextBranch]], finals: list[Final]) -> wire.TextCompletion:
    choices: list[wire.TextChoice] = []
    for row in branches:
        choices += [branch.whole(len(choices) + at) for at, branch in enumerate(best(row, question.keep))]
    return _with_usage(question.completion(choices), question, finals)


def _branches(question: Question) -> list[list[TextBranch]]:
    rows: list[list[TextBranch]] = []
    for number, ask in enumerate(question.asks):
        first = number * ask.n
        echo = question.echoes[number]
        rows.append(
            [TextBranch(index=first + branch, echo=echo, logprobs=question.logprobs) for branch in range(ask.n)]
        )
    return rows


def _openings(question: Question, branches: list[list[TextBranch]]) -> list[bytes]:
    return [
        wire.event(question.completion([wire.TextChoice(index=branch.index, text=branch.echo)]))
        for row in branches
        for branch in row
        if branch.echo
    ]


def _checked(final: Final) -> Final:
    if final.reason is FinishReason.CANCELLED:
        raise NotReady("This answer was cancelled because the server is shutting down. Ask again.")
    return final


def _with_usage(completion: wire.TextCompletion, question: Question, finals: list[Final]) -> wire.TextCompletion:
    usage = wire.UsageBody.of(sum((final.usage for final in finals), Usage()))
    receipt = wire.receipt(question.asks, finals, question.card)
    return msgspec.structs.replace(completion, usage=usage, x_nimbos=receipt if finals else UNSET)


def _best_of(body: CompletionsBody) -> int:
    count = shared.count_of(body)
    if body.best_of is None:
        return count
    if not count <= body.best_of <= shared.N_MAX:
        raise InvalidRequest(
            f"`best_of` is {body.best_of}; it must be from `n` ({count}) to {shared.N_MAX}.", param="best_of"
        )
    if body.stream and body.best_of > count:
        raise InvalidRequest("`best_of` above `n` cannot be streamed.", param="best_of")
    return body.best_of


def _logprobs(body: CompletionsBody, *, picks: bool) -> int | None:
    if body.logprobs is None:
        return 0 if picks else None
    if not 0 <= body.logprobs <= LOGPROBS_MAX:
        raise InvalidRequest(f"`logprobs` is {body.logprobs}; it must be from 0 to {LOGPROBS_MAX}.", param="logprobs")
    return body.logprobs


def _echo(prompt: Part, body: CompletionsBody) -> str:
    if not body.echo:
        return ""
    if not isinstance(prompt, Text):
        raise UnsupportedField("echo", why="not supported with token ids")
    if body.logprobs is not None:
        raise UnsupportedField("echo", why="not supported together with `logprobs`: prompts have none here")
    return prompt.text


def _parts(prompt: Part, suffix: str | None, card: ModelCard) -> tuple[Part, ...]:
    if not suffix:
        return (prompt,)
    if card.fim is None:
        raise UnsupportedField("suffix", why=f"not supported by the model {card.id!r}, which has no tokens for it")
    before, after, middle = card.fim
    literal = Text(prompt.text, special=False) if isinstance(prompt, Text) else prompt
    return Text(before), literal, Text(after), Text(suffix, special=False), Text(middle)

"""A chat in no dialect's words: what was asked becomes a `Question`, and its answer a stream of `Event`s.

Every chat dialect decodes its own body into `Asked` and encodes `Event`s in its own shape; templates, tools, thinking,
admission and counting are the same for all. Read one dialect's file next, for instance `openai_chat.py`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from nimbos.batches import AnswerJournal
from nimbos.chat import ChatRequest, ContentDelta, Delta, Plan, Splitter, ToolCallDelta
from nimbos.errors import NotReady
from nimbos.service import NOWHERE, Service
from nimbos.types import (
    Account,
    Admission,
    Ask,
    AskClass,
    Channel,
    ChosenLogprob,
    Final,
    FinishReason,
    ModelCard,
    Origin,
    Sampling,
    TokenChunk,
    Usage,
    new_id,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """`request` makes the chat request once the model's card is known (its context length, its kind), and `marked` the
    same with something else behind the prefix that is to be kept (`pins.py`); None: no such prefix is named.
    `limit_tokens`: of the answer in each branch, thinking included."""

    model: str
    request: Callable[[ModelCard], ChatRequest]
    sampling: Sampling
    ask_class: AskClass = AskClass.INTERACTIVE
    n: int = 1
    limit_tokens: int | None = None
    min_tokens: int = 0
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    origin: Origin = NOWHERE
    marked: Callable[[ModelCard], ChatRequest] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A chat request that is ready to be asked. `admission` is filled when the ask is let in. With a `journal`,
    `Told` comes while the ask is not settled yet, so that the journal can keep the answer in the settlement."""

    account: Account
    ask: Ask
    plan: Plan
    card: ModelCard
    origin: Origin
    journal: AnswerJournal | None = None
    admission: Admission = field(default_factory=Admission)
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True)
class Opened:
    """The model has begun; what fails before has a status of its own."""


@dataclass(frozen=True, slots=True)
class Said:
    """`logprobs`: of the tokens that made `delta`, and of those before it that made no text yet."""

    branch: int
    delta: Delta
    logprobs: tuple[ChosenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """One branch is complete. `called`: it has called a tool. `logprobs`: of tokens whose text never came."""

    branch: int
    final: Final
    called: bool
    logprobs: tuple[ChosenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Told:
    """Everything was said. `usage` is the whole ask's."""

    finals: tuple[Final, ...]
    usage: Usage


Event = Opened | Said | Ended | Told


async def understand(
    service: Service, account: Account, asked: Asked, *, journal: AnswerJournal | None = None
) -> Question:
    """Raises: ModelNotFound, ModelUnusable, Overloaded; InvalidRequest, UnsupportedField for what cannot be asked."""
    card = await service.card(asked.model, account)
    chat = await service.chat(asked.model)
    plan = await chat.plan(asked.request(card))
    ask = Ask(
        id=new_id("ask"),
        account=account.id,
        model=card.id,
        parts=plan.parts,
        n=asked.n,
        ask_class=asked.ask_class,
        limit_tokens=asked.limit_tokens,
        min_tokens=asked.min_tokens,
        sampling=asked.sampling,
        stop=(*asked.stops, *(stop for stop in plan.stop if stop not in asked.stops)),
        stop_ids=asked.stop_ids,
        ignore_eos=asked.ignore_eos,
        grammar=plan.grammar,
        thinking=plan.thinking,
    )
    return Question(account=account, ask=ask, plan=plan, card=card, origin=asked.origin, journal=journal)


async def answer(service: Service, question: Question) -> AsyncGenerator[Event, None]:
    """The events of the answer: `Opened`, then `Said` and `Ended` of all branches mixed, then `Told`.
    Closing it cancels the ask.

    Raises: what `Service.generate` raises; NotReady when the server shuts down meanwhile.
    """
    ask = question.ask
    branches = [_Branch(number, question.plan) for number in range(ask.n)]
    finals: list[Final] = []
    opened = False
    generated = service.generate(
        question.account, ask, origin=question.origin, admission=question.admission, journal=question.journal
    )
    async with aclosing(generated) as chunks:
        async for chunk in chunks:
            if not opened:
                opened = True
                yield Opened()
            if isinstance(chunk, TokenChunk):
                for said in branches[chunk.branch].add(chunk):
                    yield said
            elif isinstance(chunk, Final):
                finals.append(chunk)
                for event in branches[chunk.branch].end(chunk):
                    yield event
                if question.journal is not None and len(finals) == ask.n:
                    yield _told(finals)
    if question.journal is None:
        yield _told(finals)


def _told(finals: list[Final]) -> Told:
    return Told(tuple(finals), sum((final.usage for final in finals), Usage()))


class _Branch:
    """One choice: its splitter, and log-probabilities that wait for their text."""

    def __init__(self, number: int, plan: Plan) -> None:
        self._number = number
        self._splitter = Splitter(plan)
        self._called = False
        self._logprobs: list[ChosenLogprob] = []

    def add(self, chunk: TokenChunk) -> list[Said]:
        if chunk.logprobs is not None and chunk.channel is Channel.TEXT:
            self._logprobs.extend(chunk.logprobs)
        return [self._said(delta) for delta in self._splitter.feed(chunk)]

    def end(self, final: Final) -> list[Said | Ended]:
        """What was held back, then the end."""
        if final.reason is FinishReason.CANCELLED:
            raise NotReady("This answer was cancelled because the server is shutting down. Ask again.")
        held = [self._said(delta) for delta in self._splitter.finish()]
        rest = () if self._called else tuple(self._logprobs)
        return [*held, Ended(self._number, final, self._called, rest)]

    def _said(self, delta: Delta) -> Said:
        if isinstance(delta, ToolCallDelta):
            self._called = True
            self._logprobs.clear()  # of a call's own text, which is no content
            return Said(self._number, delta)
        if not self._logprobs or not isinstance(delta, ContentDelta):
            return Said(self._number, delta)
        taken, self._logprobs = tuple(self._logprobs), []
        return Said(self._number, delta, taken)

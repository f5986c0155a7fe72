"""One ask of a process while it is answered: what comes of it is kept in the log as it grows, and whole at the end.

    chunk ─▶ splitter ─▶ deltas, for whoever follows          every `PARTIAL_TOKENS` tokens: model.partial, durable
    final ─▶ message put ─▶ journal: model.done, with what follows ─▶ the ledger settles

Closing it in the middle, for whatever reason, keeps what was said; the ask that goes on begins there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from nimbos.chat import ContentDelta, Plan, ReasoningDelta, Splitter, fold
from nimbos.chat import Delta as Piece
from nimbos.errors import NotReady
from nimbos.kernel.bells import Delta
from nimbos.kernel.context import assistant_message, estimate
from nimbos.kernel.events import CallWanted, ModelDone
from nimbos.kernel.folding.records import Turn
from nimbos.kernel.holding import Holding
from nimbos.kernel.journal import AskJournal, Failing
from nimbos.kernel.log import Draft
from nimbos.kernel.segments import Segments
from nimbos.kernel.showing import CUT, spoken
from nimbos.service import Service
from nimbos.types import Ask, Channel, Final, FinishReason, Origin, TokenChunk, Usage

PARTIAL_TOKENS = 48
ROUTE = "/v1/processes"
CALLS_MAX = 64  # of one answer; a model that goes on calling is heard no further


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """An answer that is whole, and in the log. `message`: in OpenAI's shape; `segment`: its hash. `tokens`: of the
    answer. `finish`: stop, length or tool_calls. `usage`: of the ask that ended it."""

    ask_id: str
    message: dict[str, Any]
    segment: str
    text: str
    thinking: str
    calls: tuple[CallWanted, ...]
    finish: str
    tokens: int
    usage: Usage


# What else is written in the transaction that writes a thought.
Also = Callable[[Thought], Awaitable[Sequence[Draft]]]


class Answering:
    """`budget_ended`: it ended because nothing more is paid for. `thought`: once it is whole."""

    def __init__(
        self,
        holding: Holding,
        segments: Segments,
        ask: Ask,
        plan: Plan,
        journal: AskJournal,
        *,
        before: Turn | None,
        also: Also,
    ) -> None:
        """`before`: what was said of this answer already."""
        self.budget_ended = False
        self.thought: Thought | None = None
        self._holding = holding
        self._segments = segments
        self._ask = ask
        self._journal = journal
        self._also = also
        self._tokens = len(ask.emitted.get(0, ()))
        self._splitter = Splitter(plan)
        self._pieces: list[Piece] = []
        self._said = dict.fromkeys(Channel, 0)  # characters
        if before is not None:
            self._feed(TokenChunk(branch=0, ids=(), text=before.thinking, channel=Channel.THINKING))
            self._feed(TokenChunk(branch=0, ids=(), text=before.text))

    async def consume(self, service: Service, model_hash: str) -> None:
        """Until the answer is over and settled. Cancelling it keeps what was said.

        Raises: what `Service.generate` raises; Fenced; NotReady when the server is shutting down.
        """
        holding = self._holding
        origin = Origin(route=ROUTE, process=holding.pid)
        generated = service.generate(holding.account, self._ask, origin=origin, journal=self._journal)
        async with aclosing(generated) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, TokenChunk):
                    self._take(chunk)
                    if len(self._journal.growing.ids) >= PARTIAL_TOKENS:
                        await self._keep_partial()
                elif isinstance(chunk, Final):
                    await self._conclude(chunk, model_hash)

    @property
    def ask_id(self) -> str:
        return self._ask.id

    async def interrupted(self) -> Failing:
        """How it is told that somebody else has the word. What was said stays in view, unless it was a call."""
        folded = fold(self._pieces)
        said = (folded.content or "").rstrip()
        after: tuple[Draft, ...] = ()
        if said and not folded.tool_calls:
            words = f"{said} …"
            after = (
                await spoken(
                    self._segments,
                    self._holding,
                    words,
                    "",
                    (),
                    id=f"{self._ask.id}{CUT}",
                    tokens=estimate(words.encode("utf-8", "replace")),
                ),
            )
        return Failing(code="interrupted", message="Somebody sent the process a message.", again=False, after=after)

    def _take(self, chunk: TokenChunk) -> None:
        self._journal.growing.add(chunk)
        self._tokens += len(chunk.ids)
        self._feed(chunk, aloud=self._holding.followed)

    def _feed(self, chunk: TokenChunk, *, aloud: bool = False) -> None:
        for piece in self._splitter.feed(chunk) if chunk.text else []:
            self._pieces.append(piece)
            if not isinstance(piece, ContentDelta | ReasoningDelta):  # a call is told of when it is whole
                continue
            channel = Channel.TEXT if isinstance(piece, ContentDelta) else Channel.THINKING
            at = self._said[channel]
            self._said[channel] += len(piece.text)
            if aloud:
                self._holding.tell(
                    Delta(pid=self._holding.pid, ask_id=self._ask.id, text=piece.text, channel=channel, at=at)
                )

    async def _keep_partial(self) -> None:
        """Whoever is cancelled meanwhile waits for it: it must be known what the log has before the ask is settled."""
        partial = self._journal.growing.partial(self._ask.id)
        self._journal.void = True
        writing = asyncio.ensure_future(self._holding.append(Draft(body=partial)))
        try:
            await asyncio.shield(writing)
        finally:
            if not writing.done():
                await asyncio.wait({writing})
            if not writing.cancelled() and writing.exception() is None:
                self._journal.void = False
                self._journal.growing.clear()

    async def _conclude(self, final: Final, model_hash: str) -> None:
        """The ask is not settled yet: what is given to the journal here is written when it is."""
        if final.reason is FinishReason.CANCELLED:
            raise NotReady("This server is shutting down; the answer goes on when it is back.")
        if final.budget_ended:
            self.budget_ended = True
            return
        thought = await self._whole(final.reason)
        done = ModelDone(
            ask_id=self._ask.id,
            model_hash=model_hash,
            finish=thought.finish,
            message=thought.segment,
            calls=thought.calls,
        )
        self._journal.done = (Draft(body=done), *await self._also(thought))
        self.thought = thought

    async def _whole(self, reason: FinishReason) -> Thought:
        self._pieces += self._splitter.finish()
        folded = fold(self._pieces)
        calls = tuple(
            CallWanted(call_id=f"{self._ask.id}.{number}", name=call.name[:128], arguments=call.arguments)
            for number, call in enumerate(folded.tool_calls[:CALLS_MAX])
        )
        text, thinking = folded.content or "", folded.reasoning or ""
        message = assistant_message(text, thinking, calls)
        return Thought(
            ask_id=self._ask.id,
            message=message,
            segment=await self._segments.put(self._holding.account.id, message),
            text=text,
            thinking=thinking,
            calls=calls,
            finish="tool_calls" if calls else reason.value,
            tokens=self._tokens,
            usage=Usage(),  # until it is settled
        )

"""One ask that was let in: what was told of it, what it may still use, and its end.

Where a budget holds it, the next slice is reserved ahead of need, in a task beside the stream. Its source is told by
whatever `extend` is given; a branch that has used all it may waits there meanwhile. Where none does, it is looked after
each slice whether one does by now; until then the source goes on, whatever becomes of the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog

from nimbos.db import Transaction
from nimbos.errors import NimbosError, StorageUnavailable
from nimbos.ledger.journal import Journal
from nimbos.ledger.ledger import SLICE_TOKENS, Extended, Progress, Reserved
from nimbos.ledger.rows import Settlement
from nimbos.types import Ask, Chunk, Final, TokenChunk, Usage

if TYPE_CHECKING:
    from nimbos.ledger.desk import Desk

AHEAD_TOKENS = SLICE_TOKENS // 2
EXTEND_PATIENCE_S = 30.0  # how long an answer stands still for what other asks hold of its budget
_TICK_S = 0.5

_log = structlog.get_logger(__name__)

TellSource = Callable[[int | None, bool], None]  # allowance_tokens, last


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A settlement that is to be written. `row`: of the meter file."""

    settlement: Settlement
    row: int
    journal: Journal | None


class Running:
    """`ask` is what the source is given. `note` every chunk before it is handed on, and `end` it once."""

    def __init__(self, desk: Desk, ask: Ask, reserved: Reserved, *, row: int, journal: Journal | None) -> None:
        self.ask = ask
        self.reserved = reserved
        self._desk = desk
        self._row = row
        self._journal = journal
        self._begun = {number: len(ask.emitted.get(number, ())) for number in range(ask.n)}
        self._sent = dict(self._begun)
        self._finals: dict[int, Final] = {}
        self._allowance_tokens = reserved.allowance_tokens
        self._look_at_tokens = max(self._begun.values(), default=0) + SLICE_TOKENS
        self._compute_ms = reserved.compute_ms
        self._last = False
        self._tell_source: TellSource | None = None
        self._extending: asyncio.Task[None] | None = None

    def used(self) -> Usage:
        return self._desk.meters.read(self._row).usage()

    def extend_by(self, tell_source: TellSource) -> None:
        """How the source is told that more is paid for; without it nothing is extended."""
        self._tell_source = tell_source

    def note(self, chunk: Chunk) -> None:
        if isinstance(chunk, TokenChunk):
            self._sent[chunk.branch] += len(chunk.ids)
            if self._out_of_time():
                self._grant(max(self._sent.values()), last=True)
        elif isinstance(chunk, Final):
            self._finals[chunk.branch] = chunk
        else:
            return
        if self._extending is None and self._due():
            self._extending = asyncio.create_task(self._extend())

    def end(self, outcome: str) -> tuple[Usage, asyncio.Task[None]]:
        """What the ask used, and the task that settles it: shield it, and no cancelled caller takes it along.
        Call it when the source's iterator is closed."""
        if self._extending is not None:
            self._extending.cancel()  # what is on its way finds the ask settled, or is found by the settlement
        counts = self._desk.meters.read(self._row)
        receipts = [final.receipt for final in self._finals.values()]
        settlement = Settlement(
            ask_id=self.ask.id,
            usage=counts.usage(),
            outcome=outcome,
            finish=",".join(_reason(self._finals[number]) for number in sorted(self._finals)),
            told_output=max(0, sum(self._sent.values()) - sum(self._begun.values()) - self.ask.paid_output_tokens),
            queue_ms=max((receipt.queue_ms for receipt in receipts), default=0),
            compute_ms=counts.compute_us // 1000 or max((receipt.compute_ms for receipt in receipts), default=0),
            restarts=max((receipt.restarts for receipt in receipts), default=0),
        )
        return settlement.usage, self._desk.settle(Due(settlement=settlement, row=self._row, journal=self._journal))

    def _live(self) -> list[int]:
        return [number for number in self._sent if number not in self._finals and number not in self.ask.finished]

    def _due(self) -> bool:
        """Whether a branch comes near what is paid for."""
        allowed, limit = self._allowance_tokens, self.ask.limit_tokens
        if self._last or (allowed is not None and limit is not None and allowed >= limit):
            return False
        least = self._look_at_tokens if allowed is None else allowed - AHEAD_TOKENS
        return any(self._sent[number] >= least for number in self._live())

    def _out_of_time(self) -> bool:
        """Tokens can be foreseen and time cannot: it is looked at whenever something comes."""
        if self._compute_ms is None or self._last:
            return False
        return self._desk.meters.read(self._row).compute_us // 1000 >= self._compute_ms

    async def _extend(self) -> None:
        """Goes on until it is far enough ahead again: a source that has been told everything sends nothing."""
        clock = asyncio.get_running_loop().time
        deadline, waited = clock() + EXTEND_PATIENCE_S, False
        while self._due():
            progress = self._progress()  # which is read here: a transaction has its own thread
            try:
                extended = await asyncio.shield(self._desk.extend(partial(self._extension, progress)))
            except StorageUnavailable:
                held = self._allowance_tokens is not None
                extended = Extended(allowance_tokens=self._allowance_tokens, wait=held)
            except NimbosError as error:  # of a journal
                _log.error("ledger.extension_refused", ask=self.ask.id, code=error.code)
                extended = Extended(allowance_tokens=self._allowance_tokens, last=True)
            if not extended.wait or self._allowance_tokens is None:
                self._compute_ms = extended.compute_ms
                self._look_at_tokens = progress.allowance_tokens + SLICE_TOKENS
                self._grant(extended.allowance_tokens, last=extended.last)
                if waited:
                    self._desk.bell.ring()  # there may be more than this answer needs
                deadline, waited = clock() + EXTEND_PATIENCE_S, False
            elif clock() >= deadline:
                self._grant(self._allowance_tokens, last=True)
            else:
                await self._desk.bell.wait(_TICK_S, most_s=deadline - clock())
                waited = True
        self._extending = None

    def _extension(self, progress: Progress) -> Transaction[Extended]:
        extended = yield from self._desk.ledger.extend(self.ask.id, progress)
        if self._journal is not None:
            yield from self._journal.extended(self.ask.id, progress, extended)
        return extended

    def _progress(self) -> Progress:
        live = self._live()
        ended = sum(final.usage.output for final in self._finals.values())
        before = sum(self._begun[number] for number in live) + (self._paid_ahead(ended) if live else 0)
        counts = self._desk.meters.read(self._row)
        allowed = self._allowance_tokens
        return Progress(
            usage=counts.usage(),
            compute_ms=counts.compute_us // 1000,
            live=len(live),
            ended_output=ended - before,
            allowance_tokens=max(self._sent[number] for number in live) if allowed is None else allowed,
            limit_tokens=self.ask.limit_tokens,
        )

    def _paid_ahead(self, ended_output: int) -> int:
        """Of the tokens that an earlier ask has paid for, those that no branch that ended has left out of what it told:
        one that told any has left out the last of them."""
        ended = sum(self._sent[number] - self._begun[number] for number in self._finals)
        return 0 if ended_output else max(0, self.ask.paid_output_tokens - ended)

    def _grant(self, allowance_tokens: int | None, *, last: bool) -> None:
        unchanged = allowance_tokens is None and self._allowance_tokens is None
        self._allowance_tokens, self._last = allowance_tokens, last
        if self._tell_source is not None and not unchanged:
            self._tell_source(allowance_tokens, last)


def _reason(final: Final) -> str:
    return "budget" if final.budget_ended else final.reason.value

"""The one end of a background response: its items, its row, its events and its claim change in one transaction.

Where an ask stands behind it, that is the ledger's own transaction that settles the ask (`nimbos.ledger.Journal`): the
answer is paid for and kept, or neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nimbos.db import Transaction
from nimbos.ledger import Attempt
from nimbos.responses import nodes
from nimbos.responses.journal import Journal, Live
from nimbos.responses.nodes import Placed
from nimbos.responses.segments import Swept
from nimbos.responses.store import SAID, Kept, Piece, Status, Store, finished, say
from nimbos.types import Ask, Usage
from nimbos.work import ClaimLost, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class _Final:
    status: Status
    body: bytes
    output: tuple[Piece, ...]
    placed: list[Placed]
    events: int


class Ending:
    """`prepare` before the ask is settled, then `finish`, in every case."""

    def __init__(self, store: Store, work: Work, journal: Journal, live: Live, kept: Kept, *, attempt: Attempt) -> None:
        self._store = store
        self._work = work
        self._journal = journal
        self._live = live
        self._kept = kept
        self._attempt = attempt
        self._final: _Final | None = None
        self.written = False

    async def prepare(self, *, status: Status, body: bytes, output: tuple[Piece, ...]) -> None:
        """All that was said is known, the last event too. Keeps the bytes."""
        placed = await self._store.place(self._kept.account, output)
        events = len(self._live.made)
        self._final = _Final(status=status, body=body, output=output, placed=placed, events=events)

    async def finish(self) -> None:
        """Writes the end if no settlement did. Raises: ClaimLost when there was another end already."""
        final = self._final
        assert final is not None
        if not self.written:

            async def ending() -> Callable[[], Transaction[None]]:
                placed = await self._store.place(self._kept.account, final.output)

                def end() -> Transaction[None]:
                    yield from self._work.finish(self._live.claim)
                    yield from self._write(final, placed)

                return end

            await self._store.run(ending)
        self._journal.close(self._kept.id, self._live)

    def answered(self, reply: object) -> None:
        """For batches; here it is `prepare` that knows the answer."""

    def of(self, number: int) -> Ending:
        """For batches; one ask is behind a response."""
        return self

    @property
    def paid(self) -> Usage:
        return self._attempt.paid()

    def reserved(self, ask: Ask, *, prompt_tokens: int) -> Transaction[None]:
        """Raises: ClaimLost; then the ask is not begun."""
        yield from self._attempt.begin(ask.id)

    def extended(self, ask_id: str, progress: object, extended: object) -> Transaction[None]:
        yield from ()

    def settled(self, settlement: object, settled: object) -> Transaction[None]:
        """Nothing is written where somebody else has the claim now; the ask is settled all the same."""
        final, self.written = self._final, False
        if final is None:
            return
        try:
            yield from self._work.check(self._live.claim)
            yield from self._write(final, final.placed)
        except (ClaimLost, Swept):  # nothing of it is written yet; `finish` says so, or places it again
            return
        yield from self._work.finish(self._live.claim)
        self.written = True

    def _write(self, final: _Final, placed: list[Placed]) -> Transaction[None]:
        """Raises: Swept, before anything is written."""
        kept = self._kept
        yield from nodes.lock(kept.input_node)
        node = yield from nodes.append(kept.account, kept.input_node, placed, bounded=False)
        if not (yield from finished(kept.id, final.status, final.body, node, len(placed))):
            yield from nodes.doubt(node)
            return
        yield from self._journal.writing(kept.id, self._live, final.events)
        if kept.conversation is not None and final.status in SAID:
            before: str | None = None
            asked: list[Placed] = []  # what the conversation had before, where nothing was asked: `say` leaves it out
            if kept.input_node is not None:
                before, asked = yield from nodes.own(kept.input_node)
            yield from say(kept.account, kept.conversation, before, node, [*asked, *placed])

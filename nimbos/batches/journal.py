"""An answer that is written in the very transaction that settles its ask: paid for and kept, or neither."""

from __future__ import annotations

from collections.abc import Callable

from nimbos.batches.endpoint import Reply
from nimbos.db import Transaction
from nimbos.work import Claim, Work


class LineJournal:
    """A journal of the ledger (`nimbos.ledger.Journal`) for one line of a batch.

    `written` once the line's end was part of a settlement, `over` when that was the batch's last line.
    """

    def __init__(self, work: Work, claim: Claim, answer: Callable[[Reply], Transaction[bool]]) -> None:
        """`answer` writes a reply as the line's, and says whether the batch is over."""
        self._work = work
        self._claim = claim
        self._answer = answer
        self._reply: Reply | None = None
        self.written = False
        self.over = False

    def answered(self, reply: Reply) -> None:
        """The whole answer is there; its ask is not settled yet."""
        self._reply = reply

    def reserved(self, ask: object, *, prompt_tokens: int) -> Transaction[None]:
        yield from ()

    def extended(self, ask_id: str, progress: object, extended: object) -> Transaction[None]:
        yield from ()

    def settled(self, settlement: object, settled: object) -> Transaction[None]:
        """Nothing is written where somebody else has the line now; the ask is settled all the same."""
        if self._reply is not None and (yield from self._work.end(self._claim)):
            self.over = yield from self._answer(self._reply)
            self.written = True

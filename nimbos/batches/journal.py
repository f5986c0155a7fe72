"""An answer that is written in the very transaction that settles its ask: paid for and kept, or neither.

Where several asks are behind a line, it is written with the last of them; what the others have paid for is known to the
next attempt, should there be one (`nimbos/ledger/attempts.py`), so it is not paid for twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from nimbos.batches.endpoint import Reply
from nimbos.db import Transaction
from nimbos.ledger import Attempt, Attempts
from nimbos.types import Ask, Usage
from nimbos.work import Claim, Work


class LineJournal:
    """A journal of the ledger (`nimbos.ledger.Journal`) for one line of a batch.

    `written` once the line's end was part of a settlement, `over` when that was the batch's last line.
    """

    def __init__(
        self, work: Work, claim: Claim, answer: Callable[[Reply], Transaction[bool]], *, before: Attempts
    ) -> None:
        """`answer` writes a reply as the line's, and says whether the batch is over. `before`: earlier attempts at the
        line."""
        self._work = work
        self._claim = claim
        self._answer = answer
        self._reply: Reply | None = None
        self.attempt = Attempt(before, self._keep)
        self.written = False
        self.over = False

    def answered(self, reply: Reply) -> None:
        """The whole answer is there; its ask is not settled yet."""
        self._reply = reply

    def of(self, number: int) -> OneOfSeveral:
        return OneOfSeveral(self, number)

    @property
    def paid(self) -> Usage:
        return self.attempt.paid()

    def reserved(self, ask: Ask, *, prompt_tokens: int) -> Transaction[None]:
        """Raises: ClaimLost; then the ask is not begun."""
        yield from self.attempt.begin(ask.id)

    def extended(self, ask_id: str, progress: object, extended: object) -> Transaction[None]:
        yield from ()

    def settled(self, settlement: object, settled: object) -> Transaction[None]:
        """Nothing is written where somebody else has the line now; the ask is settled all the same."""
        if self._reply is not None and (yield from self._work.end(self._claim)):
            self.over = yield from self._answer(self._reply)
            self.written = True

    def _keep(self, known: Callable[[], Attempts]) -> Transaction[None]:
        yield from self._work.keep(self._claim, lambda: msgspec.msgpack.encode(known()))


@dataclass(frozen=True, slots=True)
class OneOfSeveral:
    """The journal of the ask `number` of a line that has several."""

    line: LineJournal
    number: int

    @property
    def paid(self) -> Usage:
        return self.line.attempt.paid(self.number)

    def reserved(self, ask: Ask, *, prompt_tokens: int) -> Transaction[None]:
        """Raises: ClaimLost; then the ask is not begun."""
        yield from self.line.attempt.begin(ask.id, number=self.number)

    def extended(self, ask_id: str, progress: object, extended: object) -> Transaction[None]:
        yield from ()

    def settled(self, settlement: object, settled: object) -> Transaction[None]:
        yield from self.line.settled(settlement, settled)


def attempts_of(claim: Claim) -> Attempts:
    """What a line's claim says of earlier attempts."""
    return msgspec.msgpack.decode(claim.payload, type=Attempts) if claim.payload else Attempts()

"""An answer that is begun anew when a server or an engine dies under it: what its earlier asks paid for is paid.

Whoever keeps such work (`nimbos/batches`, `nimbos/responses`) writes the ids of its asks down beside it, in the
transactions that reserve them. The next attempt looks up what the ledger says of them: it computes those tokens again
as `recomputed`, pays for the rest, and tells the sum of all. An ask that is not settled then (its server is silent, and
has a meter file that only its own home can read) pays for itself when it is, and the next attempt for all it computes.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from nimbos.db import Transaction
from nimbos.ledger.spent import spent
from nimbos.types import Ask, Usage

_OPEN_MAX = 16  # of one number: asks of which is not known what they paid
_NOTHING = Usage()


class Attempts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """By the number of the ask among those behind one answer (a completion of several prompts has several): `paid` by
    asks that are settled, and the ids of the others."""

    paid: dict[int, Usage] = {}
    open: tuple[tuple[int, str], ...] = ()

    def with_ask(self, number: int, ask_id: str) -> Attempts:
        if (number, ask_id) in self.open:
            return self
        known = self.open
        own = [pair for pair in known if pair[0] == number]
        if len(own) >= _OPEN_MAX:
            known = tuple(pair for pair in known if pair != own[0])
        return msgspec.structs.replace(self, open=(*known, (number, ask_id)))

    def settled(self) -> Transaction[Attempts]:
        """As it stands now."""
        paid, still_open = dict(self.paid), []
        for number, ask_id in self.open:
            found = yield from spent(ask_id)
            if found is None:
                still_open.append((number, ask_id))
            else:
                paid[number] = paid.get(number, _NOTHING) + found.usage
        return Attempts(paid=paid, open=tuple(still_open))


class Attempt:
    """One of them. `keep` writes what is known of all beside the work, as a part of the reservation; what it is given
    is called when the work's row is locked, as several asks of one answer may be let in at once."""

    def __init__(self, before: Attempts, keep: Callable[[Callable[[], Attempts]], Transaction[None]]) -> None:
        """`before`: as `Attempts.settled` says it."""
        self._known = before
        self._keep = keep

    def paid(self, number: int = 0) -> Usage:
        return self._known.paid.get(number, _NOTHING)

    def begin(self, ask_id: str, *, number: int = 0) -> Transaction[None]:
        """May run again."""
        self._known = self._known.with_ask(number, ask_id)
        yield from self._keep(lambda: self._known)


def with_what_is_paid(ask: Ask, paid: Usage) -> Ask:
    """Which branch was paid how much is not known, and need not be: together they say as much as before."""
    if paid == _NOTHING:
        return ask
    return msgspec.structs.replace(
        ask,
        paid_prompt_tokens=ask.paid_prompt_tokens + paid.input,
        paid_output_tokens=ask.paid_output_tokens + paid.output,
    )

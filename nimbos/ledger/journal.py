"""Whoever keeps a log of its own beside the ledger's writes it in the same transactions: an ask is in both or in
neither."""

from __future__ import annotations

from typing import Protocol

from nimbos.db import Transaction
from nimbos.ledger.ledger import Extended, Progress, Settled
from nimbos.ledger.rows import Settlement
from nimbos.types import Ask, Usage


class Journal(Protocol):
    """Each is a transaction's part, run after the ledger's own; an exception undoes both. It may be run again.
    After an exception of `settled` the ask is settled alone: what was used is owed."""

    @property
    def paid(self) -> Usage:
        """By earlier asks for this very answer, which begins anew: it is not paid for again, and told with the rest."""
        ...

    def reserved(self, ask: Ask, *, prompt_tokens: int) -> Transaction[None]: ...

    def extended(self, ask_id: str, progress: Progress, extended: Extended) -> Transaction[None]: ...

    def settled(self, settlement: Settlement, settled: Settled) -> Transaction[None]: ...

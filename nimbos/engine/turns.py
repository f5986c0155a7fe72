"""A queue in which accounts take turns: whoever brings much waits behind their own, and not others behind them.

Knows nothing of what waits in it. `worker.py` puts in what is to be prepared; one thread takes it out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

RANKS = 3
PATIENCE_TURNS = 8  # after so many turns of other ranks while it waits, a rank has one


class Turns(Generic[T]):
    """Rank 0 first; within a rank, from account to account; within an account, first come, first served. A rank that
    is passed over again and again has a turn now and then, so nothing waits for ever. Thread-safe."""

    def __init__(self) -> None:
        self._ranks = [OrderedDict[str, OrderedDict[Hashable, T]]() for _ in range(RANKS)]  # the first account is next
        self._passed_over = [0] * RANKS
        self._places: dict[Hashable, tuple[int, str]] = {}
        self._arrived = threading.Condition()

    def put(self, item: T, *, key: Hashable, account: str, rank: int) -> None:
        """`key`: for `drop`; no two that wait have the same. `rank`: below RANKS."""
        with self._arrived:
            self._ranks[rank].setdefault(account, OrderedDict())[key] = item
            self._places[key] = rank, account
            self._arrived.notify()

    def get(self) -> T:
        """Waits for one."""
        with self._arrived:
            while not self._places:
                self._arrived.wait()
            accounts = self._ranks[self._next_rank()]
            account, items = accounts.popitem(last=False)
            key, item = items.popitem(last=False)
            del self._places[key]
            if items:
                accounts[account] = items  # behind all others
            return item

    def drop(self, key: Hashable) -> bool:
        """Forgets one. Returns: False when it does not wait here, or no longer."""
        with self._arrived:
            place = self._places.pop(key, None)
            if place is None:
                return False
            rank, account = place
            items = self._ranks[rank][account]
            del items[key]
            if not items:
                del self._ranks[rank][account]
            return True

    def _next_rank(self) -> int:
        waiting = [rank for rank, accounts in enumerate(self._ranks) if accounts]
        longest = max(waiting, key=self._passed_over.__getitem__)
        chosen = longest if self._passed_over[longest] >= PATIENCE_TURNS else waiting[0]
        self._passed_over = [
            count + 1 if rank in waiting and rank != chosen else 0 for rank, count in enumerate(self._passed_over)
        ]
        return chosen

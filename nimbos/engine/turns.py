"""A queue in which accounts take turns: whoever brings much waits behind their own, and not others behind them."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """First come, first served within an account; from account to account by turns. Thread-safe."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # the first account is next
        self._arrived = threading.Condition()

    def put(self, account: str, item: T) -> None:
        with self._arrived:
            self._waiting.setdefault(account, deque()).append(item)
            self._arrived.notify()

    def get(self) -> T:
        """Waits for one."""
        with self._arrived:
            while not self._waiting:
                self._arrived.wait()
            account, items = self._waiting.popitem(last=False)
            item = items.popleft()
            if items:
                self._waiting[account] = items  # behind all others
            return item

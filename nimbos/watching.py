"""Who is told when an ask begins, first speaks and ends: Prometheus, traces, and the list of what runs now.

`service.py` tells them; none of them can fail an ask or learn what is in it. `LiveAsks` is what `nimbos top` shows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from nimbos.types import Account, Ask, Origin, Usage


class Watcher(Protocol):
    def begin(self, ask: Ask, account: Account, origin: Origin) -> None: ...

    def first_token(self, ask: Ask, seconds: float) -> None: ...

    def settle(self, ask: Ask, *, usage: Usage, outcome: str, seconds: float) -> None: ...


@dataclass(slots=True, eq=False)
class LiveAsk:
    """An ask that is being answered. `first_token_s`: None while it waits or reads its prompt."""

    ask: Ask
    account: Account
    origin: Origin
    begun_s: float
    first_token_s: float | None = None

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.begun_s


@dataclass(slots=True, eq=False)
class LiveAsks:
    """The asks that are being answered now, in the order they began. `settled`: of those that ended, all together."""

    settled: Usage = field(default_factory=Usage)
    _asks: dict[str, LiveAsk] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._asks)

    def list(self) -> list[LiveAsk]:
        return list(self._asks.values())

    def begin(self, ask: Ask, account: Account, origin: Origin) -> None:
        self._asks[ask.id] = LiveAsk(ask, account, origin, time.monotonic())

    def first_token(self, ask: Ask, seconds: float) -> None:
        live = self._asks.get(ask.id)
        if live is not None:
            live.first_token_s = seconds

    def settle(self, ask: Ask, *, usage: Usage, outcome: str, seconds: float) -> None:
        if self._asks.pop(ask.id, None) is not None:
            self.settled = self.settled + usage

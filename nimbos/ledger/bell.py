"""Wakes those who wait for budgets to move: a few at a time, whoever waits longest first.

Each of them tries again, which costs a transaction. A thousand asks of one key that wait for the rest of its budget
would otherwise all try at every settlement of anybody's. Whoever gets what it waited for rings again, so that what is
left reaches the next ones.
"""

from __future__ import annotations

import asyncio
from itertools import islice

AT_ONCE = 16
SHARE_S = 0.005  # so much longer for everybody else who waits, or the ticks alone would be as bad


class Bell:
    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], None] = {}  # in their order

    def ring(self) -> None:
        for waiting in [*islice(self._waiting, AT_ONCE)]:
            del self._waiting[waiting]
            if not waiting.done():
                waiting.set_result(None)

    async def wait(self, tick_s: float, *, most_s: float) -> None:
        """Until a ring that is for us, or until it is time to look without one: after `tick_s`, or later where many
        wait, but never after `most_s`."""
        rung = asyncio.get_running_loop().create_future()
        self._waiting[rung] = None
        try:
            async with asyncio.timeout(min(most_s, max(tick_s, SHARE_S * len(self._waiting)))):
                await rung
        except TimeoutError:
            return
        finally:
            self._waiting.pop(rung, None)

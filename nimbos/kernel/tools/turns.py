"""Who runs beside whom in one worker: so many calls together, unless one is to have it alone.

One that ended the process, or may have, is made again with nothing beside it: so it takes nobody else along, and if it
ends it again everybody knows who did.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Used from one event loop. `most`: together."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._together = 0
        self._alone = False
        self._waiting = 0  # for being alone: nobody begins before them
        self._news = asyncio.Event()

    @asynccontextmanager
    async def take(self, *, alone: bool) -> AsyncIterator[None]:
        """Waits for its turn. Who has one waits for no other."""
        await (self._enter_alone() if alone else self._enter())
        try:
            yield
        finally:
            if alone:
                self._alone = False
            else:
                self._together -= 1
            self._tell()

    async def _enter(self) -> None:
        while self._alone or self._waiting or self._together >= self._most:
            await self._news.wait()
        self._together += 1

    async def _enter_alone(self) -> None:
        self._waiting += 1
        try:
            while self._alone or self._together:
                await self._news.wait()
            self._alone = True
        finally:
            self._waiting -= 1
            self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

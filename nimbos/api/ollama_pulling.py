"""A download told in Ollama's lines while it runs. Whoever stops listening stops it; what came is kept."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from msgspec import UNSET

from nimbos.api import ollama_wire as told
from nimbos.hub import Progress

_NOTES_MAX = 32


class Pulling:
    """A `nimbos.hub.Progress`: parts of a download may tell it from other threads."""

    def __init__(self, pull: Callable[[Progress], Coroutine[Any, Any, None]]) -> None:
        self._pull = pull
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._notes: deque[str] = deque(maxlen=_NOTES_MAX)
        self._file: str | None = None
        self._total: int | None = None
        self._have = 0
        self._told: tuple[str | None, int] = (None, -1)

    def start(self, name: str, *, total_bytes: int | None, done_bytes: int) -> None:
        self._file, self._total, self._have = name, total_bytes, done_bytes
        self._wake()

    def advance(self, count_bytes: int) -> None:
        self._have += count_bytes
        self._wake()

    def note(self, text: str) -> None:
        self._notes.append(text)
        self._wake()

    def done(self) -> None:
        self._wake()

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """As many as their reader takes: what happened between two is one.

        Raises: what the download raises; before the first line where nothing had begun.
        """
        pulling = asyncio.ensure_future(self._pull(self))
        try:
            await self._next(pulling)
            if pulling.done():
                pulling.result()
            yield told.line(told.Status(status="pulling manifest"))
            while True:
                for status in self._statuses():
                    yield told.line(status)
                if pulling.done():
                    break
                await self._next(pulling)
            pulling.result()
            yield told.line(told.Status(status="success"))
        finally:
            pulling.cancel()
            await asyncio.wait({pulling})

    async def _next(self, pulling: asyncio.Future[None]) -> None:
        change = asyncio.ensure_future(self._changed.wait())
        both: set[asyncio.Future[Any]] = {pulling, change}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()
        self._changed.clear()

    def _statuses(self) -> list[told.Status]:
        found = []
        while self._notes:
            found.append(told.Status(status=self._notes.popleft()))
        now = (self._file, self._have)
        if self._file is not None and now != self._told:
            self._told = now
            total = self._total if self._total is not None else UNSET
            found.append(
                told.Status(status=f"pulling {self._file}", digest=self._file, total=total, completed=self._have)
            )
        return found

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._changed.set)

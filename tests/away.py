"""Storage that goes away and comes back: a SQLite file that another program locks for a while, or, on both databases,
a door at which every transaction stands still until the test lets it through."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from nimbos.db import Database, Transaction
from nimbos.db.database import FILE_NAME
from nimbos.db.sqlite import SqliteStore
from nimbos.db.sqlite_file import SqliteFile

T = TypeVar("T")


@asynccontextmanager
async def impatient(home: Path) -> AsyncIterator[Database]:
    """A database that waits for locks only briefly."""
    opened = Database(await SqliteStore.open(SqliteFile(home / FILE_NAME, lock_patience_s=0.02)), dialect="sqlite")
    try:
        yield opened
    finally:
        await opened.close()


@contextmanager
def away(home: Path) -> Iterator[None]:
    """Nothing can be written meanwhile."""
    with closing(sqlite3.connect(home / FILE_NAME, isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@dataclass(slots=True, eq=False)
class Turn:
    """One transaction at a `Door`."""

    _may: asyncio.Event = field(default_factory=asyncio.Event)
    _told: asyncio.Event = field(default_factory=asyncio.Event)
    _done: asyncio.Event = field(default_factory=asyncio.Event)

    async def done(self, *, told: bool = True) -> None:
        """Lets it through, and waits for its end, of which the caller is told at once or by the next `done`."""
        self.let(told=told)
        await self._done.wait()

    def let(self, *, told: bool = True) -> None:
        self._may.set()
        if told:
            self._told.set()

    async def through(self, run: Callable[[], Awaitable[T]]) -> T:
        await self._may.wait()
        try:
            return await run()
        finally:
            self._done.set()
            await self._told.wait()


class Door(Database):
    """The way to `database`, which stays open without it. `standing`: what waits, in the order of coming."""

    def __init__(self, database: Database) -> None:
        super().__init__(database._store, dialect=database.dialect)
        self.standing: asyncio.Queue[Turn] = asyncio.Queue()
        self._turns: list[Turn] = []
        self._is_open = False

    async def run(self, begin: Callable[[], Transaction[T]], *, durable: bool = False, quick: bool = False) -> T:
        def run() -> Awaitable[T]:
            return super(Door, self).run(begin, durable=durable, quick=quick)

        if self._is_open:
            return await run()
        turn = Turn()
        self._turns.append(turn)
        self.standing.put_nowait(turn)
        return await turn.through(run)

    def open_wide(self) -> None:
        """From now on nothing stands still."""
        self._is_open = True
        for turn in self._turns:
            turn.let()

"""The door to the database: transactions, reads, streams and backups, whichever database it is.

Knows neither tables nor drivers: `sqlite.py` and `postgresql.py` are the two `Store`s behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol, TypeVar

from nimbos.config import Settings
from nimbos.db.sqlite import SqliteStore
from nimbos.db.sqlite_file import SqliteFile
from nimbos.db.sqlite_schema import copy
from nimbos.db.statements import Bound, Dialect, Row, Transaction
from nimbos.errors import ConfigError, NotFound

T = TypeVar("T")

FILE_NAME = "nimbos.db"
_SCHEMES = ("postgresql://", "postgres://")


class Store(Protocol):
    """What runs transactions: SQLite's writer thread, or a pool of connections to PostgreSQL."""

    async def run(self, begin: Callable[[], Transaction[T]], *, durable: bool, quick: bool) -> T: ...

    async def read(self, query: Bound) -> list[Row]: ...

    def stream(self, query: Bound, *, batch: int) -> AsyncIterator[Row]: ...

    async def backup(self, target: Path) -> None: ...

    async def close(self) -> None: ...


class Database:
    """Whoever opened it closes it, on the same event loop. Every method may raise StorageUnavailable; the next call
    works again as soon as the cause is gone."""

    def __init__(self, store: Store, *, dialect: Dialect) -> None:
        self._store = store
        self.dialect: Dialect = dialect

    @classmethod
    async def open(cls, settings: Settings) -> Database:
        """Makes the database where there is none, and brings its tables up to date.

        Raises: StorageUnavailable, also for a database that a newer program has changed.
        """
        url = settings.storage.database_url
        if url:
            if not url.startswith(_SCHEMES):
                raise ConfigError("The database's URL must begin with postgresql://, or be empty for SQLite.")
            from nimbos.db.postgresql import PostgresqlStore  # its driver is not loaded where it is not used

            return cls(await PostgresqlStore.open(url), dialect="postgresql")
        return cls(await SqliteStore.open(SqliteFile(Path(settings.home) / FILE_NAME)), dialect="sqlite")

    @staticmethod
    async def copy(settings: Settings, target: Path) -> None:
        """`backup` of a database that is not open here, whatever its version; a server may be using it.

        Raises: NotFound, Conflict where `target` exists, ConfigError for PostgreSQL, StorageUnavailable.
        """
        if settings.storage.database_url:
            from nimbos.db.postgresql import no_copy

            raise no_copy(settings.storage.database_url, target)
        path = Path(settings.home) / FILE_NAME
        if not path.exists():
            raise NotFound(f"There is no database yet: {path}.")
        await asyncio.to_thread(copy, SqliteFile(path), target)

    async def run(self, begin: Callable[[], Transaction[T]], *, durable: bool = False, quick: bool = False) -> T:
        """Runs one transaction whole, or not at all. An exception in the generator undoes it and is raised here.

        `begin` is called again when what others did, or the loss of a group commit, demands another try: what it does
        beside yielding statements must bear that. `durable`: on the disk before this returns; otherwise the last
        moments may be lost at power loss, never part of a transaction. `quick`: a few statements, each on rows that it
        names by key, which SQLite may run on the event loop's own thread. A caller that is cancelled stops waiting; the
        transaction still runs whole or not at all.
        Raises: StorageUnavailable; Conflict for a row that a unique key forbids.
        """
        return await self._store.run(begin, durable=durable, quick=quick)

    async def read(self, query: Bound) -> list[Row]:
        """The rows of one query, which sees what was committed before; it waits for no transaction."""
        return await self._store.read(query)

    def stream(self, query: Bound, *, batch: int = 1000) -> AsyncIterator[Row]:
        """The rows of one query as it stood at the first of them, at most `batch` in memory. Close the iterator
        (`contextlib.aclosing`) when leaving it early."""
        return self._store.stream(query, batch=batch)

    async def backup(self, target: Path) -> None:
        """Writes a copy that is whole and can be opened, while transactions go on."""
        await self._store.backup(target)

    async def close(self) -> None:
        """Finishes what was started, refuses what comes later."""
        await self._store.close()

"""SQLite behind the `Store` protocol: one writer, a few readers.

    run()    → writer: `begin immediate`, a group of transactions, each in its savepoint, one commit
    read()   → a reader thread, on a connection that sees the last commit

Files and their errors are in `sqlite_file.py`, the groups in `writer.py`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

from nimbos.db.sqlite_file import SqliteFile
from nimbos.db.sqlite_schema import bring_up_to_date, copy
from nimbos.db.statements import Bound, Row, Transaction
from nimbos.db.writer import Writer
from nimbos.errors import StorageUnavailable

T = TypeVar("T")

_READERS = 4


class SqliteStore:
    def __init__(self, file: SqliteFile) -> None:
        """`open` makes one."""
        self._file = file
        self._writer = Writer(file)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="database-reader")
        self._idle: list[sqlite3.Connection] = []
        self._closed = False

    @classmethod
    async def open(cls, file: SqliteFile) -> SqliteStore:
        """Raises: StorageUnavailable."""
        await asyncio.to_thread(bring_up_to_date, file)
        store = cls(file)
        store._writer.start()
        return store

    async def run(self, begin: Callable[[], Transaction[T]], *, durable: bool, quick: bool) -> T:
        self._check_open()
        return cast("T", await self._writer.run(begin, durable=durable, quick=quick))

    async def read(self, query: Bound) -> list[Row]:
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._fetch, query)

    async def stream(self, query: Bound, *, batch: int) -> AsyncIterator[Row]:
        self._check_open()
        loop = asyncio.get_running_loop()
        reading = _Reading(self._file, query)
        try:
            while rows := await loop.run_in_executor(self._readers, reading.more, batch):
                for row in rows:
                    yield row
        finally:
            self._readers.submit(reading.close)

    async def backup(self, target: Path) -> None:
        await asyncio.to_thread(copy, self._file, target)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._writer.close()
        await asyncio.to_thread(self._readers.shutdown)
        for connection in self._idle:
            connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StorageUnavailable(str(self._file.path), reason="it is closed.")

    def _fetch(self, query: Bound) -> list[Row]:
        text, parameters = query.prepared("sqlite")
        connection = self._take()
        try:
            rows = connection.execute(text, parameters).fetchall()
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
            connection.close()
            raise self._file.meaning(error) from error
        self._idle.append(connection)
        return rows

    def _take(self) -> sqlite3.Connection:
        self._file.check_place()
        try:
            return self._idle.pop()
        except IndexError:
            return _connect_reader(self._file)


class _Reading:
    """A query that is read in pieces, on a connection of its own. Its methods run in threads, one at a time."""

    def __init__(self, file: SqliteFile, query: Bound) -> None:
        self._file = file
        self._text, self._parameters = query.prepared("sqlite")
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._cursor: sqlite3.Cursor | None = None

    def more(self, count: int) -> list[Row]:
        with self._lock:
            try:
                if self._cursor is None:
                    self._connection = _connect_reader(self._file)
                    self._cursor = self._connection.execute(self._text, self._parameters)
                return self._cursor.fetchmany(count)
            except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
                raise self._file.meaning(error) from error

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()


def _connect_reader(file: SqliteFile) -> sqlite3.Connection:
    connection = file.connect()
    connection.execute("PRAGMA query_only=1")
    return connection

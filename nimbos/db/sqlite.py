"""SQLite behind the `Store` protocol: one writer thread, a few readers.

    run()    → inbox → writer thread: `begin immediate`, a group of transactions, each in its savepoint, one commit
    read()   → a reader thread with a connection of its own, which sees the last commit

The connections' settings and the errors' meaning are in `sqlite_file.py`, the groups in `writer.py`.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar, cast

from nimbos.db.sqlite_file import LOCK_PATIENCE_S, SqliteFile
from nimbos.db.statements import Bound, Row, Transaction
from nimbos.db.tables.metadata import all_tables
from nimbos.db.writer import Writer

T = TypeVar("T")

_READERS = 4
_BACKUP_PAGES = 1024  # copied at once; the source is not locked between


class SqliteStore:
    def __init__(self, file: SqliteFile) -> None:
        """`open` makes one."""
        self._file = file
        self._writer = Writer(file)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="database-reader")
        self._idle: list[sqlite3.Connection] = []

    @classmethod
    async def open(cls, path: Path, *, lock_patience_s: float = LOCK_PATIENCE_S) -> SqliteStore:
        file = SqliteFile(path, lock_patience_s=lock_patience_s)
        await asyncio.to_thread(_make_tables, file)
        store = cls(file)
        store._writer.start()
        return store

    async def run(self, begin: Callable[[], Transaction[T]], *, durable: bool) -> T:
        return cast("T", await self._writer.run(begin, durable=durable))

    async def read(self, query: Bound) -> list[Row]:
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._fetch, query)

    async def stream(self, query: Bound, *, batch: int) -> AsyncIterator[Row]:
        loop = asyncio.get_running_loop()
        text, parameters = query.prepared("sqlite")
        connection = await loop.run_in_executor(self._readers, self._take)
        try:
            cursor = await loop.run_in_executor(self._readers, self._execute, connection, text, parameters)
            while rows := await loop.run_in_executor(self._readers, self._more, cursor, batch):
                for row in rows:
                    yield row
        finally:
            connection.close()

    async def backup(self, target: Path) -> None:
        await asyncio.to_thread(self._copy, target)

    async def close(self) -> None:
        await asyncio.to_thread(self._writer.close)
        await asyncio.to_thread(self._readers.shutdown)
        for connection in self._idle:
            connection.close()

    def _fetch(self, query: Bound) -> list[Row]:
        text, parameters = query.prepared("sqlite")
        connection = self._take()
        try:
            rows = self._execute(connection, text, parameters).fetchall()
        except sqlite3.Error as error:
            connection.close()
            raise self._file.meaning(error) from error
        self._idle.append(connection)
        return rows

    def _take(self) -> sqlite3.Connection:
        try:
            return self._idle.pop()
        except IndexError:
            return self._file.connect(read_only=True)

    def _execute(self, connection: sqlite3.Connection, text: str, parameters: tuple[object, ...]) -> sqlite3.Cursor:
        try:
            return connection.execute(text, parameters)
        except sqlite3.Error as error:
            raise self._file.meaning(error) from error

    def _more(self, cursor: sqlite3.Cursor, batch: int) -> list[Row]:
        try:
            return cursor.fetchmany(batch)
        except sqlite3.Error as error:
            raise self._file.meaning(error) from error

    def _copy(self, target: Path) -> None:
        with closing(self._file.connect(read_only=True)) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy, pages=_BACKUP_PAGES)


def _make_tables(file: SqliteFile) -> None:
    from sqlalchemy.dialects.sqlite import dialect
    from sqlalchemy.schema import CreateIndex, CreateTable

    with closing(file.connect()) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for table in all_tables().sorted_tables:
            connection.execute(str(CreateTable(table, if_not_exists=True).compile(dialect=dialect())))
            for index in sorted(table.indexes, key=lambda index: str(index.name)):
                connection.execute(str(CreateIndex(index, if_not_exists=True).compile(dialect=dialect())))
        connection.execute("COMMIT")

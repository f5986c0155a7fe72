"""The one thread that writes to SQLite.

It takes what waits in the inbox as a group: `begin immediate`, every transaction whole in its own savepoint, one
commit. A transaction's own exception undoes its savepoint and nothing else. Trouble with the file undoes the whole
group; then each of its transactions is tried alone, so that only those fail which cannot be written. After trouble the
connection is opened anew.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

from nimbos.db.sqlite_file import SqliteFile
from nimbos.db.statements import Transaction
from nimbos.errors import StorageUnavailable

_GROUP = 128  # transactions in one commit, at most


class _Job:
    """One transaction and who waits for it. `failed` and `result` are the writer thread's until `_deliver`."""

    __slots__ = ("begin", "done", "durable", "failed", "loop", "result")

    def __init__(self, begin: Callable[[], Transaction[Any]], *, durable: bool) -> None:
        self.begin = begin
        self.durable = durable
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Any] = self.loop.create_future()
        self.result: Any = None
        self.failed: BaseException | None = None


class Writer:
    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="database-writer", daemon=True)
        self._connection: sqlite3.Connection | None = None
        self._full_sync = False

    def start(self) -> None:
        self._thread.start()

    async def run(self, begin: Callable[[], Transaction[Any]], *, durable: bool) -> Any:
        """Not after `close`."""
        job = _Job(begin, durable=durable)
        self._inbox.put(job)
        return await job.done

    def close(self) -> None:
        """Finishes what was put in before. Blocks."""
        self._inbox.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while group := self._next_group():
            self._settle([job for job in group if not job.done.cancelled()])
            _tell(group)
        self._disconnect()

    def _next_group(self) -> list[_Job]:
        """Waits for one and takes what else is there; empty when all is done and closed."""
        group: list[_Job] = []
        job = self._inbox.get()
        while job is not None:
            group.append(job)
            if len(group) == _GROUP:
                return group
            try:
                job = self._inbox.get_nowait()
            except queue.Empty:
                return group
        if group:
            self._inbox.put(None)  # for the next turn
        return group

    def _settle(self, group: list[_Job]) -> None:
        """Sets what became of each."""
        try:
            cursor = self._begin(durable=any(job.durable for job in group))
        except (StorageUnavailable, sqlite3.Error) as error:
            self._disconnect()
            _fail(group, self._file.meaning(error))
            return
        try:
            for job in group:
                self._perform(job, cursor)
            cursor.execute("COMMIT")
        except (StorageUnavailable, sqlite3.Error) as error:
            self._disconnect()  # which undoes what was not committed
            if len(group) == 1:
                _fail(group, self._file.meaning(error))
                return
            for job in group:
                self._settle([job])

    def _begin(self, *, durable: bool) -> sqlite3.Cursor:
        """Raises: StorageUnavailable, sqlite3.Error."""
        self._file.check_place()
        connection = self._connection
        if connection is None:
            connection = self._connection = self._file.connect()
            self._full_sync = False
        if durable != self._full_sync:
            connection.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
            self._full_sync = durable
        return connection.execute("BEGIN IMMEDIATE")

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _perform(self, job: _Job, cursor: sqlite3.Cursor) -> None:
        """Runs one transaction in a savepoint, and undoes that when it fails. What it raises itself is its caller's.

        Raises: StorageUnavailable, sqlite3.Error when the group cannot go on.
        """
        job.result = job.failed = None
        cursor.execute("SAVEPOINT own")
        try:
            job.result = _drive(job.begin(), cursor)
        except BaseException as error:
            job.failed = self._file.meaning(error) if isinstance(error, Exception) else error
            if isinstance(job.failed, StorageUnavailable) and isinstance(error, sqlite3.Error):
                raise job.failed from error
            cursor.execute("ROLLBACK TO own")
        cursor.execute("RELEASE own")


def _drive(generator: Transaction[Any], cursor: sqlite3.Cursor) -> Any:
    try:
        bound = next(generator)
        while True:
            text, parameters = bound.prepared("sqlite")
            bound = generator.send(cursor.execute(text, parameters).fetchall())
    except StopIteration as stop:
        return stop.value
    finally:
        generator.close()


def _fail(group: list[_Job], error: BaseException) -> None:
    for job in group:
        job.failed = error


def _tell(group: list[_Job]) -> None:
    """Hands results to the callers, with one wake-up of their loop."""
    try:
        group[0].loop.call_soon_threadsafe(_deliver, group)
    except RuntimeError:
        return  # the loop is closed: nobody waits any more


def _deliver(group: list[_Job]) -> None:
    for job in group:
        if job.done.done():
            continue
        if job.failed is not None:
            job.done.set_exception(job.failed)
        else:
            job.done.set_result(job.result)

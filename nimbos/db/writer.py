"""The one thread that writes to SQLite.

It takes what waits in the inbox as a group: `begin immediate`, every transaction whole in its own savepoint, one
commit. A transaction's own exception undoes its savepoint and nothing else. Trouble with the file undoes the whole
group; then each of its transactions is tried alone, so that only those fail which cannot be written.
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
    """One transaction and who waits for it. `failed` and `result` are set in the writer thread before `done`'s loop
    hears of them."""

    __slots__ = ("begin", "done", "durable", "failed", "loop", "result")

    def __init__(self, begin: Callable[[], Transaction[Any]], *, durable: bool) -> None:
        self.begin = begin
        self.durable = durable
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Any] = self.loop.create_future()
        self.result: Any = None
        self.failed: BaseException | None = None


class _GroupLost(Exception):
    """SQLite could not go on with the group; nothing of it is written."""

    def __init__(self, reason: sqlite3.Error) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Writer:
    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="database-writer", daemon=True)
        self._closed = False
        self._connection: sqlite3.Connection | None = None
        self._full_sync = False

    def start(self) -> None:
        self._thread.start()

    async def run(self, begin: Callable[[], Transaction[Any]], *, durable: bool) -> Any:
        if self._closed:
            raise StorageUnavailable(str(self._file.path), reason="it is closed.")
        job = _Job(begin, durable=durable)
        self._inbox.put(job)
        return await job.done

    def close(self) -> None:
        """Finishes what was put in before. Blocks."""
        self._closed = True
        self._inbox.put(None)
        self._thread.join()

    def _serve(self) -> None:
        open_ = True
        while open_:
            first = self._inbox.get()
            if first is None:
                break
            group = [first]
            while len(group) < _GROUP:
                try:
                    job = self._inbox.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    open_ = False
                    break
                group.append(job)
            self._settle(group)
        if self._connection is not None:
            self._connection.close()

    def _settle(self, group: list[_Job]) -> None:
        wanted = [job for job in group if not job.done.cancelled()]
        try:
            self._commit(wanted)
        except _GroupLost as lost:
            if len(wanted) == 1:
                wanted[0].failed = self._file.meaning(lost.reason)
            else:
                for job in wanted:
                    self._settle([job])
                return
        except StorageUnavailable as error:
            for job in wanted:
                job.failed = error
        if wanted:
            _tell(wanted)

    def _commit(self, group: list[_Job]) -> None:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._file.connect()
            self._full_sync = False
        durable = any(job.durable for job in group)
        if durable != self._full_sync:
            connection.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
            self._full_sync = durable
        cursor = connection.cursor()
        try:
            cursor.execute("BEGIN IMMEDIATE")
            for job in group:
                _perform(job, cursor, self._file)
            cursor.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.rollback()
            raise _GroupLost(error) from error


def _perform(job: _Job, cursor: sqlite3.Cursor, file: SqliteFile) -> None:
    """Runs one transaction in a savepoint. Raises: sqlite3.Error when the group cannot go on."""
    job.result = job.failed = None
    cursor.execute("SAVEPOINT own")
    generator = job.begin()
    try:
        bound = next(generator)
        while True:
            text, parameters = bound.prepared("sqlite")
            rows = cursor.execute(text, parameters).fetchall()
            bound = generator.send(rows)
    except StopIteration as stop:
        job.result = stop.value
    except sqlite3.Error as error:
        meaning = file.meaning(error)
        if isinstance(meaning, StorageUnavailable):
            raise
        job.failed = meaning
    except Exception as error:
        job.failed = error
    finally:
        generator.close()
    if job.failed is not None:
        cursor.execute("ROLLBACK TO own")
    cursor.execute("RELEASE own")


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

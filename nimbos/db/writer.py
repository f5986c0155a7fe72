"""What writes to SQLite: one connection, used by one thread at a time.

Transactions are taken in groups: `begin immediate`, every transaction whole in its own savepoint, one commit. A
transaction's own exception undoes its savepoint and nothing else. Trouble with the file undoes the whole group; then
each of its transactions is tried alone, so that only those fail which cannot be written. After trouble the connection
is opened anew.

    quick     a few statements by key: run on the event loop's own thread. Beside a busy loop every statement of another
              thread waits for the interpreter's lock, which costs more than the statement. Only a commit that has to
              reach the disk is the writer thread's.
    others    run by the writer thread from begin to commit.

Nothing waits for a lock, or writes the log back into the file, on the loop's thread: where that is needed, the writer
thread does the group again. The order in which transactions were given is kept.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nimbos.db.sqlite_file import SqliteFile
from nimbos.db.statements import Transaction
from nimbos.errors import StorageUnavailable

_GROUP = 128  # transactions in one commit, at most
_QUICK_GROUP = 16  # and of those that the loop waits for
_LOG_COMMITS = 64  # so many that the loop's thread has begun, and the log is written back
_LOG_PAGES = 1000  # or so many that the writer thread has


class _Job:
    """One transaction and who waits for it."""

    __slots__ = ("begin", "done", "durable", "failed", "quick", "result")

    def __init__(self, begin: Callable[[], Transaction[Any]], *, durable: bool, quick: bool) -> None:
        self.begin = begin
        self.durable = durable
        self.quick = quick
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.result: Any = None
        self.failed: BaseException | None = None


class Writer:
    """`run` and `close` are called on one event loop. The connection is the writer thread's while `_away`, and the
    loop's own otherwise."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._waiting: deque[_Job] = deque()
        self._orders: queue.SimpleQueue[tuple[list[_Job], bool] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="database-writer", daemon=True)
        self._connection: sqlite3.Connection | None = None
        self._full_sync = False
        self._on_loop = False
        self._commits = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._away = False
        self._turn_due = False
        self._idle: asyncio.Event | None = None

    def start(self) -> None:
        self._thread.start()

    async def run(self, begin: Callable[[], Transaction[Any]], *, durable: bool, quick: bool) -> Any:
        """Not after `close`."""
        job = _Job(begin, durable=durable, quick=quick)
        self._waiting.append(job)
        self._look()
        return await job.done

    async def close(self) -> None:
        """Finishes what was put in before."""
        while self._waiting or self._away:
            self._idle = asyncio.Event()
            await self._idle.wait()
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)

    def _look(self) -> None:
        """A turn is taken once for all that come in the same round of the loop."""
        if self._waiting and not self._away and not self._turn_due:
            self._turn_due = True
            self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if self._away:
            return
        group = self._next_group()
        if not group:
            pass
        elif group[0].quick:
            self._settle_here(group)
        else:
            self._hand_over(group, begun=False)
        self._look()
        if self._idle is not None and not self._waiting and not self._away:
            self._idle.set()

    def _next_group(self) -> list[_Job]:
        """Those at the head that are alike."""
        group: list[_Job] = []
        while self._waiting and len(group) < (_QUICK_GROUP if self._waiting[0].quick else _GROUP):
            if group and self._waiting[0].quick != group[0].quick:
                break
            job = self._waiting.popleft()
            if not job.done.cancelled():
                group.append(job)
        return group

    def _settle_here(self, group: list[_Job]) -> None:
        """On the loop's thread; whatever goes wrong with the file is tried again by the writer thread."""
        durable = any(job.durable for job in group)
        try:
            cursor = self._begin(durable=durable, on_loop=True)
            for job in group:
                self._perform(job, cursor)
            if durable or self._commits >= _LOG_COMMITS:
                self._hand_over(group, begun=True)
                return
            cursor.execute("COMMIT")
        except (StorageUnavailable, sqlite3.Error):
            self._disconnect()  # which undoes what was not committed
            self._hand_over(group, begun=False)
            return
        self._commits += 1
        _deliver(group)

    def _hand_over(self, group: list[_Job], *, begun: bool) -> None:
        self._away = True
        self._orders.put((group, begun))

    def _back(self, group: list[_Job]) -> None:
        self._away = False
        _deliver(group)
        self._turn()

    def _serve(self) -> None:
        while (order := self._orders.get()) is not None:
            group, begun = order
            if begun:
                self._commit(group)
            else:
                self._settle(group)
            self._tell(group)
        self._disconnect()

    def _tell(self, group: list[_Job]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._back, group)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    def _commit(self, group: list[_Job]) -> None:
        """What the loop's thread has begun. A commit waits for nobody's lock; and one statement is all that is run here
        as a rule, since after each this thread waits for the interpreter's."""
        assert self._connection is not None
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._undo(group, error)
            return
        self._commits += 1
        if self._commits >= _LOG_COMMITS:
            self._write_back(self._connection)

    def _write_back(self, connection: sqlite3.Connection) -> None:
        """The log into the file, as far as no reader needs it. What fails here is tried again by a later one."""
        self._commits = 0
        with suppress(sqlite3.Error):
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _settle(self, group: list[_Job]) -> None:
        """Sets what became of each."""
        try:
            cursor = self._begin(durable=any(job.durable for job in group), on_loop=False)
        except (StorageUnavailable, sqlite3.Error) as error:
            self._disconnect()
            _fail(group, self._file.meaning(error))
            return
        try:
            for job in group:
                self._perform(job, cursor)
            cursor.execute("COMMIT")
            self._commits = 0
        except (StorageUnavailable, sqlite3.Error) as error:
            self._undo(group, error)

    def _undo(self, group: list[_Job], error: Exception) -> None:
        """Nothing of the group was written; each is tried alone."""
        self._disconnect()
        if len(group) == 1:
            _fail(group, self._file.meaning(error))
            return
        for job in group:
            self._settle([job])

    def _begin(self, *, durable: bool, on_loop: bool) -> sqlite3.Cursor:
        """Raises: StorageUnavailable, sqlite3.Error."""
        self._file.check_place()
        connection = self._connection
        if connection is None:
            connection = self._connection = self._file.connect()
            self._full_sync = self._on_loop = False
        self._face(connection, on_loop=on_loop)
        if durable != self._full_sync:
            connection.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
            self._full_sync = durable
        return connection.execute("BEGIN IMMEDIATE")

    def _face(self, connection: sqlite3.Connection, *, on_loop: bool) -> None:
        """On the loop's thread nothing waits for another program, and no commit writes the log back."""
        if on_loop != self._on_loop:
            patience_ms = 0 if on_loop else int(self._file.lock_patience_s * 1000)
            connection.execute(f"PRAGMA busy_timeout={patience_ms}").fetchall()
            connection.execute(f"PRAGMA wal_autocheckpoint={0 if on_loop else _LOG_PAGES}").fetchall()
            self._on_loop = on_loop

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


def _deliver(group: list[_Job]) -> None:
    for job in group:
        if job.done.done():
            continue
        if job.failed is not None:
            job.done.set_exception(job.failed)
        else:
            job.done.set_result(job.result)

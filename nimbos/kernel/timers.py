"""Timers: processes that wait until a moment are woken by a signal then. One task for all of them.

A parked process's `due_ms` is in its head, so timers outlive the server; this one keeps no list of them, only when the
next is due. `SteadyClock` is what `due_ms` is told by: the wall clock as it was when the server started, going on by
itself, so that somebody who sets the wall clock neither ends nor stretches a wait. After a restart the wall clock is
what counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import structlog
from sqlalchemy import BigInteger, ColumnClause, Integer, bindparam, func, literal_column, select

from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.processes import processes
from nimbos.errors import StorageUnavailable
from nimbos.kernel.bells import Bells
from nimbos.kernel.log import Log
from nimbos.kernel.mailbox import Mail, Posted, post
from nimbos.kernel.processes import locked_head
from nimbos.kernel.words import SignalKind
from nimbos.work import Work

POLL_S = 30.0  # another server may have set a timer, and died
_AT_ONCE = 256
_RETRY_S = 1.0
_SOURCE = "timer"

_log = structlog.get_logger(__name__)

_WAITING: ColumnClause[bool] = literal_column("due_ms IS NOT NULL")  # as the index has it
_NEXT = Statement(select(func.min(processes.c.due_ms).label("due_ms")).where(_WAITING))
_DUE = Statement(
    select(processes.c.id, processes.c.due_ms)
    .where(_WAITING, processes.c.due_ms <= bindparam("now_ms", type_=BigInteger))
    .order_by(processes.c.due_ms)
    .limit(bindparam("most", type_=Integer))
)


class SteadyClock:
    def __init__(
        self, *, wall_ms: Callable[[], int] | None = None, elapsed_ms: Callable[[], int] | None = None
    ) -> None:
        """The two clocks are for tests."""
        self._elapsed_ms = elapsed_ms or _elapsed_ms
        self._start_ms = (wall_ms or _wall_ms)() - self._elapsed_ms()

    def now_ms(self) -> int:
        return self._start_ms + self._elapsed_ms()


class Timers:
    def __init__(self, database: Database, log: Log, work: Work, bells: Bells, clock: SteadyClock) -> None:
        self._database = database
        self._process_log = log
        self._work = work
        self._bells = bells
        self._clock = clock
        self._next_ms: int | None = None
        self._sooner = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._bells.answer(timer=self._set)
        self._task = asyncio.create_task(self._ring(), name="process timers")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _set(self, pid: str, due_ms: int) -> None:
        if self._next_ms is None or due_ms < self._next_ms:
            self._next_ms = due_ms
            self._sooner.set()

    async def _ring(self) -> None:
        while True:
            try:
                refused = await self._ring_due()
                wait_s = max(_RETRY_S if refused else 0.0, await self._until_next_s())
            except StorageUnavailable as error:
                _log.warning("kernel.timers_wait", reason=error.reason)
                wait_s = _RETRY_S
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._sooner.wait()
            self._sooner.clear()

    async def _until_next_s(self) -> float:
        self._next_ms = None  # what is set from here on is not forgotten
        (row,) = await self._database.read(_NEXT())
        if row["due_ms"] is not None:
            self._set("", row["due_ms"])
        self._sooner.clear()
        if self._next_ms is None:
            return POLL_S
        return min(POLL_S, max(0.0, (self._next_ms - self._clock.now_ms()) / 1000))

    async def _ring_due(self) -> bool:
        """Whether any could not be woken."""
        while True:
            rows = await self._database.read(_DUE(now_ms=self._clock.now_ms(), most=_AT_ONCE))
            rung = [await self._wake(row["id"], row["due_ms"]) for row in rows]
            if len(rows) < _AT_ONCE or not all(rung):
                return not all(rung)

    async def _wake(self, pid: str, due_ms: int) -> bool:
        def begin() -> Transaction[Posted]:
            head = yield from locked_head(pid)
            if head.due_ms != due_ms:  # another server was quicker, or something else woke it
                return Posted(new=False)
            about = head.about[0] if head.about else ""
            mail = Mail(signal=SignalKind.TIMER, source=_SOURCE, external_id=f"{head.seq}", about=about)
            return (yield from post(self._process_log, self._work, pid, mail))

        try:
            posted = await self._database.run(begin, durable=True)
        except StorageUnavailable:
            raise
        except Exception as error:  # one that cannot be woken, as a newer version's, holds up no other
            _log.error("kernel.timer_refused", process=pid, error=type(error).__name__)
            return False
        if posted.new:
            self._bells.posted(pid, woken=posted.woken)
        return True


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


def _elapsed_ms() -> int:
    """Time while the machine slept counts, where the system tells it."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    if boottime is None:
        return time.monotonic_ns() // 1_000_000
    return time.clock_gettime_ns(boottime) // 1_000_000

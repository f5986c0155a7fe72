"""The events of background responses: in memory while they are made, in the database soon after.

A reader may come at any time, on any server, and go on behind the last number it has. The events of an answer that is
computed again after a crash are the same, so a reader waits until the numbers have caught up.
Knows nothing of what an event says; number n is the n-th.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import msgspec
from sqlalchemy import BigInteger, Executable, Integer, Text, bindparam, delete, exists, not_, or_, select

from nimbos.db import Database, Dialect, Statement, Transaction, insert
from nimbos.db.tables.responses import response_events as events
from nimbos.db.tables.responses import responses
from nimbos.responses.store import begun
from nimbos.work import Claim, Work

KEPT_S = 86_400
_FLUSH_S = 0.25
_FLUSH_EVENTS = 256
_POLL_S = 0.25  # for events that another server makes
_ROWS_AT_ONCE = 64


@dataclass(slots=True, eq=False)
class Live:
    """The events of an answer that this server makes. `written`: so many are in the database."""

    claim: Claim
    made: list[bytes] = field(default_factory=list)
    written: int = 0
    flushed_at: float = 0.0
    over: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, event: bytes) -> None:
        self.made.append(event)
        self._tell()

    def end(self) -> None:
        self.over = True
        self._tell()

    def _tell(self) -> None:
        """Each waiting reader holds the event of its time."""
        told, self.news = self.news, asyncio.Event()
        told.set()


class Journal:
    def __init__(self, database: Database, work: Work) -> None:
        self._database = database
        self._work = work
        self._live: dict[str, Live] = {}
        self._started = asyncio.Event()

    async def open(self, response_id: str, claim: Claim) -> Live:
        """The response is in progress now; what an earlier attempt had written is made again. Close it, whatever
        happens after this returns.

        Raises: ClaimLost.
        """

        def begin() -> Transaction[None]:
            yield from self._work.check(claim)
            yield from begun(response_id)
            yield _REMOVE(response=response_id)

        await self._database.run(begin)  # nothing is awaited behind this: who is cancelled has opened nothing
        live = self._live[response_id] = Live(claim, flushed_at=asyncio.get_running_loop().time())
        started, self._started = self._started, asyncio.Event()
        started.set()
        return live

    def close(self, response_id: str, live: Live) -> None:
        if self._live.get(response_id) is live:
            del self._live[response_id]
        live.end()

    async def flush_when_due(self, response_id: str, live: Live) -> None:
        """Raises: ClaimLost, when the response was cancelled, deleted, or taken over by another server."""
        now = asyncio.get_running_loop().time()
        if now - live.flushed_at < _FLUSH_S and len(live.made) - live.written < _FLUSH_EVENTS:
            return
        live.flushed_at = now
        upto = len(live.made)

        def flush() -> Transaction[None]:
            yield from self._work.check(live.claim)
            yield from self.writing(response_id, live, upto)

        await self._database.run(flush)
        live.written = upto

    def writing(self, response_id: str, live: Live, upto: int) -> Transaction[None]:
        """What is not in the database yet, as a part of the transaction that ends the response."""
        first = live.written
        if upto > first:
            yield _ADD(
                response=response_id,
                first=first,
                last=upto - 1,
                body=msgspec.msgpack.encode(live.made[first:upto]),
                at_ms=time.time_ns() // 1_000_000,
            )

    async def read(self, response_id: str, *, after: int) -> AsyncGenerator[bytes, None]:
        """Events with numbers above `after`, until the response is over or gone."""
        number = after + 1
        while True:
            started = self._started
            live = self._live.get(response_id)
            if live is not None:
                news = live.news
                while number < len(live.made):
                    yield live.made[number]
                    number += 1
                if not live.over:
                    await news.wait()
                continue
            running = await self._running(response_id)  # looked at first: what is written before it ends is read below
            async for event in self._written(response_id, number):
                yield event
                number += 1
            if not running and response_id not in self._live:
                return
            if running:
                await _first_of(started, _POLL_S)

    async def prune(self, *, kept_s: float = KEPT_S) -> None:
        """Takes away events that nobody will come back for: all of a response that has been over for so long, and never
        a part of them. The numbers count from the first."""
        before_ms = time.time_ns() // 1_000_000 - int(kept_s * 1000)

        def remove() -> Transaction[None]:
            yield _PRUNE(before_ms=before_ms)

        await self._database.run(remove)

    async def any(self, response_id: str) -> bool:
        """Whether a reader would find the beginning."""
        if response_id in self._live:
            return True
        rows = await self._database.read(_BATCHES(response=response_id, number=0, most=1))
        return bool(rows) and rows[0]["first"] == 0

    async def _running(self, response_id: str) -> bool:
        rows = await self._database.read(_STATUS(response=response_id))
        return bool(rows) and rows[0]["status"] in ("queued", "in_progress")

    async def _written(self, response_id: str, number: int) -> AsyncGenerator[bytes, None]:
        while rows := await self._database.read(_BATCHES(response=response_id, number=number, most=_ROWS_AT_ONCE)):
            for row in rows:
                if row["first"] > number:  # those before are gone: what follows would take their numbers
                    return
                batch = msgspec.msgpack.decode(row["body"], type=list[bytes])
                for event in batch[max(0, number - row["first"]) :]:
                    yield event
                number = max(number, row["last"] + 1)


async def _first_of(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


def _pruning(_: Dialect) -> Executable:
    """All events of a response that is over, when the newest of them is too old."""
    before, later = bindparam("before_ms", type_=BigInteger), events.alias()
    of_it = select(later.c.at_ms).where(later.c.response == events.c.response)
    newest_ms = of_it.order_by(later.c.first.desc()).limit(1).scalar_subquery()
    running = or_(responses.c.status == "queued", responses.c.status == "in_progress")
    over = not_(exists().where(responses.c.id == events.c.response, running))
    return delete(events).where(events.c.at_ms < before, newest_ms < before, over)


_RESPONSE = bindparam("response", type_=Text)
_ADD = insert(events)
_REMOVE = Statement(delete(events).where(events.c.response == _RESPONSE))
_PRUNE = Statement(_pruning)
_BATCHES = Statement(
    select(events.c.first, events.c.last, events.c.body)
    .where(events.c.response == _RESPONSE, events.c.last >= bindparam("number", type_=Integer))
    .order_by(events.c.first)
    .limit(bindparam("most", type_=Integer))
)
_STATUS = Statement(select(responses.c.status).where(responses.c.id == _RESPONSE))

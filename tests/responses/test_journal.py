"""Events of background responses that another server reads: each once, however long the answer takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import BigInteger, bindparam, delete, update

from nimbos.blobs.folder import FolderBlobs
from nimbos.db import Bound, Database, Statement, Transaction
from nimbos.db.tables.responses import response_events as events
from nimbos.responses import Answered, Live, Past, Store, journal
from nimbos.responses.journal import Journal
from nimbos.responses.store import finished
from nimbos.types import new_id
from nimbos.work import Work
from tests.live import PATIENCE_S

ME = "proj_me"
DAY_MS = 86_400_000
_BACKDATE = Statement(update(events).values(at_ms=bindparam("written_ms", type_=BigInteger)))
_LOSE_FIRST = Statement(delete(events).where(events.c.first == 0))


@dataclass(slots=True, kw_only=True)
class Answering:
    """An answer that one server makes and another one reads."""

    database: Database
    here: Journal
    there: Journal
    id: str
    live: Live

    async def say(self, *said: bytes) -> None:
        for one in said:
            self.live.add(one)
        await self.here.flush_when_due(self.id, self.live)

    async def age(self, days: int) -> None:
        """Of all that was said."""
        await self.database.run(lambda: _ran(_BACKDATE(written_ms=time.time_ns() // 1_000_000 - days * DAY_MS)))

    async def end(self) -> None:
        await self.database.run(lambda: finished(self.id, "completed", b"{}", None, 0))
        self.here.close(self.id, self.live)


def _ran(statement: Bound) -> Transaction[None]:
    yield statement


@pytest.fixture
async def answering(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answering:
    monkeypatch.setattr(journal, "_FLUSH_S", 0.0)
    store, work = Store(database, FolderBlobs(tmp_path / "blobs")), Work(database)
    begun = Answered(
        id=new_id("resp"),
        account=ME,
        status="queued",
        past=Past(),
        asked=(),
        output=(),
        echo=b"{}",
        body=b"{}",
        background=True,
    )
    await store.keep(begun)
    await database.run(lambda: work.add("response", begun.id))
    (claim,) = await database.run(lambda: work.claim("response", "srv_here", 1))
    here, there = Journal(database, work), Journal(database, work)
    return Answering(database=database, here=here, there=there, id=begun.id, live=await here.open(begun.id, claim))


async def next_of(reading: AsyncGenerator[bytes, None], count: int) -> list[bytes]:
    async with asyncio.timeout(PATIENCE_S):
        return [await anext(reading) for _ in range(count)]


async def test_an_answer_of_more_than_a_day_is_read_whole_and_each_event_once(answering: Answering) -> None:
    await answering.say(b"0", b"1", b"2")
    await answering.age(2)
    await answering.say(b"3", b"4")
    await answering.here.prune()
    async with aclosing(answering.there.read(answering.id, after=-1)) as reading:
        assert await next_of(reading, 5) == [b"0", b"1", b"2", b"3", b"4"]
        await answering.say(b"5")
        await answering.age(2)
        await answering.there.prune()
        assert await next_of(reading, 1) == [b"5"]
        await answering.end()
        assert [event async for event in reading] == []


async def test_events_go_a_day_after_the_last_and_all_at_once(answering: Answering) -> None:
    await answering.say(b"0")
    await answering.age(2)
    await answering.say(b"1")
    await answering.end()
    await answering.there.prune()
    assert [event async for event in answering.there.read(answering.id, after=-1)] == [b"0", b"1"]
    await answering.age(2)
    await answering.there.prune()
    assert not await answering.there.any(answering.id)
    assert [event async for event in answering.there.read(answering.id, after=-1)] == []


async def test_events_whose_beginning_is_gone_are_not_told_under_its_numbers(answering: Answering) -> None:
    await answering.say(b"0", b"1", b"2")
    await answering.say(b"3", b"4")
    await answering.database.run(lambda: _ran(_LOSE_FIRST()))
    await answering.end()
    assert [event async for event in answering.there.read(answering.id, after=0)] == []
    assert [event async for event in answering.there.read(answering.id, after=3)] == [b"4"]

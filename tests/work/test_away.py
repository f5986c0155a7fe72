"""While nobody reaches the storage leases run out, and nobody died of it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from sqlalchemy import select, update

from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.work import work as work_table
from nimbos.work import Claim, Crew, Work
from nimbos.work import crew as crews
from tests.away import Door, away, impatient

PATIENCE_S = 60
LEASE_S = 0.9
_ROWS = Statement(select(work_table.c.free_at_ms, work_table.c.lapses, work_table.c.owner))
_LAPSE = Statement(update(work_table).values(free_at_ms=0))


async def until_lapsed(database: Database) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while any(row["free_at_ms"] > time.monotonic_ns() // 1_000_000 for row in await database.read(_ROWS())):
            await asyncio.sleep(0.01)  # time passes, and rings no bell


class Told(Work):
    """`reached` is set whenever a crew has reached the storage."""

    def __init__(self, database: Database, *, lease_s: float) -> None:
        super().__init__(database, lease_s=lease_s)
        self.reached = asyncio.Event()

    def claim(self, kind: str, owner: str, n: int) -> Transaction[list[Claim]]:
        claims = yield from super().claim(kind, owner, n)
        self.reached.set()
        return claims

    def renew(self, owner: str) -> Transaction[frozenset[tuple[str, str, int]]]:
        held = yield from super().renew(owner)
        self.reached.set()
        return held


def crew_of(database: Database, work: Work, run: object, *, owner: str = "crew") -> Crew:
    return Crew(
        database,
        work,
        places=1,
        claim=lambda n: work.claim("lines", owner, n),
        run=run,  # type: ignore[arg-type]
        owner=owner,
        poll_s=0.01,
    )


async def test_who_was_away_leaves_others_the_time_to_renew_what_they_hold(tmp_path: Path) -> None:
    async with impatient(tmp_path) as database:
        work = Told(database, lease_s=1.5)
        claimed = asyncio.Event()

        async def run(claim: Claim) -> None:
            assert claim.ref == "new"
            await database.run(lambda: work.finish(claim))
            claimed.set()

        await database.run(lambda: work.add("lines", "held"))
        (held,) = await database.run(lambda: work.claim("lines", "another server", 1))
        crew = crew_of(database, work, run)
        crew.start()
        with away(tmp_path):
            await until_lapsed(database)
            work.reached.clear()
        async with asyncio.timeout(PATIENCE_S):
            await work.reached.wait()
        assert await database.run(lambda: work.renew("another server")) == {("lines", "held", held.epoch)}
        await database.run(lambda: work.add("lines", "new"))
        async with asyncio.timeout(PATIENCE_S):
            await claimed.wait()
        await database.run(lambda: work.finish(held))
        await crew.close()


async def test_a_run_that_fails_while_the_storage_is_away_is_handed_back_and_did_not_lapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "RETRY_S", 0.0)
    monkeypatch.setattr(crews, "AWAY_S", 0.01)
    async with impatient(tmp_path) as database:
        work = Work(database, lease_s=LEASE_S)
        begun, fails, over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        seen: list[tuple[int, int]] = []

        async def run(claim: Claim) -> None:
            seen.append((claim.epoch, claim.lapses))
            if len(seen) > 1:
                await database.run(lambda: work.finish(claim))
                over.set()
                return
            begun.set()
            await fails.wait()
            await database.run(lambda: work.keep(claim, lambda: b"more"))

        await database.run(lambda: work.add("lines", "a"))
        crew = crew_of(database, work, run)
        crew.start()
        async with asyncio.timeout(PATIENCE_S):
            await begun.wait()
            with away(tmp_path):
                fails.set()
                await until_lapsed(database)
            await over.wait()
        await crew.close()
        assert seen == [(1, 0), (2, 0)]


async def test_a_crew_closes_although_the_storage_is_away(tmp_path: Path) -> None:
    async with impatient(tmp_path) as database:
        work = Work(database)
        begun = asyncio.Event()

        async def run(_: Claim) -> None:
            begun.set()
            await asyncio.Event().wait()

        await database.run(lambda: work.add("lines", "a"))
        crew = crew_of(database, work, run)
        crew.start()
        async with asyncio.timeout(PATIENCE_S):
            await begun.wait()
            with away(tmp_path):
                await crew.close()
        (row,) = await database.read(_ROWS())
        assert row["owner"] == "crew", "nobody could write that it was handed back"


# --- storage that stands still: it refuses nothing, and answers late


class Clock:
    """A crew's time, which passes as the test says; stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(crews, "time", clock)
    return clock


class Still:
    """A crew behind a door, while another server that lives holds "held"; of its renewals nothing is heard either."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database, self.clock = database, clock
        self.door = Door(database)
        self.work, self.others = Work(database, lease_s=LEASE_S), Work(database, lease_s=3600)
        self.begun, self.ends = asyncio.Event(), asyncio.Event()
        self.ran: list[str] = []
        self.crew = crew_of(self.door, self.work, self._run)

    async def __aenter__(self) -> Still:
        await self.database.run(lambda: self.others.add("lines", "held"))
        assert await self.database.run(lambda: self.others.claim("lines", "another server", 1))
        self.crew.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.door.open_wide()
        await self.crew.close()

    async def last(self) -> None:
        """Until all leases have run out."""

        def lapse() -> Transaction[None]:
            yield _LAPSE()

        await self.database.run(lapse)
        self.clock.now += LEASE_S

    async def one_passes(self) -> None:
        await (await self.door.standing.get()).done()

    async def check_and_go_on(self) -> None:
        """The other one's work is still its own, and the crew leaves it the time to renew what it holds."""
        rows = await self.database.read(_ROWS())
        assert [(row["owner"], row["lapses"]) for row in rows] == [("another server", 0)]
        back = self.clock.now
        while self.door.standing.empty():
            self.clock.now += 0.01
            await asyncio.sleep(0.01)  # the crew looks about as often
        assert self.clock.now - back >= LEASE_S / 3
        assert await self.database.run(lambda: self.others.renew("another server")) == {("lines", "held", 1)}
        await self.database.run(lambda: self.others.add("lines", "new"))
        self.ran, self.begun = [], asyncio.Event()
        self.ends.set()
        self.door.open_wide()
        await self.begun.wait()
        assert self.ran == ["new"]

    async def _run(self, claim: Claim) -> None:
        self.ran.append(claim.ref)
        self.begun.set()
        await self.ends.wait()
        await self.database.run(lambda: self.work.finish(claim))


async def test_a_claim_that_stood_still_on_its_way_takes_nothing_from_who_lives(
    database: Database, clock: Clock
) -> None:
    async with Still(database, clock) as still, asyncio.timeout(PATIENCE_S):
        asked = await still.door.standing.get()
        await still.last()
        await asked.done()
        await still.one_passes()
        await still.check_and_go_on()


async def test_whoever_heard_late_that_there_is_nothing_claims_nothing_at_once(
    database: Database, clock: Clock
) -> None:
    async with Still(database, clock) as still, asyncio.timeout(PATIENCE_S):
        answered = await still.door.standing.get()
        await answered.done(told=False)
        await still.last()
        await answered.done()
        await still.one_passes()
        await still.check_and_go_on()


async def test_a_crew_whose_renewal_stands_still_claims_nothing_when_a_place_gets_free(
    database: Database, clock: Clock
) -> None:
    async with Still(database, clock) as still, asyncio.timeout(PATIENCE_S):
        await still.database.run(lambda: still.work.add("lines", "own"))
        await still.one_passes()
        await still.begun.wait()
        renewal = await still.door.standing.get()
        await still.last()
        still.ends.set()  # and the way is open again
        await still.one_passes()
        await renewal.done()
        await still.check_and_go_on()

"""While nobody reaches the storage leases run out, and nobody died of it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.work import work as work_table
from nimbos.work import Claim, Crew, Work
from nimbos.work import crew as crews
from tests.away import away, impatient

PATIENCE_S = 60
LEASE_S = 0.9
_ROWS = Statement(select(work_table.c.free_at_ms, work_table.c.lapses, work_table.c.owner))


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

"""Projects share the places in which processes run: whoever has many ready keeps nobody else waiting behind them."""

from __future__ import annotations

import asyncio

from nimbos.accounts.projects import create_project
from nimbos.config import Settings
from nimbos.db import Database, Transaction
from nimbos.kernel import Reason
from nimbos.kernel.holding import Holding
from nimbos.types import Account
from tests.kernel.running import ACCOUNT, FILES, OTHER, PATIENCE_S, Place, running

PLACES = 4


class Busy:
    """Processes that keep their places until they are let go, one by one."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self._more = asyncio.Event()
        self._go = asyncio.Semaphore(0)

    async def __call__(self, holding: Holding) -> None:
        self.began.append(holding.account.id)
        self._more.set()
        await self._go.acquire()
        await holding.exit(Reason.OK)

    def let_one_go(self) -> None:
        self._go.release()

    async def until(self, count: int) -> list[str]:
        """So many have begun, and no more can, as no place is left."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.began) < count:
                self._more.clear()
                await self._more.wait()
        assert len(self.began) == count
        return self.began


async def spawn(place: Place, account: Account, count: int) -> None:
    await place.kernel.programs.put(account, FILES)
    for _ in range(count):
        await place.kernel.spawn(account, "plain", "")


async def test_the_next_place_is_for_the_project_that_has_fewest(
    database: Database, database_settings: Settings
) -> None:
    busy = Busy()
    async with running(database, database_settings, {"plain": busy}, start=False) as place:
        place.kernel._places = PLACES
        await spawn(place, ACCOUNT, 10)
        await place.kernel.start(place.drive)
        assert await busy.until(PLACES) == [ACCOUNT.id] * PLACES, "nobody else wants one"
        await spawn(place, OTHER, 3)
        for count in range(1, 4):
            busy.let_one_go()
            began = await busy.until(PLACES + count)
        # One that ends leaves 3 and 0, then 2 and 1, then 1 and 2.
        assert began[PLACES:] == [OTHER.id, OTHER.id, ACCOUNT.id]
        for count in range(4, 10):
            busy.let_one_go()
            began = await busy.until(PLACES + count)
        assert began.count(OTHER.id) == 3


async def test_places_are_shared_from_the_start(database: Database, database_settings: Settings) -> None:
    busy = Busy()
    async with running(database, database_settings, {"plain": busy}, start=False) as place:
        place.kernel._places = PLACES
        await spawn(place, ACCOUNT, 10)
        await spawn(place, OTHER, 10)
        await place.kernel.start(place.drive)
        began = await busy.until(PLACES)
        assert (began.count(ACCOUNT.id), began.count(OTHER.id)) == (2, 2)


async def test_a_project_of_twice_the_weight_has_twice_the_places(
    database: Database, database_settings: Settings
) -> None:
    busy = Busy()
    for account, weight in ((ACCOUNT, 1.0), (OTHER, 2.0)):

        def make(account: Account = account, weight: float = weight) -> Transaction[object]:
            return create_project(account.name, weight=weight, project_id=account.id)

        await database.run(make)
    async with running(database, database_settings, {"plain": busy}, start=False) as place:
        place.kernel._places = 6
        await spawn(place, ACCOUNT, 10)
        await spawn(place, OTHER, 10)
        await place.kernel.start(place.drive)
        began = await busy.until(6)
        assert (began.count(ACCOUNT.id), began.count(OTHER.id)) == (2, 4)


async def test_only_queues_with_free_work_are_looked_into(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, start=False) as place:
        work = place.kernel.work
        for kind, ref in (("a", "1"), ("b:one", "1"), ("b:one", "2"), ("b:two", "1"), ("b", "1"), ("c", "1")):
            await database.run(lambda kind=kind, ref=ref: work.add(kind, ref))  # type: ignore[misc]
        await database.run(lambda: work.add("b:late", "1", delay_s=3_600))
        assert await database.run(lambda: work.queues("b:")) == ["b:one", "b:two"]
        assert len(await database.run(lambda: work.claim("b:two", "me", 5))) == 1
        assert await database.run(lambda: work.queues("b:")) == ["b:one"]
        assert await database.run(lambda: work.queues("d")) == []


async def test_the_queue_that_waits_longest_is_first(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, start=False) as place:
        work = place.kernel.work
        for kind, ago_s in (("q:a", 1.0), ("q:z", 9.0), ("q:m", 5.0)):
            await database.run(lambda kind=kind, ago_s=ago_s: work.add(kind, "1", delay_s=-ago_s))  # type: ignore[misc]
        assert await database.run(lambda: work.queues("q:")) == ["q:z", "q:m", "q:a"]

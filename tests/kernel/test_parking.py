"""Parking costs nothing: no task, no thread, no place of the crew, no statement of the database."""

from __future__ import annotations

import asyncio
import gc
import threading
from functools import partial

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason, SignalKind, State
from nimbos.kernel.holding import Holding
from nimbos.kernel.mailbox import queue_of
from tests.kernel.running import ACCOUNT, PATIENCE_S, Place, running

OWN_TASKS_MAX = 20  # of the test, the crew, timers, mail
OWN_THREADS_MAX = 20  # the database's, and the loop's pool


@pytest.mark.parametrize("database_settings", ["sqlite"], indirect=True)
@pytest.mark.parametrize("many", [200, pytest.param(2_000, marks=pytest.mark.long)])
async def test_parked_processes_hold_nothing_however_many_and_wake(
    database: Database, database_settings: Settings, many: int
) -> None:
    parked, over = asyncio.Event(), asyncio.Event()
    counts = {"parked": 0, "over": 0}
    threads = threading.active_count()  # of tests before this one

    async def ask(holding: Holding) -> None:
        await holding.take_mail()
        if holding.view.signals:
            counts["over"] += 1
            if counts["over"] == many:
                over.set()
            await holding.exit(Reason.OK)
        counts["parked"] += 1
        if counts["parked"] == many:
            parked.set()
        await holding.park(*STATES[counts["parked"] % 2])

    async with running(database, database_settings, {"plain": ask}) as place:
        pids = await asyncio.gather(*(place.spawn() for _ in range(many)))
        await parked.wait()
        for pid in pids:
            await place.when(pid, partial(rests, place, pid))
        crew = place.kernel._crew
        assert crew is not None
        async with asyncio.timeout(PATIENCE_S):
            while crew.holding(queue_of(ACCOUNT.id)):
                await asyncio.sleep(0)
        assert not [task for task in asyncio.all_tasks() if " proc_" in task.get_name()]
        assert len(asyncio.all_tasks()) < OWN_TASKS_MAX
        assert threading.active_count() - threads < OWN_THREADS_MAX
        assert place.kernel.bells.running == ()
        gc.collect()
        assert not [one for one in gc.get_objects() if isinstance(one, Holding)]
        await asyncio.gather(*(place.send(pid, SignalKind.MESSAGE, body="wake") for pid in pids))
        await over.wait()
        assert {head.state for head in [await place.over(pid) for pid in pids]} == {State.DONE}


STATES = ((State.WAITING, Reason.SIGNAL), (State.ASKING, Reason.INPUT))


async def rests(place: Place, pid: str) -> bool:
    return (await place.head(pid)).state in (State.WAITING, State.ASKING)


async def test_a_server_with_nothing_but_parked_processes_asks_the_database_for_work_alone(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(holding: Holding) -> None:
        await holding.park(State.ASKING, Reason.INPUT)

    async with running(database, database_settings, {"plain": ask}) as place:
        pids = [await place.spawn() for _ in range(5)]
        for pid in pids:
            await place.until(pid, State.ASKING)
        reads: list[str] = []
        plain_read = database.read

        async def counted(query: object) -> object:
            reads.append(str(query))
            return await plain_read(query)  # type: ignore[arg-type]

        monkeypatch.setattr(database, "read", counted)
        claimed = asyncio.Event()
        plain_queues = place.kernel.work.queues

        def queues(prefix: str) -> object:
            claimed.set()
            return plain_queues(prefix)

        monkeypatch.setattr(place.kernel.work, "queues", queues)
        await claimed.wait()  # the crew has polled: whoever else polls as often would have, too
        claimed.clear()
        await claimed.wait()
        assert reads == []

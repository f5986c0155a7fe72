"""One writer for each process: other servers, servers that were stopped and wake up late, servers that died."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import bindparam, update

from nimbos.config import Settings
from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.work import work
from nimbos.kernel import Event, Reason, SignalKind, State, release_dead
from nimbos.kernel.events import Note
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft, Fenced, Holder
from nimbos.kernel.mailbox import queue_of
from nimbos.kernel.recovery import crew_name
from nimbos.ledger import Ledger, Recovery
from nimbos.meterfile import MeterFile
from nimbos.work import Work
from tests.kernel.running import ACCOUNT, Body, Place, running

PATIENCE_S = 60
_LAPSE = Statement(update(work).where(work.c.ref == bindparam("pid")).values(free_at_ms=0))
SAID = Draft(body=Note(about="said", text="a word"))


async def answer(holding: Holding) -> None:
    await holding.append(SAID)
    await holding.exit(Reason.OK)


async def told_elsewhere(place: Place, pid: str, state: State) -> None:
    """Another server runs it, which rings no bell here; its end is found by the follower's poll."""
    async with asyncio.timeout(PATIENCE_S):
        async with aclosing(place.kernel.follow(ACCOUNT, pid)) as followed:
            async for _ in followed:
                pass
    assert (await place.head(pid)).state is state


async def test_two_servers_share_the_work_and_drive_nothing_twice(
    database: Database, database_settings: Settings
) -> None:
    driven: dict[str, list[str]] = {}

    def driver(name: str) -> Body:
        async def drive(holding: Holding) -> None:
            driven.setdefault(holding.pid, []).append(name)
            await answer(holding)

        return drive

    async with (
        running(database, database_settings, {"plain": driver("one")}, server="meter-one") as one,
        running(database, database_settings, {"plain": driver("two")}, server="meter-two") as two,
    ):
        pids = await asyncio.gather(*(place.spawn() for place in (one, two) * 20))
        for pid in pids:
            await told_elsewhere(one, pid, State.DONE)
        assert {len(drivers) for drivers in driven.values()} == {1}
        for pid in pids:
            assert (await one.kinds(pid)).count("note") == 1
            assert (await one.kernel.log.verify(pid)).broken_at is None


async def test_a_signal_from_another_server_reaches_a_process_in_the_middle_of_work(
    database: Database, database_settings: Settings
) -> None:
    begun = asyncio.Event()

    async def work(holding: Holding) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with (
        running(database, database_settings, {"plain": work}, server="meter-one") as one,
        running(database, database_settings, server="meter-two", start=False) as two,
    ):
        pid = await one.spawn()
        await begun.wait()
        await two.send(pid, SignalKind.KILL)
        assert (await one.over(pid)).reason is Reason.KILLED


async def test_whoever_held_it_before_writes_nothing_any_more(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, start=False, lease_s=0) as place:
        pid, kernel = await place.spawn(), place.kernel
        (first,) = await database.run(lambda: kernel.work.claim(queue_of(ACCOUNT.id), "one", 1))
        (second,) = await database.run(lambda: kernel.work.claim(queue_of(ACCOUNT.id), "two", 1))
        for claim, epoch in ((first, 0), (second, 7)):
            with pytest.raises(Fenced):
                await database.run(appending(place, Holder(pid=pid, claim=claim, epoch=epoch)))
        assert await place.kinds(pid) == ["proc.created"]
        await database.run(appending(place, Holder(pid=pid, claim=second, epoch=0)))
        with pytest.raises(Fenced):
            await database.run(appending(place, Holder(pid=pid, claim=first, epoch=0)))


def appending(place: Place, holder: Holder) -> Callable[[], Transaction[list[Event]]]:
    return lambda: place.kernel.log.append(holder.pid, [SAID], holder=holder)


async def test_a_run_whose_claim_was_taken_ends_and_the_other_goes_on(
    database: Database, database_settings: Settings
) -> None:
    lost, begun = asyncio.Event(), asyncio.Event()

    async def work(holding: Holding) -> None:
        if holding.holder.epoch > 1:
            await answer(holding)
        begun.set()
        await lost.wait()
        await holding.append(SAID)
        raise AssertionError("a lost holder wrote")

    async with running(database, database_settings, {"plain": work}) as place:
        pid = await place.spawn()
        await begun.wait()
        await database.run(lambda: place.kernel.work.release_all(crew_name("meter-one")))
        lost.set()
        head = await place.over(pid)
        assert (head.reason, head.epoch) == (Reason.OK, 2)
        assert (await place.kinds(pid)).count("note") == 1


async def test_a_server_that_closes_hands_back_and_the_next_goes_on(
    database: Database, database_settings: Settings
) -> None:
    begun = asyncio.Event()

    async def work(holding: Holding) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with running(database, database_settings, {"plain": work}) as place:
        pid = await place.spawn()
        await begun.wait()
    async with running(database, database_settings, {"plain": answer}, server="meter-two", start=False) as place:
        assert (await place.head(pid)).state is State.READY
        await place.kernel.start(place.drive)
        assert (await place.over(pid)).epoch == 2


@asynccontextmanager
async def server(settings: Settings, *, lease_s: float) -> AsyncIterator[Process]:
    words = (settings.home, settings.storage.database_url, str(lease_s))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.kernel.a_server", *words, stdout=PIPE, cwd=Path(__file__).parent.parent.parent
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def heard(process: Process, word: str) -> str:
    """What follows the word in the next line that begins with it."""
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        async for line in process.stdout:
            first, _, rest = line.decode().strip().partition(" ")
            if first == word:
                return rest
    raise AssertionError(f"the server ended before it said {word!r}")


def lapse(pid: str) -> Transaction[None]:
    """As if its lease had run out."""
    yield _LAPSE(pid=pid)


async def test_a_server_that_was_stopped_past_its_lease_is_fenced_when_it_wakes(
    database: Database, database_settings: Settings
) -> None:
    async with running(database, database_settings, {"plain": answer}, start=False) as place:
        pid = await place.spawn()
        async with server(database_settings, lease_s=3600) as stopped:
            assert await heard(stopped, "driving") == "1"  # and then it stands still
            await database.run(lambda: lapse(pid))
            await place.kernel.start(place.drive)
            head = await place.over(pid)
            assert (head.reason, head.epoch) == (Reason.OK, 2)
            os.kill(stopped.pid, signal.SIGCONT)
            assert await heard(stopped, "Fenced") == ""
        events = await place.kernel.events(ACCOUNT, pid)
        assert [event.epoch for event in events] == sorted(event.epoch for event in events)
        assert [event.kind for event in events].count("note") == 2
        assert (await place.kernel.log.verify(pid)).broken_at is None


async def test_what_a_killed_server_held_is_free_at_once_for_the_next_of_its_home(
    database: Database, database_settings: Settings
) -> None:
    home = Path(database_settings.home)
    async with running(database, database_settings, {"plain": answer}, server="meter-me", start=False) as place:
        pid = await place.spawn()
        meter_file = MeterFile.create(home / "run")
        recovery = Recovery(database=database, ledger=Ledger(server_id=meter_file.path.stem), run_dir=home / "run")
        async with server(database_settings, lease_s=3600) as killed:
            name = await heard(killed, "serving")
            assert await heard(killed, "driving") == "1"
            await release_dead(database, await recovery.dead())
            assert (
                await database.run(lambda: Work(database).claim(queue_of(ACCOUNT.id), "other", 1)) == []
            )  # it stands still, and lives
            killed.kill()
            await killed.wait()
        assert await recovery.dead() == [name]
        await release_dead(database, await recovery.dead())
        await place.kernel.start(place.drive)
        assert (await place.over(pid)).epoch == 2
        meter_file.close()

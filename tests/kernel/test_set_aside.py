"""A process that its servers die of: it is set aside, and what ran beside it is not."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import aclosing
from pathlib import Path

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import NotReady, StorageUnavailable
from nimbos.kernel import Event, Reason, SignalKind, State, runner
from nimbos.kernel.chain import decoded
from nimbos.kernel.events import CallDone, Note
from nimbos.kernel.fold import fold
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.recovery import crew_name
from nimbos.kernel.view import View
from nimbos.kernel.words import Effect
from nimbos.work import Claim
from nimbos.work import crew as crews
from tests.away import away, impatient
from tests.kernel.gating import on_sqlite
from tests.kernel.running import ACCOUNT, PATIENCE_S, Place, begin_call, running
from tests.work.test_away import until_lapsed

DEATHS = 2
SAID = Draft(body=Note(about="said", text="a word"))


@on_sqlite
async def test_a_process_that_kills_each_server_is_set_aside(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, start=False) as place:
        pid = await place.spawn()
        for _ in range(DEATHS):
            assert await (await doomed(database_settings)).wait() == -signal.SIGKILL
        survivor = await doomed(database_settings)
        try:
            async with asyncio.timeout(PATIENCE_S), aclosing(place.kernel.follow(ACCOUNT, pid)) as followed:
                async for told in followed:
                    body = decoded(told) if isinstance(told, Event) else None
                    if isinstance(body, Note) and body.about == "recovered":
                        break
            head = await place.head(pid)
            assert (head.state, head.reason) == (State.PAUSED, Reason.POLICY)
            assert survivor.returncode is None
        finally:
            survivor.kill()
            await survivor.wait()


async def doomed(settings: Settings) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.kernel.a_doomed_server", settings.home, str(DEATHS)),
        cwd=Path(__file__).parent.parent.parent,
    )


class Mortal:
    """What a process does whose servers die, as far as it can tell: somebody else has it, and its next write fails.
    `useful`: something comes of each run."""

    def __init__(self, *, useful: bool) -> None:
        self.begun, self.lost = asyncio.Event(), asyncio.Event()
        self.useful = useful
        self.immortal = False

    async def __call__(self, holding: Holding) -> None:
        await holding.append(SAID)
        if self.useful:
            call_id = f"c{holding.holder.epoch}"
            await begin_call(holding, call_id, Effect.PURE)
            done = CallDone(call_id=call_id, result=await holding.put("done"), size_bytes=4)
            await holding.append(Draft(body=done, call_id=call_id))
        if self.immortal:
            await holding.exit(Reason.OK)
        self.begun.set()
        await self.lost.wait()
        self.lost.clear()
        await holding.append(SAID)
        raise AssertionError("a lost holder wrote")

    async def die(self, place: Place) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.begun.wait()
        self.begun.clear()
        await place.database.run(lambda: place.kernel.work.lapse_all(crew_name("meter-one")))
        self.lost.set()
        place.kernel.bells.work()


async def test_a_process_that_was_set_aside_tries_again_when_it_is_resumed(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SPREAD_FROM", runner.DEATHS_MAX)
    mortal = Mortal(useful=False)
    async with running(database, database_settings, {"plain": mortal}) as place:
        pid = await place.spawn()
        for _ in range(runner.DEATHS_MAX):
            assert (await place.head(pid)).state is not State.PAUSED
            await mortal.die(place)
        await place.until(pid, State.PAUSED, reason="policy")
        mortal.immortal = True
        await place.send(pid, SignalKind.RESUME)
        assert (await place.over(pid)).reason is Reason.OK


async def test_a_process_of_which_something_comes_is_not_set_aside_whatever_its_servers_die_of(
    database: Database, database_settings: Settings
) -> None:
    mortal = Mortal(useful=True)
    async with running(database, database_settings, {"plain": mortal}) as place:
        pid = await place.spawn()
        for _ in range(runner.DEATHS_MAX + 2):
            await mortal.die(place)
        mortal.immortal = True
        assert (await place.over(pid)).reason is Reason.OK
        assert "note" in await place.kinds(pid)
        notes = [decoded(event) for event in await place.kernel.events(ACCOUNT, pid) if event.kind == "note"]
        assert {note.about for note in notes if isinstance(note, Note)} == {"said"}


async def test_storage_that_is_away_again_and_again_is_no_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time for longer than a lease, so that it runs out."""
    monkeypatch.setattr(runner, "DEATHS_MAX", 1)
    monkeypatch.setattr(crews, "RETRY_S", 0.0)
    monkeypatch.setattr(crews, "AWAY_S", 0.01)
    begun, fails, failed = asyncio.Event(), asyncio.Event(), asyncio.Event()
    ends = False

    async def body(holding: Holding) -> None:
        begun.set()
        await fails.wait()
        if ends:
            await holding.exit(Reason.OK)
        try:
            await holding.append(SAID)
        except StorageUnavailable:
            failed.set()
            raise

    async with (
        impatient(tmp_path) as database,
        running(database, Settings(home=str(tmp_path)), {"plain": body}, lease_s=1.5) as place,
    ):
        pid = await place.spawn()
        for _ in range(runner.DEATHS_MAX + 1):
            async with asyncio.timeout(PATIENCE_S):
                await begun.wait()
                begun.clear()
                with away(tmp_path):
                    fails.set()
                    await failed.wait()
                    failed.clear()
                    await until_lapsed(database)
                    fails.clear()
        async with asyncio.timeout(PATIENCE_S):
            await begun.wait()
        ends = True
        fails.set()
        assert (await place.over(pid)).reason is Reason.OK
        view = fold([event async for event in place.kernel.log.all(pid)])
        assert (view.deaths, "note" in await place.kinds(pid)) == (0, False)


async def test_what_is_not_ready_yet_is_no_death(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crews, "RETRY_S", 0.0)
    deaths: list[int] = []

    async def body(holding: Holding) -> None:
        deaths.append(holding.view.deaths)
        if len(deaths) > runner.DEATHS_MAX:
            await holding.exit(Reason.OK)
        raise NotReady("The model is still read.")

    async with running(database, database_settings, {"plain": body}) as place:
        assert (await place.over(await place.spawn())).reason is Reason.OK
    assert set(deaths) == {0}


def claim(ref: str, *, lapses: int, epoch: int = 7) -> Claim:
    return Claim(kind="process", ref=ref, payload=b"", owner="me", epoch=epoch, lapses=lapses)


def test_those_that_may_be_to_blame_begin_at_different_moments() -> None:
    once = View(state=State.RUNNING, deaths=0)
    often = View(state=State.RUNNING, deaths=2)
    assert runner.spread_s(claim("a", lapses=1), once) == 0
    assert runner.spread_s(claim("a", lapses=0), often) == 0, "its servers were stopped, and did not die"
    assert runner.spread_s(claim("a", lapses=3), View(state=State.READY, deaths=2)) == 0, "nobody ran it"
    last = View(state=State.RUNNING, deaths=runner.DEATHS_MAX - 1)
    assert runner.spread_s(claim("a", lapses=9), last) == 0, "it is set aside at once"
    waits = [runner.spread_s(claim(ref, lapses=3, epoch=epoch), often) for ref in "abc" for epoch in (7, 8)]
    assert len(set(waits)) == len(waits) and all(0 <= wait < 8 for wait in waits)

"""Calls that wait for their turn: nothing of them is begun, so a stop leaves nothing in doubt, and nothing new begins
while one is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason, SignalKind, State, runner
from nimbos.kernel.events import CallStarted
from nimbos.kernel.holding import Holding, Stop
from nimbos.kernel.runner import Runner
from nimbos.kernel.tools import worker
from tests.kernel.minds import Minds, minds
from tests.kernel.running import PATIENCE_S
from tests.kernel.test_durable import SCRIPT, answer, done, start

NAMES = ("Ada", "Bob", "Eve")
MAILS = f"return await gather(*(call('mail', to=name, hold=True) for name in {NAMES}))"
SENT = [f"sent to {name}" for name in NAMES]


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "CALLS_MAX", 1)


async def first_is_sent(place: Minds, pid: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not done(place, pid):
            await asyncio.sleep(0.01)  # another process writes it, and rings no bell


def let_go(place: Minds, pid: str) -> None:
    (place.kernel.workspaces.path(pid) / "go").touch()


async def starts_of(place: Minds, pid: str) -> int:
    return sum(isinstance(body, CallStarted) for body in await place.bodies_of(pid))


async def test_what_waits_for_its_turn_is_begun_anew_after_a_stop(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CALLS_GRACE_S", 0.0)  # as if it were killed
    async with minds(database, database_settings, SCRIPT, server="first") as place:
        pid = await start(place, MAILS)
        await first_is_sent(place, pid)
    async with minds(database, database_settings, SCRIPT, server="second") as place:
        assert await starts_of(place, pid) == 1
        let_go(place, pid)
        assert (await place.until(pid, State.ASKING)).reason is Reason.IN_DOUBT
        await answer(place, pid, {"verdict": "happened", "result": SENT[NAMES.index(done(place, pid)[0][5:])]})
        assert await place.result(pid) == SENT
        assert sorted(done(place, pid)) == [f"mail {name}" for name in NAMES]


async def test_no_call_begins_while_a_server_that_stops_waits_for_one(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_calls_end = Runner._let_calls_end
    async with minds(database, database_settings, SCRIPT, server="first") as place:

        async def and_lets_go(self: Runner, holding: Holding, driving: asyncio.Future[None]) -> None:
            let_go(place, holding.pid)
            await let_calls_end(self, holding, driving)

        monkeypatch.setattr(Runner, "_let_calls_end", and_lets_go)
        pid = await start(place, MAILS)
        await first_is_sent(place, pid)
    async with minds(database, database_settings, SCRIPT, server="second", start=False) as place:
        assert len(done(place, pid)) == 1 and await starts_of(place, pid) == 1
    async with minds(database, database_settings, SCRIPT, server="third") as place:
        assert await place.result(pid) == SENT


@asynccontextmanager
async def pausing(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Minds, str]]:
    """A process that is to pause, knows it, and waits for its first call."""
    must_stop, told = Holding.must_stop, asyncio.Event()

    async def and_tells(self: Holding) -> Stop:
        stop = await must_stop(self)
        if stop is Stop.AFTER_CALLS:
            told.set()
        return stop

    monkeypatch.setattr(Holding, "must_stop", and_tells)
    async with minds(database, settings, SCRIPT) as place:
        pid = await start(place, MAILS)
        await first_is_sent(place, pid)
        await place.send(pid, SignalKind.PAUSE)
        async with asyncio.timeout(PATIENCE_S):
            await told.wait()
        yield place, pid


async def test_no_call_begins_while_a_pause_waits_for_one(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pausing(database, database_settings, monkeypatch) as (place, pid):
        let_go(place, pid)
        await place.until(pid, State.PAUSED)
        assert len(done(place, pid)) == 1 and await starts_of(place, pid) == 1
        await place.send(pid, SignalKind.RESUME)
        assert await place.result(pid) == SENT


async def test_a_pause_that_is_taken_back_while_it_waits_lets_calls_begin_again(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pausing(database, database_settings, monkeypatch) as (place, pid):
        await place.send(pid, SignalKind.RESUME)
        let_go(place, pid)
        assert await place.result(pid) == SENT

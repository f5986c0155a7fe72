"""Timers: they outlive servers, ring once, and do not care who sets the wall clock."""

from __future__ import annotations

import asyncio

from sqlalchemy import bindparam, update

from nimbos.config import Settings
from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.processes import processes
from nimbos.kernel import Reason, SignalKind, State
from nimbos.kernel.holding import Holding
from nimbos.kernel.timers import SteadyClock
from tests.kernel.running import Body, Place, running

HOUR_MS = 3_600_000
_REWRITE = Statement(update(processes).where(processes.c.id == bindparam("of")).values(spawner="nobody knows"))
START_MS = 1_800_000_000_000


class Hands:
    """Both clocks of a machine, moved by hand."""

    def __init__(self) -> None:
        self.wall_ms = START_MS
        self.elapsed_ms = 5_000

    def clock(self) -> SteadyClock:
        return SteadyClock(wall_ms=lambda: self.wall_ms, elapsed_ms=lambda: self.elapsed_ms)

    def pass_ms(self, ms: int) -> None:
        self.wall_ms += ms
        self.elapsed_ms += ms


def sleeper(ms: int) -> Body:
    async def drive(holding: Holding) -> None:
        await holding.take_mail()
        if any(signal.signal is SignalKind.TIMER for signal in holding.view.signals):
            await holding.exit(Reason.OK)
        await holding.park(State.WAITING, Reason.TIMER, due_ms=holding.now_ms() + ms, about=("nap",))

    return drive


def ring(place: Place) -> None:
    """Looks at the clock now, as a poll would."""
    place.kernel._timers._sooner.set()


async def test_a_timer_wakes_a_process_when_its_moment_has_come(
    database: Database, database_settings: Settings
) -> None:
    async with running(database, database_settings, {"plain": sleeper(30)}) as place:
        pid = await place.spawn()
        assert (await place.over(pid)).epoch == 2
        kinds = await place.kinds(pid)
        assert kinds.count("signal.received") == 1


async def test_a_process_that_cannot_be_woken_holds_up_no_other(
    database: Database, database_settings: Settings
) -> None:
    """Its head was written by another version, and cannot be read here."""
    hands = Hands()
    bodies = {"strange": sleeper(HOUR_MS - 1_000), "plain": sleeper(HOUR_MS)}
    async with running(database, database_settings, bodies, clock=hands.clock()) as place:
        strange, plain = await place.spawn("strange"), await place.spawn()
        for pid in (strange, plain):
            await place.until(pid, State.WAITING)
        await database.run(lambda: _rewritten(strange))
        hands.pass_ms(HOUR_MS)
        ring(place)
        assert (await place.over(plain)).reason is Reason.OK


def _rewritten(pid: str) -> Transaction[None]:
    yield _REWRITE(of=pid)


async def test_timers_are_not_rung_early_and_in_their_order(database: Database, database_settings: Settings) -> None:
    hands = Hands()
    bodies = {"soon": sleeper(HOUR_MS), "late": sleeper(2 * HOUR_MS)}
    async with running(database, database_settings, bodies, clock=hands.clock()) as place:
        late, soon = await place.spawn("late"), await place.spawn("soon")
        for pid in (late, soon):
            await place.until(pid, State.WAITING, reason="timer")
        hands.pass_ms(HOUR_MS - 1)
        ring(place)
        hands.pass_ms(1)
        ring(place)
        await place.over(soon)
        assert (await place.head(late)).state is State.WAITING
        hands.pass_ms(HOUR_MS)
        ring(place)
        await place.over(late)


async def test_a_timer_of_a_server_that_is_gone_is_rung_by_the_next(
    database: Database, database_settings: Settings
) -> None:
    hands = Hands()
    bodies = {"plain": sleeper(HOUR_MS)}
    async with running(database, database_settings, bodies, clock=hands.clock()) as place:
        pid = await place.spawn()
        await place.until(pid, State.WAITING)
    hands.pass_ms(HOUR_MS)
    async with running(
        database,
        database_settings,
        bodies,
        clock=hands.clock(),
        server="meter-two",
    ) as place:
        await place.over(pid)


async def test_setting_the_wall_clock_ends_no_wait_and_stretches_none(
    database: Database, database_settings: Settings
) -> None:
    hands = Hands()
    bodies = {"plain": sleeper(HOUR_MS)}
    async with running(database, database_settings, bodies, clock=hands.clock()) as place:
        first = await place.spawn()
        await place.until(first, State.WAITING)
        hands.wall_ms += 10 * HOUR_MS
        ring(place)
        second = await place.spawn()
        await place.until(second, State.WAITING)
        assert (await place.head(first)).state is State.WAITING
        hands.wall_ms -= 30 * HOUR_MS
        hands.pass_ms(HOUR_MS)
        ring(place)
        for pid in (first, second):
            await place.over(pid)


async def test_a_timer_that_is_due_while_its_process_is_paused_is_found_at_the_resume(
    database: Database, database_settings: Settings
) -> None:
    hands = Hands()
    due: list[int] = []

    async def nap(holding: Holding) -> None:
        await holding.take_mail()
        due.append(due[0] if due else holding.now_ms() + HOUR_MS)
        if holding.now_ms() >= due[0]:
            await holding.exit(Reason.OK)
        await holding.park(State.WAITING, Reason.TIMER, due_ms=due[0])

    async with running(database, database_settings, {"plain": nap}, clock=hands.clock()) as place:
        pid = await place.spawn()
        await place.until(pid, State.WAITING)
        await place.send(pid, SignalKind.PAUSE)
        await place.until(pid, State.PAUSED)
        hands.pass_ms(2 * HOUR_MS)
        ring(place)
        assert (await place.head(pid)).state is State.PAUSED
        await place.send(pid, SignalKind.RESUME)
        await place.over(pid)


async def test_two_servers_ring_one_timer_once(database: Database, database_settings: Settings) -> None:
    hands = Hands()
    bodies = {"plain": sleeper(HOUR_MS)}
    async with (
        running(database, database_settings, bodies, clock=hands.clock()) as one,
        running(database, database_settings, bodies, clock=hands.clock(), server="meter-two") as two,
    ):
        pids = [await one.spawn() for _ in range(10)]
        for pid in pids:
            await one.until(pid, State.WAITING)
        hands.pass_ms(HOUR_MS)
        ring(one)
        ring(two)
        await asyncio.gather(*(over_for_either(one, two, pid) for pid in pids))
        for pid in pids:
            assert (await one.kinds(pid)).count("signal.received") == 1


async def over_for_either(one: Place, two: Place, pid: str) -> None:
    """Whoever ran it tells its own followers alone."""
    waits = [asyncio.create_task(place.over(pid)) for place in (one, two)]
    _, left = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in left:
        wait.cancel()

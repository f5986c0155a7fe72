"""Random signals, pauses, answers and restarts: nothing is lost or received twice, and whatever is ready has work."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from sqlalchemy import Text, bindparam, select

from nimbos.config import Settings
from nimbos.db import Database, Statement
from nimbos.db.tables.work import work as work_table
from nimbos.errors import Conflict
from nimbos.kernel import Reason, SignalKind, State
from nimbos.kernel.chain import decoded
from nimbos.kernel.events import SignalConsumed, SignalReceived
from nimbos.kernel.fold import fold
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from tests.kernel.running import ACCOUNT, Place, running

STEPS = 40
_WORK = Statement(select(work_table.c.owner).where(work_table.c.ref == bindparam("ref", type_=Text)))


async def listen(holding: Holding) -> None:
    """Consumes what it is told, asks after every third message whether to go on, and never ends by itself."""
    while True:
        await holding.take_mail()
        answers = [one for one in holding.view.signals if one.signal is SignalKind.ANSWER]
        said = [one for one in holding.view.signals if one.signal is SignalKind.MESSAGE]
        if len(said) >= 3:
            if not answers:
                await holding.park(State.ASKING, Reason.INPUT, about=("go on",))
            said += answers
        else:
            await holding.park(State.WAITING, Reason.SIGNAL)
        await holding.append(*(Draft(body=SignalConsumed(received=one.seq)) for one in said))


class Story:
    """One process, and all that happens to it."""

    def __init__(self, chance: random.Random, restart: Callable[[], Awaitable[Place]]) -> None:
        self.chance = chance
        self.restart = restart
        self.sent: list[str] = []

    async def begin(self) -> None:
        self.place = await self.restart()
        self.pid = await self.place.spawn()

    async def step(self) -> None:
        deeds = (self.speak, self.speak, self.speak, self.again, self.pause, self.resume, self.answer, self.close)
        await self.chance.choice(deeds)()

    async def speak(self) -> None:
        name = f"message {len(self.sent)}"
        assert await self.place.send(self.pid, SignalKind.MESSAGE, body=name, id=name)
        self.sent.append(name)

    async def again(self) -> None:
        if self.sent:
            name = self.chance.choice(self.sent)
            assert not await self.place.send(self.pid, SignalKind.MESSAGE, body=name, id=name)

    async def pause(self) -> None:
        await self.place.send(self.pid, SignalKind.PAUSE)

    async def resume(self) -> None:
        await self.place.send(self.pid, SignalKind.RESUME)

    async def answer(self) -> None:
        try:
            await self.place.send(self.pid, SignalKind.ANSWER, body="yes")
        except Conflict as error:
            assert "asks nothing" in error.message or "answer already" in error.message

    async def close(self) -> None:
        self.place = await self.restart()

    async def settle(self) -> State:
        """Until nothing is to be done for it; what must hold then."""

        async def is_idle() -> bool:
            return (await self.place.head(self.pid)).state not in (State.READY, State.RUNNING)

        await self.place.when(self.pid, is_idle)
        head = await self.place.head(self.pid)
        assert await self.place.database.read(_WORK(ref=self.pid)) == []
        view = fold([event async for event in self.place.kernel.log.all(self.pid)])
        assert (view.state, view.reason, view.seq, view.hash) == (head.state, head.reason, head.seq, head.hash)
        assert head.state is State.PAUSED or head.mail == head.taken
        return head.state

    async def heard(self) -> list[str]:
        """The ids of the messages in the log, in its order."""
        bodies = [decoded(event) async for event in self.place.kernel.log.all(self.pid)]
        received = [body for body in bodies if isinstance(body, SignalReceived)]
        return [body.external_id for body in received if body.signal is SignalKind.MESSAGE]


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_comes_in_whatever_order_is_received_once(
    database: Database, database_settings: Settings, seed: int
) -> None:
    async with AsyncExitStack() as servers:
        number = 0

        async def restart() -> Place:
            nonlocal number
            number += 1
            await servers.aclose()
            place = running(database, database_settings, {"plain": listen}, server=f"meter-{number}")
            return await servers.enter_async_context(place)

        story = Story(random.Random(seed), restart)
        await story.begin()
        for step in range(STEPS):
            await story.step()
            if step % 5 == 4:
                await story.settle()
        if await story.settle() is State.PAUSED:
            await story.resume()
            assert await story.settle() is not State.PAUSED
        assert await story.heard() == story.sent
        await story.place.send(story.pid, SignalKind.KILL)
        assert (await story.place.over(story.pid)).reason is Reason.KILLED
        assert (await story.place.kernel.log.verify(story.pid)).broken_at is None
        assert [head.pid for head in await story.place.kernel.list(ACCOUNT)] == [story.pid]

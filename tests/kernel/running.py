"""A kernel on a real database, whose programs are coroutines of the tests, where else agents and functions drive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nimbos.blobs import open_blobs
from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Delta, Event, Head, Kernel, SignalKind, State
from nimbos.kernel.effects import effect_key
from nimbos.kernel.events import CallIntent, CallStarted
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.timers import SteadyClock
from nimbos.kernel.words import Effect, Verb
from nimbos.types import Account, new_id
from nimbos.work import Work
from tests.ledger.shop import shop

PATIENCE_S = 60
ACCOUNT = Account(id="proj_one", name="one", organisation="org_default", key="key_one")
OTHER = Account(id="proj_two", name="two", organisation="org_default", key="key_two")
FILES = {"nimbos.toml": b'name = "plain"\n', "instructions.md": b"Be plain.\n"}

Body = Callable[[Holding], Awaitable[None]]


@dataclass
class Place:
    """A kernel, and what its processes do: `bodies` by the process's name, else `plain`."""

    kernel: Kernel
    database: Database
    bodies: dict[str, Body] = field(default_factory=dict)

    async def drive(self, holding: Holding) -> None:
        await self.bodies[holding.view.name](holding)

    async def spawn(self, name: str = "plain", input: Any = "", **fields: Any) -> str:
        return await self.kernel.spawn(ACCOUNT, "plain", input, name=name, **fields)

    async def send(self, pid: str, kind: SignalKind, *, body: Any = None, about: str = "", id: str = "") -> bool:
        return await self.kernel.signal(
            ACCOUNT, pid, kind, source="user:test", external_id=id or new_id("sig"), about=about, body=body
        )

    async def head(self, pid: str) -> Head:
        return await self.kernel.find(ACCOUNT, pid)

    async def kinds(self, pid: str) -> list[str]:
        return [event.kind for event in await self.kernel.events(ACCOUNT, pid)]

    async def until(self, pid: str, state: State, *, reason: str | None = None, after: int = 0) -> Head:
        """Waits until the process's head says so, with an event behind `after`."""

        async def is_so() -> bool:
            head = await self.head(pid)
            return head.state is state and reason in (None, head.reason.value) and head.seq > after

        await self.when(pid, is_so)
        return await self.head(pid)

    async def when(self, pid: str, holds: Callable[[], Awaitable[bool]]) -> None:
        """Asks again at all news of the process, until it holds."""
        async with asyncio.timeout(PATIENCE_S):
            with self.kernel.bells.follow(pid) as follower:
                while True:
                    follower.news.clear()  # before looking: what comes from here on is not missed
                    if await holds():
                        return
                    await follower.news.wait()

    async def over(self, pid: str) -> Head:
        return await self.until(pid, State.DONE)


@asynccontextmanager
async def running(
    database: Database,
    settings: Settings,
    bodies: Mapping[str, Body] | None = None,
    *,
    server: str = "meter-one",
    lease_s: float | None = None,
    start: bool = True,
    clock: SteadyClock | None = None,
    resolve: Callable[[Account], Awaitable[Account]] | None = None,
) -> AsyncIterator[Place]:
    home = Path(settings.home)
    async with shop(database, home / server) as open_shop:
        kernel = Kernel(
            database=database,
            blobs=open_blobs(settings, database),
            service=open_shop.service,
            home=home,
            server=server,
            resolve=resolve or _same,
            work=Work(database) if lease_s is None else Work(database, lease_s=lease_s),
            clock=clock,
        )
        await kernel.programs.put(ACCOUNT, FILES)
        place = Place(kernel, database, {**(bodies or {})})
        if start:
            await kernel.start(place.drive)
        try:
            yield place
        finally:
            await kernel.close()


async def begin_call(holding: Holding, call_id: str, effect: Effect) -> None:
    """Until a driver has it, as the gate does."""
    intent = CallIntent(
        call_id=call_id,
        verb=Verb.TOOL,
        resource="send",
        effect=effect,
        key=effect_key(holding.pid, call_id),
        arguments=await holding.put({}),
    )
    started = CallStarted(call_id=call_id, attempt=1)
    await holding.append(Draft(body=intent, call_id=call_id), Draft(body=started, call_id=call_id))


async def told(place: Place, pid: str, *, after: int = 0) -> list[Event | Delta]:
    """All that a follower is told, to the end."""
    async with asyncio.timeout(PATIENCE_S), aclosing(place.kernel.follow(ACCOUNT, pid, after=after)) as followed:
        return [one async for one in followed]


async def _same(account: Account) -> Account:
    return account

"""Adopting a fork: what it withheld is done whatever the fork does next, or its log says that it is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import Conflict, NotFound
from nimbos.kernel import Reason, SignalKind, State
from nimbos.kernel.events import Note
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.mailbox import Mail
from tests.kernel.gating import Gated, gated, tool
from tests.kernel.running import ACCOUNT

Then = Callable[[Gated, Holding], Awaitable[None]]


@asynccontextmanager
async def forked(database: Database, settings: Settings, then: Then) -> AsyncIterator[tuple[Gated, str]]:
    """A fork that sends a mail, which is withheld, goes on as `then` says, and fails."""
    async with gated(database, settings) as at:

        async def body(holding: Holding) -> None:
            await holding.take_mail()
            await at.gate.finish_open(holding)
            if holding.view.forked_from is None:
                await holding.park(State.WAITING, Reason.SIGNAL)
            if "c1" not in holding.view.syscalls.ended:
                await at.gate.call(holding, tool("mail"))
                await then(at, holding)
            await holding.exit(Reason.FAILED, error="It can do no more.")

        at.place.bodies["plain"] = body
        original = await at.spawn()
        await at.place.until(original, State.WAITING)
        (made,) = await at.place.kernel.fork(ACCOUNT, original)
        yield at, made


async def notes(at: Gated, pid: str) -> list[Note]:
    return [body for _, body in await at.log(pid) if isinstance(body, Note)]


async def wait(at: Gated, holding: Holding) -> None:
    await holding.park(State.WAITING, Reason.SIGNAL)


async def test_a_fork_that_fails_does_first_what_it_was_adopted_with(
    database: Database, database_settings: Settings
) -> None:
    async def adopt(at: Gated, holding: Holding) -> None:
        await at.place.kernel.adopt(ACCOUNT, holding.pid)  # it runs, and has not read it when it fails

    async with forked(database, database_settings, adopt) as (at, made):
        head = await at.place.over(made)
        assert (head.reason, head.error) == (Reason.FAILED, "It can do no more.")
        assert at.done(made) == ["mail -"]
        assert [note.about for note in await notes(at, made)] == ["adopted"]


async def test_what_an_adopted_fork_that_is_killed_will_not_do_is_in_its_log(
    database: Database, database_settings: Settings
) -> None:
    reached = asyncio.Event()

    async def then(at: Gated, holding: Holding) -> None:
        reached.set()
        await asyncio.Event().wait()

    async with forked(database, database_settings, then) as (at, made):
        await reached.wait()
        await at.place.kernel.adopt(ACCOUNT, made)
        await at.place.send(made, SignalKind.KILL)
        assert (await at.place.over(made)).reason is Reason.KILLED
        adopted, dropped = await notes(at, made)
        assert (adopted.about, dropped.about) == ("adopted", "dropped")
        assert dropped.text.endswith("had withheld: mail.")
        assert at.done(made) == [] and not (await at.place.head(made)).withheld


async def test_what_will_not_be_done_is_told_although_the_log_is_ahead_of_what_was_folded(
    database: Database, database_settings: Settings
) -> None:
    """As behind a write that was cut off, and went through."""

    async def then(at: Gated, holding: Holding) -> None:
        said = Draft(body=Note(about="said", text="nobody has folded this"))
        await at.place.database.run(lambda: holding.appending(said))
        for kind in (SignalKind.ADOPT, SignalKind.KILL):
            mail = Mail(signal=kind, source="user:test", external_id=kind.value)
            await at.place.database.run(lambda mail=mail: at.place.kernel.posting(holding.pid, mail))  # type: ignore[misc]
        await holding.take_mail()

    async with forked(database, database_settings, then) as (at, made):
        head = await at.place.over(made)
        assert (head.reason, head.epoch) == (Reason.KILLED, 1), "the first run did it"
        assert [note.about for note in await notes(at, made)] == ["said", "adopted", "dropped"]


async def test_what_an_adopted_fork_without_a_program_will_not_do_is_in_its_log(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(hash: str) -> Any:
        raise NotFound("The program is gone.")

    async with forked(database, database_settings, wait) as (at, made):
        await at.place.until(made, State.WAITING)
        monkeypatch.setattr(at.place.kernel.programs, "load", gone)
        await at.place.kernel.adopt(ACCOUNT, made)
        assert (await at.place.over(made)).error == "The program is gone."
        assert [note.about for note in await notes(at, made)] == ["adopted", "dropped"]
        assert at.done(made) == []


class Late:
    """A database before whose next transaction something happens."""

    def __init__(self, database: Database, before: Callable[[], Awaitable[object]]) -> None:
        self._database = database
        self._before: Callable[[], Awaitable[object]] | None = before

    async def run(self, *words: Any, **named: Any) -> Any:
        before, self._before = self._before, None
        if before is not None:
            await before()
        return await self._database.run(*words, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)


async def test_a_fork_that_ends_while_it_is_adopted_is_not_adopted_with_what_it_can_do_no_more(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with forked(database, database_settings, wait) as (at, made):
        await at.place.until(made, State.WAITING)

        async def ends() -> None:
            await at.place.send(made, SignalKind.KILL)
            await at.place.over(made)

        monkeypatch.setattr(at.place.kernel._forks, "_database", Late(database, ends))
        with pytest.raises(Conflict, match="can happen no more"):
            await at.place.kernel.adopt(ACCOUNT, made)
        assert (await at.place.head(made)).withheld

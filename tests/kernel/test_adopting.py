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
from nimbos.kernel import Reason, SignalKind, State, heads
from nimbos.kernel.events import Note
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.mailbox import Mail
from nimbos.kernel.words import Verb
from tests.kernel.gating import Gated, call, gated, tool
from tests.kernel.minds import calling, minds
from tests.kernel.running import ACCOUNT, Place
from tests.kernel.test_forks import MANIFEST, SCRIPT, TOOLS, answer, asking, file_of, fork, keys, said

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


async def test_a_fork_of_a_fork_does_what_its_past_had_withheld_once_it_is_adopted(
    database: Database, database_settings: Settings
) -> None:
    script = {**SCRIPT, "replies": [{"match": "^Withheld", **calling("ask", question="Sure?")}, *SCRIPT["replies"]]}
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(MANIFEST, {"tools.py": TOOLS}))
        await place.until(pid, State.ASKING, reason="input")
        first = await fork(place, pid)
        forked = await place.until(first, State.ASKING, reason="input")
        await answer(place, first, "pay")
        await place.until(first, State.ASKING, reason="input", after=forked.seq)
        second = await fork(place, first)
        asked = await place.until(second, State.ASKING, reason="input")
        await place.kernel.adopt(ACCOUNT, second)
        await place.until(second, State.ASKING, reason="input", after=asked.seq)
        assert [len(file_of(place, one, "paid.txt")) for one in (pid, first, second)] == [0, 0, 1]
        third = await fork(place, second)
        assert await said(place, second, "yes") == "Paid at last."
        await place.until(third, State.ASKING, reason="input")
        await place.kernel.adopt(ACCOUNT, third)
        assert await said(place, third, "yes") == "Paid at last."
        assert await keys(place, third) == await keys(place, second), "in its past that was done"


async def say(place: Place, pid: str, *, id: str) -> None:
    """With an id of the user's own."""
    source = f"user:{ACCOUNT.key}"
    await place.kernel.signal(ACCOUNT, pid, SignalKind.MESSAGE, source=source, external_id=id, body="a word")


async def test_a_message_of_any_id_does_not_stand_in_the_way_of_adopting(
    database: Database, database_settings: Settings
) -> None:
    async def then(at: Gated, holding: Holding) -> None:
        await say(at.place, holding.pid, id="adopt")
        await at.place.kernel.adopt(ACCOUNT, holding.pid)

    async with forked(database, database_settings, then) as (at, made):
        await at.place.over(made)
        assert at.done(made) == ["mail -"]
        assert not (await at.place.head(made)).withheld


async def test_a_message_of_any_id_does_not_stand_in_the_way_of_dropping(
    database: Database, database_settings: Settings
) -> None:
    async with asking(database, database_settings) as (place, pid):
        made = await fork(place, pid)
        asked = await place.until(made, State.ASKING, reason="input")
        await say(place, made, id="drop")
        await place.until(made, State.ASKING, reason="input", after=asked.seq)
        await place.kernel.drop(ACCOUNT, made)
        assert (await place.head(made)).reason is Reason.KILLED


@asynccontextmanager
async def with_children(
    database: Database, settings: Settings, child: Callable[[Holding], Awaitable[None]], *, count: int, detached: bool
) -> AsyncIterator[tuple[Gated, str, list[str]]]:
    """A fork that has begun so many children and waits."""
    async with gated(database, settings) as at:

        async def body(holding: Holding) -> None:
            await holding.take_mail()
            if holding.view.forked_from is not None and not holding.view.children:
                for number in range(count):
                    spawn = call(Verb.SPAWN, id=f"c{number}", input=number, name="child", detached=detached)
                    await at.gate.call(holding, spawn)
            await holding.park(State.WAITING, Reason.SIGNAL)

        at.place.bodies |= {"plain": body, "child": child}
        original = await at.spawn()
        await at.place.until(original, State.WAITING)
        (made,) = await at.place.kernel.fork(ACCOUNT, original)

        async def is_bred() -> bool:
            return len(await at.place.kernel.tree(ACCOUNT, made)) == count + 1

        await at.place.when(made, is_bred)
        await at.place.until(made, State.WAITING)
        yield at, made, [head.pid for head in await at.place.kernel.tree(ACCOUNT, made)][1:]


class Counting:
    """A database that counts transactions."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.count = 0

    async def run(self, *words: Any, **named: Any) -> Any:
        self.count += 1
        return await self._database.run(*words, **named)


async def test_a_fork_whose_children_are_over_is_adopted_in_as_many_steps_as_one_of_them_takes(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def child(holding: Holding) -> None:
        await holding.exit(Reason.OK)

    async with with_children(database, database_settings, child, count=5, detached=False) as (at, made, children):
        for one in children:
            await at.place.over(one)
        counting = Counting(database)
        monkeypatch.setattr(at.place.kernel._forks, "_database", counting)
        await at.place.kernel.adopt(ACCOUNT, made)
        assert counting.count == 2
        assert not any([(await at.place.head(one)).withheld for one in (made, *children)])


async def test_a_fork_that_is_dropped_leaves_no_child_that_goes_on_for_nobody(
    database: Database, database_settings: Settings
) -> None:
    async with with_children(database, database_settings, wait_on, count=2, detached=True) as (at, made, children):
        for one in children:
            await at.place.until(one, State.WAITING)
        await at.place.kernel.drop(ACCOUNT, made)
        for one in (made, *children):
            assert (await at.place.over(one)).reason is Reason.KILLED


@pytest.mark.parametrize("detached", [False, True])
async def test_a_family_of_any_size_is_adopted_and_dropped_whole(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch, detached: bool
) -> None:
    monkeypatch.setattr(heads, "FAMILY_PAGE", 2)
    count = 4 if detached else 5  # with the fork itself, pages that are full and one that is not
    async with with_children(database, database_settings, wait_on, count=count, detached=detached) as (
        at,
        made,
        children,
    ):
        kernel = at.place.kernel
        for limit in (1, 2, 3, count + 1, count + 2):
            pages, last = [], ""
            while page := await kernel.tree(ACCOUNT, made, after=last, limit=limit):
                assert len(page) <= limit
                pages += [head.pid for head in page]
                last = pages[-1]
            assert pages == [made, *children]
        with pytest.raises(NotFound):
            await kernel.tree(ACCOUNT, made, after="proc_none")
        if detached:
            await kernel.drop(ACCOUNT, made)
            assert [(await at.place.over(one)).reason for one in children] == [Reason.KILLED] * count
        else:
            await kernel.adopt(ACCOUNT, made)
            assert not any([(await at.place.head(one)).withheld for one in (made, *children)])


async def wait_on(holding: Holding) -> None:
    await holding.take_mail()
    await holding.park(State.WAITING, Reason.SIGNAL)

"""Where a fork begins: never in the middle of what was written together, and apart from its siblings from there on."""

from __future__ import annotations

import asyncio

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason, SignalKind, State
from nimbos.kernel.chain import decoded
from nimbos.kernel.events import ModelIntent, ModelPartial, Note
from nimbos.kernel.fold import View
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.think import seed_for
from tests.kernel.gating import on_sqlite
from tests.kernel.minds import ACCOUNT, calling, minds, words
from tests.kernel.running import running
from tests.kernel.test_children import bear, exits, family_of

TOOLS = b'''
import os
from nimbos.adk import tool

@tool(effect="opaque")
def mail() -> None:
    """Nobody knows whether it was sent."""
    os._exit(7)
'''
SCRIPT = {
    "replies": [{"match": "^go$", **calling("mail")}, {"match": "^it was sent$", "text": "Good."}],
    "default": {"text": "What was that?"},
}


async def test_a_fork_at_a_persons_word_on_a_call_has_what_came_of_the_call(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await place.run(await place.program(files={"tools.py": TOOLS}))
        await place.until(pid, State.ASKING, reason="in_doubt")
        await place.send(pid, SignalKind.ANSWER, body={"verdict": "happened", "result": "it was sent"})
        assert await place.result(pid) == "Good."
        kinds = await place.kinds(pid)
        resolved = kinds.index("call.resolved")
        assert kinds[resolved : resolved + 4] == ["call.resolved", "signal.consumed", "call.done", "ctx.changed"]
        for seq in range(resolved + 1, resolved + 5):
            (made,) = await place.kernel.fork(ACCOUNT, pid, at=seq)
            assert (await place.head(made)).forked_seq == resolved + 4
            assert await place.result(made) == "Good."


@on_sqlite
async def test_a_fork_of_what_is_over_begins_before_an_answer_that_was_cut_off_in_its_middle(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, {"default": words(200, rate=200.0)}) as place:
        pid = await place.run(await place.program())
        kept = 0
        for _ in range(2):
            await place.until_partial(pid, tokens=kept + 1)
            await place.send(pid, SignalKind.PAUSE)
            await place.until(pid, State.PAUSED)
            kept = sum(len(body.ids) for body in await place.bodies_of(pid) if isinstance(body, ModelPartial))
            await place.send(pid, SignalKind.RESUME)
        await place.result(pid)
        (made,) = await place.kernel.fork(ACCOUNT, pid)
        await place.result(made)
        own = [event async for event in place.kernel.log.all(made) if event.pid == made]
        intents = [body for body in map(decoded, own) if isinstance(body, ModelIntent)]
        assert [body.continues for body in intents] == [""], "it is asked the whole of it"
        past = [body for body in await place.bodies_of(pid) if isinstance(body, ModelIntent)]
        assert len(past) == 3


def test_forks_of_an_answer_that_was_begun_go_on_with_numbers_of_their_own() -> None:
    one, two = (View(pid=pid, forked_from="proc_original") for pid in ("proc_one", "proc_two"))
    for seed in (0, 7):
        seeds = {seed_for(view, seed, "ask_begun") for view in (View(pid="proc_original"), one, two)}
        assert len(seeds) == 3
        assert seed_for(one, seed, "ask_begun") in seeds, "the same whenever it goes on"
    assert seed_for(View(), 7, "ask_begun") == 7


async def test_a_fork_is_told_of_a_childs_end_where_its_past_has_the_child_whatever_its_servers_clock_says(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()

    async def child(holding: Holding) -> None:
        await go.wait()
        await holding.exit(Reason.OK)

    async def parent(holding: Holding) -> None:
        if holding.view.forked_from is None and not await family_of(holding):
            await holding.append(Draft(body=Note(about="said", text="now it bears a child")))
            await bear(holding, "child")
        await holding.take_mail()
        if exits(holding):
            await holding.exit(Reason.OK)
        await holding.park(State.WAITING, Reason.CHILD)

    async with running(database, database_settings, {"plain": parent, "child": child}) as place:
        pid = await place.spawn()
        waits = await place.until(pid, State.WAITING)
        (before,) = await place.kernel.fork(ACCOUNT, pid, at=waits.seq - 2)
        with monkeypatch.context() as another_server:
            another_server.setattr(place.kernel.log, "_now_ms", lambda: 0)
            (behind,) = await place.kernel.fork(ACCOUNT, pid)
            (of_it,) = await place.kernel.fork(ACCOUNT, behind)
            (of_it_before,) = await place.kernel.fork(ACCOUNT, behind, at=waits.seq - 2)
        for made in (before, behind, of_it, of_it_before):
            await place.until(made, State.WAITING)
        go.set()
        for made in (pid, behind, of_it):
            assert (await place.over(made)).reason is Reason.OK
        for made in (before, of_it_before):
            assert (await place.head(made)).mail == 0

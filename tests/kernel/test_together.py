"""The calls of one answer: at once where they only look, in their turn where they change something, and whatever one of
them waits for, nothing of the others is lost."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason, SignalKind, State
from nimbos.kernel.branches import at_once
from nimbos.kernel.drivers.builtin import BUILTINS
from nimbos.kernel.events import CallDone, CallIntent, CallWanted, CtxChanged, ModelDone, Note, Segment
from nimbos.kernel.folding.shown import Shown
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.offer import Offered
from nimbos.kernel.together import leading
from nimbos.kernel.words import Effect, Verb
from nimbos.ledger import Allowance
from tests.kernel.gating import on_sqlite
from tests.kernel.minds import ACCOUNT, Minds, minds
from tests.kernel.running import PATIENCE_S, running

# `meet` returns when another call of it is there, too; `hold` when the test says so.
TOOLS = b'''
import os, time
from pathlib import Path
from nimbos.adk import tool

def _until(holds) -> None:
    while not holds():
        time.sleep(0.01)

@tool(effect="pure")
def meet(name: str, others: int) -> str:
    """Meets."""
    Path(f"here.{name}").touch()
    _until(lambda: len(list(Path().glob("here.*"))) > others)
    return f"{name} was there"

@tool(effect="pure")
def look(name: str) -> str:
    """Looks."""
    return f"{name} is seen"

@tool(effect="pure")
def hold(name: str) -> str:
    """Waits."""
    _until(Path("go").exists)
    return f"{name} was held"

@tool(effect="pure", deadline_s=0.5)
def hang() -> str:
    """Never returns, once another call has begun."""
    _until(lambda: len(list(Path().glob("here.*"))) > 1)

@tool(effect="opaque")
def write(text: str) -> str:
    """Writes."""
    with open("written.txt", "a") as file:
        file.write(text)
    return Path("written.txt").read_text()

@tool(effect="pure")
def written() -> str:
    """What is written."""
    return Path("written.txt").read_text() if Path("written.txt").exists() else "nothing"
'''
MANIFEST = '[tools]\nbuiltin = ["ask", "sleep", "spawn", "wait"]\n'
FILES = {"tools.py": TOOLS}


def answering(*calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """A script: all of these calls in its first answer."""
    made = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {"replies": [{"match": "^go$", "text": "", "tool_calls": made}], "default": {"text": "Done."}}


async def results(place: Minds, pid: str) -> list[str]:
    """In the order in which the model sees them."""
    return [message["content"] for message in await place.shown(pid) if message["role"] == "tool"]


async def number_of(place: Minds, pid: str, number: int) -> str:
    """The call id."""
    first = next(body for body in await place.bodies_of(pid) if isinstance(body, ModelDone))
    return first.calls[number].call_id


async def until_done(place: Minds, pid: str, count: int) -> list[str]:
    """The ids of the calls that have an outcome, in their order, once there are so many."""
    done: list[str] = []

    async def holds() -> bool:
        done[:] = [body.call_id for body in await place.bodies_of(pid) if isinstance(body, CallDone)]
        return len(done) >= count

    await place.when(pid, holds)
    return done


def go(place: Minds, pid: str) -> None:
    (place.kernel.workspaces.path(pid) / "go").touch()


async def test_calls_that_only_look_run_at_once(database: Database, database_settings: Settings) -> None:
    names = ("Ada", "Bob", "Eve")
    script = answering(*(("meet", {"name": name, "others": 2}) for name in names))
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(MANIFEST, FILES))
        assert await place.result(pid) == "Done."
        assert await results(place, pid) == [f"{name} was there" for name in names]


async def test_results_are_shown_in_the_order_of_the_calls_whenever_they_came(
    database: Database, database_settings: Settings
) -> None:
    script = answering(("hold", {"name": "first"}), ("look", {"name": "second"}), ("look", {"name": "third"}))
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(MANIFEST, FILES))
        done = await until_done(place, pid, 2)
        go(place, pid)
        assert await place.result(pid) == "Done."
        first = await number_of(place, pid, 0)
        assert first not in done and (await until_done(place, pid, 3))[-1] == first
        assert await results(place, pid) == ["first was held", "second is seen", "third is seen"]


async def test_what_changes_something_is_done_in_its_turn(database: Database, database_settings: Settings) -> None:
    script = answering(
        ("written", {}), ("write", {"text": "a"}), ("written", {}), ("written", {}), ("write", {"text": "b"})
    )
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(MANIFEST, FILES))
        assert await place.result(pid) == "Done."
        assert await results(place, pid) == ["nothing", "a", "a", "a", "ab"]


@on_sqlite
async def test_a_question_loses_nothing_of_the_calls_beside_it(database: Database, database_settings: Settings) -> None:
    script = answering(
        ("hold", {"name": "first"}), ("ask", {"question": "Which?"}), ("ask", {"question": "How?"}), ("written", {})
    )
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(MANIFEST, FILES))

        async def asked() -> bool:
            made = [body for body in await place.bodies_of(pid) if isinstance(body, CallIntent)]
            return [body.verb for body in made].count(Verb.ASK) == 2

        await place.when(pid, asked)
        assert (await place.head(pid)).state is State.RUNNING, "it is not parked as long as another call is under way"
        go(place, pid)
        head = await place.until(pid, State.ASKING, reason="input")
        assert set(head.about) == {await number_of(place, pid, 1), await number_of(place, pid, 2)}
        assert await results(place, pid) == ["first was held"], "what is behind a question waits for its answer"
        await place.send(pid, SignalKind.ANSWER, body="so", about=await number_of(place, pid, 2))
        await place.until(pid, State.ASKING, reason="input", after=head.seq)
        await place.send(pid, SignalKind.ANSWER, body="that", about=await number_of(place, pid, 1))
        assert await place.result(pid) == "Done."
        assert await results(place, pid) == ["first was held", "that", "so", "nothing"]


async def test_a_spent_budget_loses_nothing_of_the_calls_beside_it(
    database: Database, database_settings: Settings
) -> None:
    names = ("one", "two", "three", "four")
    script = answering(*(("look", {"name": name}) for name in names))
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(MANIFEST, FILES), budget=Allowance(calls=3))
        await place.until(pid, State.ASKING, reason="budget")
        assert len(await results(place, pid)) == 3
        await place.kernel.top_up(ACCOUNT, pid, Allowance(calls=3), source="user:test", external_id="more")
        assert await place.result(pid) == "Done."
        assert await results(place, pid) == [f"{name} is seen" for name in names]
        view = await place.view(pid)
        assert (view.calls_made, view.used["calls"]) == (4, 4)


@on_sqlite
async def test_a_call_is_not_told_of_the_deadline_of_the_call_beside_it(
    database: Database, database_settings: Settings
) -> None:
    script = answering(("hang", {}), ("hold", {"name": "second"}))
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program(MANIFEST, FILES))
        (late,) = await until_done(place, pid, 1)
        assert late == await number_of(place, pid, 0)
        go(place, pid)
        assert await place.result(pid) == "Done."
        told = await results(place, pid)
        assert told[0].startswith("Error (deadline)") and told[1] == "second was held"


@on_sqlite
async def test_who_parks_waits_for_what_is_under_way(database: Database, database_settings: Settings) -> None:
    go_on, parks = asyncio.Event(), asyncio.Event()

    async def body(holding: Holding) -> None:
        async def park() -> None:
            parks.set()
            await holding.park(State.WAITING, Reason.SIGNAL)

        async def work() -> None:
            await go_on.wait()
            await holding.append(Draft(body=Note(about="said", text="done beside it")))

        await holding.take_mail()
        if not holding.view.signals:
            await at_once(holding, [park, work, park, work], most=3)
        await holding.exit(Reason.OK)

    async with running(database, database_settings, {"plain": body}) as place:
        pid = await place.spawn()
        async with asyncio.timeout(PATIENCE_S):
            await parks.wait()
        assert (await place.head(pid)).state is State.RUNNING
        go_on.set()
        await place.until(pid, State.WAITING)
        kinds = await place.kinds(pid)
        assert kinds[-2:] == ["note", "proc.state"] and kinds.count("note") == 1, "the fourth had not begun"
        await place.send(pid, SignalKind.MESSAGE, body="go on")
        assert (await place.over(pid)).reason is Reason.OK


@on_sqlite
async def test_no_more_run_at_once_than_may(database: Database, database_settings: Settings) -> None:
    now, most, brought = [0], [0], list[int]()

    async def body(holding: Holding) -> None:
        async def work(number: int) -> int:
            now[0] += 1
            most[0] = max(most[0], now[0])
            await holding.append(Draft(body=Note(about="said", text=str(number))))
            now[0] -= 1
            return number

        brought.extend(await at_once(holding, [partial(work, number) for number in range(20)], most=4))
        await holding.exit(Reason.OK)

    async with running(database, database_settings, {"plain": body}) as place:
        await place.over(await place.spawn())
    assert (now, most, brought) == ([0], [4], list(range(20)))


def offered(name: str, verb: Verb, effect: Effect) -> Offered:
    return Offered(
        name=name, verb=verb, effect=effect, description="", parameters={}, definition_hash="", deadline_s=1.0
    )


def test_which_calls_run_at_once() -> None:
    tools = {name: offered(name, one.verb, one.effect) for name, one in BUILTINS.items()}
    tools |= {effect.value: offered(effect.value, Verb.TOOL, effect) for effect in Effect}
    for names, count in (
        ("pure pure read pure", 4),
        ("pure opaque pure", 1),
        ("opaque opaque", 1),
        ("idempotent pure", 1),
        ("spawn spawn wait", 1),
        ("wait wait sleep", 3),
        ("pure ask ask pure", 3),
        ("sleep pure", 1),
        ("nothing pure unknown pin", 3),
        ("checkable", 1),
    ):
        wanted = [
            CallWanted(call_id=str(number), name=name, arguments="{}") for number, name in enumerate(names.split())
        ]
        assert len(leading(wanted, tools)) == count, names


@given(st.permutations(range(6)), st.integers(0, 6))
def test_whatever_order_results_come_in_they_stand_in_the_order_of_the_calls(came: list[int], other: int) -> None:
    turn = [f"call.{number}" for number in range(6)]
    shown = Shown()
    shown.change(CtxChanged(add=(Segment(id="before", hash="", kind="assistant", tokens=1),)), turn=turn)
    for position, number in enumerate(came):
        if position == other:
            shown.change(CtxChanged(add=(Segment(id="note", hash="", kind="note", tokens=1),)), turn=turn)
        segment = Segment(id=turn[number], hash="", kind="tool", tokens=1)
        assert shown.change(CtxChanged(add=(segment,)), turn=turn) is None
    ids = [segment.id for segment in shown.segments]
    assert [id for id in ids if id in turn] == turn
    assert ids[0] == "before" and ids.index("note") == other + 1 if other < 6 else "note" not in ids
    assert sorted(ids, key=shown.places.__getitem__) == ids

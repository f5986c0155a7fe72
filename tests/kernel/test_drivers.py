"""The kernel's own verbs: answered in the log's own transaction, or by what arrives."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nimbos.blobs import hash_of
from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Allowance, Reason, SignalKind, State, asks_of
from nimbos.kernel.drivers.paging import head_of
from nimbos.kernel.holding import Holding
from nimbos.kernel.segments import canonical
from nimbos.kernel.syscall import Wait, joined
from nimbos.kernel.words import Verb
from tests.kernel.gating import call, gated, on_sqlite, tool
from tests.kernel.minds import calling, minds
from tests.kernel.running import ACCOUNT, OTHER
from tests.kernel.test_timers import Hands, ring


async def test_sleep_parks_and_the_timer_wakes_it(database: Database, database_settings: Settings) -> None:
    hands = Hands()
    async with gated(database, database_settings, clock=hands.clock()) as at:
        calls = at.program(call(Verb.SLEEP, seconds=3600))
        pid = await at.spawn()
        await at.place.until(pid, State.WAITING, reason="timer")
        hands.pass_ms(3_600_000)
        ring(at.place)
        await at.place.over(pid)
        assert calls.outcomes["c1"].value == {"slept_s": 3600.0}
        kinds = await at.place.kinds(pid)
        assert kinds.count("proc.state") == 4  # running, waiting, ready, running
        assert "signal.received" in kinds


async def test_a_sleep_goes_on_counting_while_no_server_runs(database: Database, database_settings: Settings) -> None:
    syscall = call(Verb.SLEEP, seconds=3600)
    async with gated(database, database_settings) as at:
        at.program(syscall)
        pid = await at.spawn()
        due_ms = (await at.place.until(pid, State.WAITING, reason="timer")).due_ms
    async with gated(database, database_settings, server="meter-two") as at:
        at.program(syscall)
        await at.place.send(pid, SignalKind.MESSAGE, body="wake up")  # it looks, and goes on sleeping
        head = await at.place.until(pid, State.WAITING, after=(await at.place.head(pid)).seq)
        assert head.due_ms == due_ms


@on_sqlite
async def test_ask_parks_until_there_is_an_answer(database: Database, database_settings: Settings) -> None:
    async with gated(database, database_settings) as at:
        calls = at.program(call(Verb.ASK, question="Paris or Oslo?", choices=["Paris", "Oslo"]))
        pid = await at.spawn()
        head = await at.asking(pid, Reason.INPUT)
        assert head.about == ("c1",)
        await at.place.send(pid, SignalKind.MESSAGE, body="this answers nothing")
        await at.asking(pid, Reason.INPUT, after=head.seq + 3)
        await at.answer(pid, "Oslo", about="c1")
        await at.place.over(pid)
        assert calls.outcomes["c1"].value == "Oslo"
        consumed = [body for kind, body in await at.log(pid) if kind == "signal.consumed"]
        assert [body.call_id for body in consumed] == ["c1"]


async def test_spawn_and_wait_bring_the_results_of_children(database: Database, database_settings: Settings) -> None:
    async with gated(database, database_settings) as at:
        done: dict[str, Any] = {}

        async def child(holding: Holding) -> None:
            given = await at.place.kernel.segments.get(holding.view.account, holding.view.input)
            if given == "fail":
                await holding.exit(Reason.FAILED, error="it did not work")
            await holding.exit(Reason.OK, result=await holding.put(given * 2))

        async def parent(holding: Holding) -> None:
            await holding.take_mail()
            await at.gate.finish_open(holding, also=keep)
            for syscall in (
                call(Verb.SPAWN, id="one", input=21, name="child"),
                call(Verb.SPAWN, id="two", input="fail", name="child"),
                call(Verb.WAIT, id="all"),
                call(Verb.WAIT, id="again", mode="any"),
            ):
                if syscall.call_id not in holding.view.syscalls.ended:
                    await at.gate.call(holding, syscall, also=keep)
            await holding.exit(Reason.OK)

        async def keep(outcome: Any) -> Any:
            done[outcome.call_id] = outcome.value
            return ()

        at.place.bodies.update(plain=parent, child=child)
        pid = await at.spawn()
        assert (await at.place.over(pid)).reason is Reason.OK
        one, two = done["one"]["pid"], done["two"]["pid"]
        exited = {one: {"reason": "ok", "result": 42}, two: {"reason": "failed", "result": "it did not work"}}
        assert done["all"] == {"exited": exited, "running": []}
        assert done["again"] == done["all"]
        assert (await at.place.head(one)).parent == pid


@on_sqlite
async def test_wait_for_any_goes_on_with_the_first(database: Database, database_settings: Settings) -> None:
    async with gated(database, database_settings) as at:
        done: dict[str, Any] = {}

        async def parent(holding: Holding) -> None:
            await holding.take_mail()
            await at.gate.finish_open(holding, also=keep)
            for name in ("quick", "asks"):
                if name not in holding.view.syscalls.ended:
                    await at.gate.call(holding, call(Verb.SPAWN, id=name, input=name, name=name), also=keep)
            for waiting in (call(Verb.WAIT, id="any", mode="any"), call(Verb.WAIT, id="late", timeout_s=0)):
                if waiting.call_id not in holding.view.syscalls.ended:
                    await at.gate.call(holding, waiting, also=keep)
            await holding.exit(Reason.OK)

        async def keep(outcome: Any) -> Any:
            done[outcome.call_id] = outcome.value
            return ()

        async def quick(holding: Holding) -> None:
            await holding.exit(Reason.OK, result=await holding.put("first"))

        async def asks(holding: Holding) -> None:
            await holding.take_mail()
            await holding.park(State.ASKING, Reason.INPUT)

        at.place.bodies.update(plain=parent, quick=quick, asks=asks)
        pid = await at.spawn()
        assert (await at.place.over(pid)).reason is Reason.OK
        left = done["asks"]["pid"]
        assert done["any"] == done["late"]
        assert done["any"] == {
            "exited": {done["quick"]["pid"]: {"reason": "ok", "result": "first"}},
            "running": [left],
        }
        assert (await at.place.over(left)).reason is Reason.CANCELLED  # it does not outlive its parent


@on_sqlite
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"input": 1, "program": "nobody-has-this"}, "not_found"),
        ({"input": 1, "budget": {"calls": 50}}, "invalid_request"),
        ({"input": 1, "budget": {"apples": 1}}, "wrong_arguments"),
    ],
    ids=["no such program", "more than is left", "no such meter"],
)
async def test_a_child_that_cannot_be_is_an_error_and_nothing_is_left_of_it(
    database: Database, database_settings: Settings, arguments: dict[str, Any], error: str
) -> None:
    async with gated(database, database_settings) as at:
        calls = at.program(call(Verb.SPAWN, **arguments))
        pid = await at.spawn(budget=Allowance(calls=10))
        assert (await at.place.over(pid)).reason is Reason.OK
        assert calls.outcomes["c1"].error == error
        assert [head.pid for head in await at.place.kernel.tree(ACCOUNT, pid)] == [pid]


async def test_send_puts_words_into_another_mailbox_once(database: Database, database_settings: Settings) -> None:
    async with gated(database, database_settings) as at:
        heard: list[Any] = []

        async def ear(holding: Holding) -> None:
            await holding.take_mail()
            for signal in holding.view.signals:
                assert signal.body is not None
                heard.append((signal.source, await at.place.kernel.segments.get(ACCOUNT.id, signal.body)))
            if heard:
                await holding.exit(Reason.OK)
            await holding.park(State.WAITING, Reason.SIGNAL)

        at.place.bodies["ear"] = ear
        to = await at.spawn("ear")
        await at.place.until(to, State.WAITING)
        strange = await at.place.kernel.programs.put(OTHER, {"instructions.md": b"x", "nimbos.toml": b'name = "x"'})
        foreign = await at.place.kernel.spawn(OTHER, strange.hash, "", name="ear")
        pid, calls = await at.run(
            call(Verb.SEND, to=to, message={"hello": 1}),
            call(Verb.SEND, id="c2", to="proc_nobody", message=""),
            call(Verb.SEND, id="c3", to=foreign, message=""),
        )
        await at.place.over(to)
        assert heard == [(f"process:{pid}", {"hello": 1})]
        assert calls.outcomes["c1"].value == {"sent": to}
        assert calls.outcomes["c2"].error == calls.outcomes["c3"].error == "not_found"


@on_sqlite
async def test_a_pinned_note_stays_in_view_until_it_is_let_go(database: Database, database_settings: Settings) -> None:
    async with gated(database, database_settings) as at:
        seen: list[Any] = []

        async def body(holding: Holding) -> None:
            pinned = await at.gate.call(holding, call(Verb.PIN, text="I promised to write back."))
            (note,) = holding.view.context
            seen.append((note.kind, note.pinned, await at.place.kernel.segments.get(ACCOUNT.id, note.hash)))
            name = pinned.value["pinned"]
            await at.gate.call(holding, call(Verb.PIN, id="c2", release=name))
            seen.append(holding.view.context[0].pinned)
            again = await at.gate.call(holding, call(Verb.PIN, id="c3", release=name))
            empty = await at.gate.call(holding, call(Verb.PIN, id="c4"))
            seen.append((again.error, empty.error))
            await holding.exit(Reason.OK)

        at.place.bodies["plain"] = body
        assert (await at.place.over(await at.spawn())).reason is Reason.OK
        said = {"role": "user", "content": "[Pinned as c1.pin] I promised to write back."}
        assert seen == [("note", True, said), False, ("not_found", "wrong_arguments")]


async def test_a_fork_withholds_what_goes_outside_and_does_it_when_it_is_adopted(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        asks = call(Verb.ASK, id="a", question="Go on?")
        at.program(asks, tool("look", id="l"), tool("mail", id="m"), call(Verb.ASK, id="b", question="And now?"))
        pid = await at.spawn()
        head = await at.asking(pid, Reason.INPUT)
        (fork,) = await at.place.kernel.fork(ACCOUNT, pid, at=head.seq - 2)
        forked = await at.asking(fork, Reason.INPUT)
        await at.answer(fork, "yes", about="a")
        await at.asking(fork, Reason.INPUT, after=forked.seq + 4)
        assert at.done(fork) == ["look -"]
        assert await at.calls_of(fork, "m") == ["intent", "done"]
        assert "Withheld" in at.calls["plain"].outcomes["m"].shown and at.calls["plain"].outcomes["m"].withheld
        await at.place.kernel.adopt(ACCOUNT, fork)
        await at.answer(fork, "that is all", about="b")
        assert (await at.place.over(fork)).reason is Reason.OK
        assert at.done(fork) == ["look -", "mail -"]
        assert await at.calls_of(fork, "m.released") == ["intent", "started", "done"]
        assert await at.calls_of(fork, "m") == ["intent", "done"]
        assert at.done(pid) == []


def test_what_a_person_must_do_is_shown_and_one_kind_of_it_at_a_time() -> None:
    sleeps = Wait(state=State.WAITING, reason=Reason.TIMER, due_ms=5, about=("s",))
    child = Wait(state=State.WAITING, reason=Reason.CHILD, due_ms=9, about=("w", "proc_1"))
    question = Wait(state=State.ASKING, reason=Reason.INPUT, about=("q",))
    second = Wait(state=State.ASKING, reason=Reason.INPUT, about=("r",))
    doubt = Wait(state=State.ASKING, reason=Reason.IN_DOUBT, about=("d",))
    together = joined([child, sleeps])
    assert (together.reason, together.due_ms, together.about) == (Reason.CHILD, 5, ("s", "w", "proc_1"))
    asking = joined([child, question, doubt, second, sleeps])
    assert (asking.state, asking.reason, asking.due_ms) == (State.ASKING, Reason.INPUT, 5)
    assert asking.about == ("q", "r")


@pytest.mark.parametrize("size", range(1, 12))
def test_a_head_cuts_no_character(size: int) -> None:
    text = "a世🌍é" * 5
    head = head_of(text, handle="0" * 16, head_bytes=size).partition("\n\n[bytes 0 to ")[0]
    assert text.startswith(head) or size < 4


@on_sqlite
@pytest.mark.parametrize("when", ["before its last mail", "behind its last mail"])
async def test_a_fork_that_is_adopted_while_it_runs_does_what_it_withheld_before_it_ends(
    database: Database, database_settings: Settings, when: str
) -> None:
    async with gated(database, database_settings) as at:
        at.program(call(Verb.ASK, id="a", question="Go on?"))
        pid = await at.spawn()
        head = await at.asking(pid, Reason.INPUT)

        async def forked(holding: Holding) -> None:
            await holding.take_mail()
            await at.gate.finish_open(holding)
            if "m" not in holding.view.syscalls.ended:
                await at.gate.call(holding, tool("mail", id="m"))
                await at.place.kernel.adopt(ACCOUNT, holding.pid)
                if when == "before its last mail":
                    await holding.take_mail()
            await holding.exit(Reason.OK)

        at.place.bodies["plain"] = forked
        (fork,) = await at.place.kernel.fork(ACCOUNT, pid, at=head.seq - 2)
        assert (await at.place.over(fork)).reason is Reason.OK
        assert at.done(fork) == ["mail -"]
        assert await at.calls_of(fork, "m.released") == ["intent", "started", "done"]


@on_sqlite
async def test_an_agent_reads_on_in_what_it_was_shown_the_head_of(
    database: Database, database_settings: Settings
) -> None:
    whole = "".join(f"line {number}\n" for number in range(1_000))
    handle = hash_of(b"proj_one\n" + canonical(whole))[:16]
    script = {
        "replies": [
            {"match": "^go$", **calling("lines", count=1000)},
            {"match": f'"{handle}", "offset": 2048', **calling("read", handle=handle, offset=8_000)},
            {"match": "line 999", "text": "The last one is 999."},
        ]
    }
    tools = b"""
from nimbos.adk import tool

@tool(effect="pure")
def lines(count: int) -> str:
    '''Many lines.'''
    return "".join(f"line {number}\\n" for number in range(count))
"""
    async with minds(database, database_settings, script) as place:
        manifest = '[tools]\nbuiltin = ["read"]\n[limits]\nresult_bytes = 2048\n'
        pid = await place.run(await place.program(manifest, {"tools.py": tools}))
        assert await place.result(pid) == "The last one is 999."
        head, page = [message["content"] for message in await place.shown(pid) if message["role"] == "tool"]
        assert whole.startswith(head.partition("\n\n[bytes")[0]) and whole.endswith(page)


async def test_a_fork_hears_how_children_end_that_its_past_began(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        go = asyncio.Event()

        async def child(holding: Holding) -> None:
            await go.wait()
            await holding.exit(Reason.OK, result=await holding.put("grown"))

        async def heard(pid: str) -> Any:
            done = [body for kind, body in await at.log(pid) if kind == "call.done" and body.call_id == "all"]
            told = await at.place.kernel.segments.get(ACCOUNT.id, done[-1].result)
            return list(told["exited"].values()), told["running"]

        at.place.bodies["child"] = child
        at.program(call(Verb.SPAWN, id="one", input=1, name="child"), call(Verb.WAIT, id="all"))
        pid = await at.spawn()
        waits = await at.place.until(pid, State.WAITING, reason="child")
        (made,) = await at.place.kernel.fork(ACCOUNT, pid)
        (of_it,) = await at.place.kernel.fork(ACCOUNT, made)
        for one in (made, of_it):
            await at.place.until(one, State.WAITING, reason="child")
        go.set()
        assert (await at.place.over(pid)).reason is Reason.OK
        (late,) = await at.place.kernel.fork(ACCOUNT, pid, at=waits.seq)
        for one in (made, of_it, late):
            assert (await at.place.over(one)).reason is Reason.OK
            assert await heard(one) == ([{"reason": "ok", "result": "grown"}], [])


@on_sqlite
async def test_who_looks_while_a_process_goes_on_is_not_asked_what_it_does_not_ask(
    database: Database, database_settings: Settings
) -> None:
    syscall = call(Verb.ASK, question="Paris or Oslo?")
    async with gated(database, database_settings) as at:
        at.program(syscall)
        pid = await at.spawn()
        asking = await at.asking(pid, Reason.INPUT)
        kernel = at.place.kernel
        assert [one.question for one in await asks_of(kernel.log, kernel.segments, asking)] == ["Paris or Oslo?"]
    async with gated(database, database_settings, server="meter-two", start=False) as at:
        await at.answer(pid, "Oslo")
        assert (await at.place.head(pid)).state is State.READY
        assert await asks_of(at.place.kernel.log, at.place.kernel.segments, asking) == []

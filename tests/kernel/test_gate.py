"""The one way out: nothing is done before it is written down, and whatever becomes of a call, its caller is told."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Allowance, Reason, SignalKind, State
from nimbos.kernel.events import BudgetReserved, CallIntent, CallWanted, CtxChanged, Segment
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.syscall import Outcome
from nimbos.kernel.words import Effect, Verb
from tests.kernel.gating import Gated, call, gated, on_sqlite, tool
from tests.kernel.running import ACCOUNT


async def test_the_intent_is_durable_before_the_driver_runs(database: Database, database_settings: Settings) -> None:
    async with gated(database, database_settings) as at:
        calls = at.program(tool("mail", {"hold": True}))
        pid = await at.spawn()
        await at.started(pid, "mail")
        assert await at.calls_of(pid, "c1") == ["intent", "started"]
        at.go(pid)
        await at.place.over(pid)
        assert await at.calls_of(pid, "c1") == ["intent", "started", "done"]
        assert calls.outcomes["c1"].value == "mail is done"
        (intent,) = [body for _, body in await at.log(pid) if isinstance(body, CallIntent)]
        assert (intent.verb, intent.resource, intent.effect) == (Verb.TOOL, "mail", Effect.OPAQUE)
        assert len(intent.key) == len(intent.bound_to) == 64


WRONG = [
    (tool("nonsense"), "unknown_tool", "There is no tool 'nonsense'. The tools are: ask, pin, read"),
    (tool("words", {"count": "many"}), "wrong_arguments", 'count: "many" is not of type "integer"'),
    (tool("words", {}), "wrong_arguments", '"count" is a required property'),
    (tool("words", [1]), "wrong_arguments", "must be an object"),
    (call(Verb.SLEEP, seconds=-1), "wrong_arguments", "seconds: -1 is less than the minimum of 0"),
    (tool("broken", {"how": "raises"}), "raised", "no such city"),
    (tool("broken", {"how": "not utf-8"}), "not_utf8", "UTF-8"),
    (tool("broken", {"how": "not json"}), "not_json", "JSON"),
    (tool("broken", {"how": "100 MB"}), "too_large", "too large"),
    (tool("slow"), "deadline", "stopped at its deadline"),
]


@on_sqlite
async def test_whatever_goes_wrong_the_model_is_told_and_the_process_goes_on(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        wrong = [replace(syscall, call_id=f"w{number}") for number, (syscall, _, _) in enumerate(WRONG)]
        pid, calls = await at.run(*wrong, tool("look"))
        for number, (_, error, said) in enumerate(WRONG):
            outcome = calls.outcomes[f"w{number}"]
            assert outcome.error == error
            assert said in outcome.shown and outcome.shown.startswith(f"Error ({error}): ")
            assert (await at.calls_of(pid, f"w{number}"))[-1] in ("done", "denied")
        assert calls.outcomes["c1"].value == "look is done"


@on_sqlite
async def test_a_call_is_taken_as_a_model_wrote_it(database: Database, database_settings: Settings) -> None:
    written = {
        '{"hold": fal': "wrong_arguments",
        "[" * 100_000: "wrong_arguments",
        '{"colour": "red"}': "wrong_arguments",
        "": "",
        "{}": "",
    }
    async with gated(database, database_settings) as at:
        told: list[str] = []

        async def body(holding: Holding) -> None:
            for number, arguments in enumerate(written):
                wanted = CallWanted(call_id=f"c{number}", name="look", arguments=arguments)
                outcome = await at.gate.wanted(holding, wanted)
                assert isinstance(outcome, Outcome)
                told.append(outcome.error)
            await holding.exit(Reason.OK)

        at.place.bodies["plain"] = body
        await at.place.over(await at.spawn())
        assert told == list(written.values())


@on_sqlite
async def test_a_large_result_is_a_head_and_its_pages_are_the_whole(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        whole = "Grüße, 世界 🌍 " * 60
        pages: list[str] = []

        async def body(holding: Holding) -> None:
            outcome = await at.gate.call(holding, tool("words", {"count": 60, "text": "Grüße, 世界 🌍 "}))
            assert outcome.value == whole and outcome.whole == outcome.segment
            assert outcome.size_bytes == len(whole.encode())
            head, _, rest = outcome.shown.partition("\n\n[bytes 0 to ")
            pages.append(head)
            offset: int | None = int(rest.split()[0])
            await at.place.kernel.segments.put(holding.view.account, head)
            await _show(holding, outcome.segment)
            number = 0
            while offset is not None:
                number += 1
                page = call(Verb.READ, id=f"r{number}", handle=outcome.segment[:16], offset=offset)
                text, _, rest = (await at.gate.call(holding, page)).shown.partition("\n\n[bytes ")
                pages.append(text)
                offset = int(rest.split()[2]) if rest else None
            beyond = await at.gate.call(holding, call(Verb.READ, id="b", handle=outcome.segment[:16], offset=1 << 30))
            strange = await at.gate.call(holding, call(Verb.READ, id="s", handle="0" * 16))
            assert (beyond.error, strange.error) == ("beyond_the_end", "not_found")
            await holding.exit(Reason.OK)

        at.place.bodies["plain"] = body
        assert (await at.place.over(await at.spawn())).reason is Reason.OK
        assert "".join(pages) == whole and len(pages) > 3
        assert all(len(page.encode()) <= 256 for page in pages)


async def _show(holding: Holding, whole: str) -> None:
    """What an agent's log says once a model was shown the head of a result."""
    shown = Segment(id="t1", hash=whole, kind="tool", tokens=9, whole=whole, whole_bytes=1)
    await holding.append(Draft(body=CtxChanged(add=(shown,))))


async def test_a_person_approves_each_call_of_what_the_program_says(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        calls = at.program(tool("buy", {"what": "a hat"}), tool("buy", {"what": "a cat"}, id="c2"))
        pid = await at.spawn()
        head = await at.asking(pid, Reason.PERMISSION)
        assert head.about == ("c1",) and at.done(pid) == []
        await at.answer(pid, {"nonsense": 1})
        head = await at.asking(pid, Reason.PERMISSION, after=head.seq)
        await at.answer(pid, {"approve": True})
        await at.place.until(pid, State.ASKING, reason="permission", after=head.seq + 3)
        assert at.done(pid) == ["buy a hat -"]
        await at.answer(pid, {"approve": False, "why": "too furry"})
        await at.place.over(pid)
        assert at.done(pid) == ["buy a hat -"]
        assert await at.calls_of(pid, "c1") == ["intent", "approved", "started", "done"]
        assert await at.calls_of(pid, "c2") == ["intent", "denied"]
        assert calls.outcomes["c2"].shown == "Error (refused): A person refused this call: too furry"


@on_sqlite
async def test_calls_that_wait_do_not_hold_up_those_that_do_not(
    database: Database, database_settings: Settings
) -> None:
    """What a durable function does that gathers: all is begun, then it parks for what is left."""
    async with gated(database, database_settings) as at:
        done: list[Any] = []

        async def body(holding: Holding) -> None:
            await holding.take_mail()
            await at.gate.finish_open(holding, also=keep, partly=True)
            waits = []
            for syscall in (call(Verb.ASK, id="a", question="Why?"), tool("look", id="b")):
                if syscall.call_id not in holding.view.syscalls.ended:
                    outcome = await at.gate.attempt(holding, syscall, also=keep)
                    waits += [outcome] if not hasattr(outcome, "shown") else []
            if waits:
                await at.gate.park(holding, waits)
            await holding.exit(Reason.OK)

        async def keep(outcome: Any) -> Any:
            done.append(outcome.value)
            return ()

        at.place.bodies["plain"] = body
        pid = await at.spawn()
        await at.asking(pid, Reason.INPUT)
        assert done == ["look is done"]
        await at.answer(pid, "Because.")
        await at.place.over(pid)
        assert done == ["look is done", "Because."]


async def test_nothing_is_left_to_spend_and_the_call_waits_for_more(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        kernel = at.place.kernel
        calls = at.program(tool("look"), tool("look", id="c2"))
        pid = await at.spawn(budget=Allowance(calls=1))
        head = await at.asking(pid, Reason.BUDGET)
        assert set(calls.outcomes) == {"c1"} and await at.calls_of(pid, "c2") == []
        assert head.used["calls"] == 1
        await kernel.top_up(ACCOUNT, pid, Allowance(calls=1), source="user:test", external_id="more")
        assert (await at.place.over(pid)).used["calls"] == 2
        assert set(calls.outcomes) == {"c1", "c2"}


async def held(at: Gated, pid: str) -> list[int]:
    """How long each try of its calls might take."""
    reserved = [body for _, body in await at.log(pid) if isinstance(body, BudgetReserved)]
    return [body.amount for body in reserved if body.meter == "seconds_ms"]


@on_sqlite
async def test_a_call_has_no_more_time_than_is_left_of_its_budget(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        calls = at.program(tool("look", {"hold": True}))
        pid = await at.spawn(budget=Allowance(seconds=1))
        await at.asking(pid, Reason.BUDGET)
        assert not calls.outcomes, "its tool did not run over its own deadline"
        at.go(pid)
        await at.place.kernel.top_up(ACCOUNT, pid, Allowance(seconds=60), source="user:test", external_id="more")
        assert (await at.place.over(pid)).used["seconds_ms"] >= 1000
        assert calls.outcomes["c1"].value == "look is done"
        (intent,) = [body for _, body in await at.log(pid) if isinstance(body, CallIntent)]
        assert intent.deadline_ms == 20_000
        assert await held(at, pid) == [1_000, 20_000]


async def test_what_running_calls_hold_of_a_budget_is_waited_for(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        waited: list[Any] = []

        async def body(holding: Holding) -> None:
            await holding.take_mail()
            first = asyncio.create_task(at.gate.call(holding, tool("look", {"hold": True})))
            await at.started(holding.pid, "look")
            waited.append(await at.gate.attempt(holding, tool("look", id="c2")))
            at.go(holding.pid)
            waited.append((await first).error)
            await at.gate.park(holding, [waited[0]])

        async def then(holding: Holding) -> None:
            await holding.take_mail()
            waited.append([signal.signal for signal in holding.view.signals])
            await at.gate.finish_open(holding)
            waited.append(list(holding.view.signals))
            await holding.exit(Reason.OK)

        at.place.bodies["plain"] = body
        pid = await at.spawn(budget=Allowance(calls=1))
        await at.place.until(pid, State.WAITING)
        at.place.bodies["plain"] = then
        await at.place.over(pid)
        assert waited[2:] == [[SignalKind.TIMER], []]
        assert (waited[0].state, waited[0].reason, waited[0].about) == (State.WAITING, Reason.TOOL, ("c2",))
        assert waited[0].due_ms is not None and waited[1] == ""
        assert await at.calls_of(pid, "c2") == []

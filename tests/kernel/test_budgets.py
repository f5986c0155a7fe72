"""Budgets of processes: they end an answer in its middle, park what they end with its work intact, and let it go on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import Conflict, InvalidRequest, NotFound
from nimbos.kernel import Head, Reason, SignalKind, State
from nimbos.kernel.events import BudgetExhausted, BudgetReserved, BudgetSettled, ModelPartial, SignalReceived
from nimbos.kernel.gate import Syscall
from nimbos.kernel.words import Verb
from nimbos.ledger import Allowance, Budget, Price, budgets_of, set_budget, set_prices
from tests.kernel.gating import FILES, MANIFEST, TOOLS, Gated, call, gated, tool
from tests.kernel.minds import ACCOUNT, Minds, calling, minds, words
from tests.kernel.running import PATIENCE_S

HELD = State.ASKING, Reason.BUDGET


async def spent(place: Minds, pid: str, *, after: int = 0) -> Head:
    return await place.until(pid, State.ASKING, reason="budget", after=after)


async def give(place: Minds, pid: str, *, id: str = "first", **amounts: int) -> bool:
    return await place.kernel.top_up(ACCOUNT, pid, Allowance(**amounts), source="user:test", external_id=id)


async def budgets(database: Database, pid: str) -> dict[str, Budget]:
    return {budget.meter: budget for budget in await database.run(lambda: budgets_of("process", pid))}


def script(*replies: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    return {"replies": list(replies), "default": default}


async def test_a_budget_ends_an_answer_at_its_last_token_and_a_top_up_lets_it_go_on_from_there(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, script(default=words(200))) as place:
        program = await place.program()
        free = await place.run(program)
        whole, undisturbed = await place.result(free), await place.billed(free)

        pid = await place.run(program, budget=Allowance(tokens=100))
        head = await spent(place, pid)
        own = await budgets(database, pid)
        assert (own["tokens"].limit, own["tokens"].used, own["tokens"].reserved) == (100, 100, 0)
        ended = [body for body in await place.bodies_of(pid) if isinstance(body, BudgetExhausted)]
        assert [(body.meter, body.limit, body.used) for body in ended] == [("tokens", 100, 100)]
        assert ended[0].owner == "process 'agent'"
        said = "".join(body.text for body in await place.bodies_of(pid) if isinstance(body, ModelPartial))
        assert said and whole.startswith(said), "what was said is in the log"

        assert await give(place, pid, tokens=60, id="little")
        head = await spent(place, pid, after=head.seq)
        assert (await budgets(database, pid))["tokens"].used == 160
        assert await give(place, pid, tokens=10_000, id="enough")
        assert await place.result(pid) == whole
        billed = await place.billed(pid)
        assert billed.output == undisturbed.output == 200
        assert billed.input == undisturbed.input, "its prompt was paid for once"
        settled = [body for body in await place.bodies_of(pid) if isinstance(body, BudgetSettled)]
        assert sum(body.used.get("tokens", 0) for body in settled) == billed.input + billed.output


async def test_a_budget_of_money_ends_an_answer_as_well(database: Database, database_settings: Settings) -> None:
    await database.run(lambda: set_prices([Price(meter="output", micros_per_million=1_000_000)]))
    async with minds(database, database_settings, script(default=words(200))) as place:
        pid = await place.run(await place.program("[budget]\ncost = 0.00005\n"))
        await spent(place, pid)
        own = await budgets(database, pid)
        assert (own["cost_micros"].limit, own["cost_micros"].used) == (50, 50)
        assert await give(place, pid, cost_micros=1_000)
        await place.result(pid)
        assert (await budgets(database, pid))["cost_micros"].used == 200


async def test_a_limit_that_is_given_leaves_the_programs_other_limits_as_they_are(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, script(default=words(2))) as place:
        program = await place.program("[budget]\ntokens = 700\ncost = 0.5\ncalls = 9\n")
        pid = await place.run(program, budget=Allowance(tokens=1_000, calls=0))
        assert {meter: budget.limit for meter, budget in (await budgets(database, pid)).items()} == {
            "tokens": 1_000,
            "cost_micros": 500_000,
            "seconds_ms": None,
            "calls": 0,
        }
        await place.result(pid)


async def test_the_same_top_up_is_given_once_and_a_process_that_is_over_gets_none(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, script(default=words(200))) as place:
        pid = await place.run(await place.program(), budget=Allowance(tokens=20))
        head = await spent(place, pid)
        assert await give(place, pid, tokens=10, id="x")
        await spent(place, pid, after=head.seq)
        assert not await give(place, pid, tokens=10, id="x")
        assert (await budgets(database, pid))["tokens"].limit == 30
        with pytest.raises(InvalidRequest):
            await give(place, pid, tokens=-5, id="less")
        with pytest.raises(NotFound):
            await give(place, "proc_nobody", tokens=5)
        assert await give(place, pid, tokens=10_000, id="enough")
        await place.result(pid)
        limit = (await budgets(database, pid))["tokens"].limit
        with pytest.raises(Conflict):
            await give(place, pid, tokens=5, id="late")
        assert (await budgets(database, pid))["tokens"].limit == limit
        assert (await place.view(pid)).signals == [], "no top-up is left unread"


async def test_what_is_left_is_too_little_for_the_prompt(database: Database, database_settings: Settings) -> None:
    async with minds(database, database_settings, script(default=words(3))) as place:
        pid = await place.run(
            await place.program(), "a goal of more than five words, that is", budget=Allowance(tokens=5)
        )
        await spent(place, pid)
        assert (await budgets(database, pid))["tokens"].used == 0, "nothing was asked"
        assert await give(place, pid, tokens=100)
        await place.result(pid)


async def test_the_budget_of_the_key_parks_a_process_too_and_raising_it_is_another_way_on(
    database: Database, database_settings: Settings
) -> None:
    async def limit(tokens: int) -> None:
        await database.run(
            lambda: set_budget("key", ACCOUNT.key, owner_name="laptop", meter="tokens", limit=tokens, period="total")
        )

    async with minds(database, database_settings, script(default=words(200))) as place:
        await limit(80)
        pid = await place.run(await place.program())
        await spent(place, pid)
        ended = [body for body in await place.bodies_of(pid) if isinstance(body, BudgetExhausted)]
        assert ended[-1].owner == "key 'laptop'"
        head = await place.head(pid)
        await place.send(pid, SignalKind.RESUME)
        await spent(place, pid, after=head.seq)
        await limit(1_000)
        await place.send(pid, SignalKind.RESUME)
        assert len((await place.result(pid)).split()) == 200


CHILD = '[tools]\nbuiltin = ["spawn", "wait"]\n'


async def test_a_childs_exhaustion_parks_the_child_and_tells_its_parent(
    database: Database, database_settings: Settings
) -> None:
    says = script(
        {"match": "^parent$", **calling("spawn", input="child", budget={"tokens": 60})},
        {"match": "pid", **calling("wait")},
        {"match": "out of budget", "text": "It ran out."},
        {"match": "exited", "text": "It is done."},
        default=words(100),
    )
    async with minds(database, database_settings, says) as place:
        parent = await place.run(await place.program(CHILD), "parent", budget=Allowance(tokens=1_000))
        told = await heard(place, parent)
        (child,) = (await place.view(parent)).children
        assert (await place.head(child)).reason is Reason.BUDGET
        assert (told.signal, told.source, told.about) == (SignalKind.MESSAGE, f"process:{child}", child)
        assert (await budgets(database, parent))["tokens"].used >= 60, "the child spends its parent's"
        await give(place, child, tokens=1_000)
        await place.result(child)
        assert await place.result(parent) in ("It is done.", "It ran out.")
        assert (await budgets(database, parent))["tokens"].limit == 2_000, "what came from outside came through it"


async def heard(place: Minds, pid: str) -> SignalReceived:
    """The first signal that a process is sent."""
    async with asyncio.timeout(PATIENCE_S):
        with place.kernel.bells.follow(pid) as follower:
            while True:
                follower.news.clear()
                for body in await place.bodies_of(pid):
                    if isinstance(body, SignalReceived):
                        return body
                await follower.news.wait()


async def test_a_parent_cannot_give_a_child_more_than_it_has_left(
    database: Database, database_settings: Settings
) -> None:
    says = script(
        {"match": "^parent$", **calling("spawn", input="child", budget={"tokens": 5_000})},
        {"match": "cannot give", "text": "Too little."},
        default=words(1),
    )
    async with minds(database, database_settings, says) as place:
        pid = await place.run(await place.program(CHILD), "parent", budget=Allowance(tokens=1_000))
        assert await place.result(pid) == "Too little."
        assert (await place.view(pid)).children == {}


async def test_children_at_the_same_time_never_spend_a_token_twice(
    database: Database, database_settings: Settings
) -> None:
    """Four times a hundred words, of a budget for half of them; a top-up of the parent lets all of them end."""
    spawns = {"text": "", "tool_calls": [{"name": "spawn", "arguments": {"input": f"part {n}"}} for n in range(4)]}
    says = script(
        {"match": "^parent$", **spawns},
        {"match": "pid", **calling("wait")},
        {"match": "running", "text": "All are done."},
        default=words(100),
    )
    async with minds(database, database_settings, says) as place:
        parent = await place.run(await place.program(CHILD), "parent", budget=Allowance(tokens=500))
        await spent_somewhere(place, parent)
        tokens = (await budgets(database, parent))["tokens"]
        assert tokens.limit == 500
        assert tokens.used + tokens.reserved <= 500
        assert await give(place, parent, tokens=100_000)
        await place.result(parent)
        family = await place.kernel.tree(ACCOUNT, parent)
        assert len(family) == 5
        assert {head.reason for head in family} == {Reason.OK}
        billed = [await place.billed(head.pid) for head in family]
        tokens = (await budgets(database, parent))["tokens"]
        assert (tokens.used, tokens.reserved) == (sum(usage.input + usage.output for usage in billed), 0)


async def spent_somewhere(place: Minds, parent: str) -> None:
    """Until nothing of the family goes on by itself, and the budget is why."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            family = await place.kernel.tree(ACCOUNT, parent)
            states = {(head.state, head.reason) for head in family}
            going = any(head.state in (State.READY, State.RUNNING) for head in family)
            if HELD in states and not going:
                return
            await asyncio.sleep(0.01)  # five processes; none of them is the one to wait for


async def test_the_last_call_is_the_last_until_there_are_more(database: Database, database_settings: Settings) -> None:
    async with gated(database, database_settings) as gate:
        gate.program(*(tool("look", id=f"c{n}") for n in range(3)))
        pid = await gate.spawn(budget=Allowance(calls=2))
        await gate.asking(pid, Reason.BUDGET)
        assert gate.done(pid) == ["look -", "look -"]
        own = await budgets(database, pid)
        assert (own["calls"].limit, own["calls"].used, own["calls"].reserved) == (2, 2, 0)
        assert await more(gate, pid, calls=1)
        assert (await gate.place.over(pid)).reason is Reason.OK
        assert gate.done(pid) == ["look -"] * 3


async def test_a_call_is_ended_when_the_seconds_are_and_made_again_when_there_are_more(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as gate:
        calls = gate.program(tool("look", {"hold": True}, id="c1"), tool("look", id="c2"))
        pid = await gate.spawn(budget=Allowance(seconds=1))
        await gate.asking(pid, Reason.BUDGET)
        assert not calls.outcomes, "of twenty seconds that it was allowed, one was left"
        ended = [body for kind, body in await gate.log(pid) if kind == "budget.exhausted"]
        assert [(body.meter, body.limit) for body in ended] == [("seconds_ms", 1_000)]
        own = await budgets(database, pid)
        assert own["seconds_ms"].used >= 1_000
        assert own["seconds_ms"].reserved == own["calls"].reserved == own["calls"].used == 0, "it holds nothing"
        gate.go(pid)
        assert await more(gate, pid, seconds=60)
        assert (await gate.place.over(pid)).reason is Reason.OK
        assert [outcome.value for outcome in calls.outcomes.values()] == ["look is done"] * 2
        own = await budgets(database, pid)
        assert own["seconds_ms"].used >= 1_000
        assert own["seconds_ms"].reserved == own["calls"].reserved == 0
        assert own["calls"].used == 2


async def test_each_try_of_a_call_is_paid(database: Database, database_settings: Settings) -> None:
    async with gated(database, database_settings) as gate:
        pid, _ = await gate.run(tool("dies"))
        tries = await settled(gate, pid)
        assert [used["calls"] for used in tries] == [0, 0, 1], "it is one call"
        assert all(used["seconds_ms"] > 0 for used in tries)
        own = (await budgets(database, pid))["seconds_ms"]
        assert (own.used, own.reserved) == (sum(used["seconds_ms"] for used in tries), 0)


async def test_another_try_needs_seconds_of_its_own(database: Database, database_settings: Settings) -> None:
    async with gated(database, database_settings) as gate:
        gate.program(tool("pay", {"hold": True}))
        pid = await gate.spawn(budget=Allowance(seconds=1))
        await gate.asking(pid, Reason.BUDGET)
        assert len(gate.done(pid)) == 1, "what was given went into the first try"
        own = (await budgets(database, pid))["seconds_ms"]
        assert own.used >= 1_000 and own.reserved == 0
        gate.go(pid)
        assert await more(gate, pid, seconds=60)
        assert (await gate.place.over(pid)).reason is Reason.OK
        assert len(gate.done(pid)) == 2 and len(set(gate.done(pid))) == 1
        assert [used["calls"] for used in await settled(gate, pid)] == [0, 1]
        own = (await budgets(database, pid))["seconds_ms"]
        assert own.used > 1_000 and own.reserved == 0
        held = [body for _, body in await gate.log(pid) if isinstance(body, BudgetReserved)]
        tries = [body.amount for body in held if body.meter == "seconds_ms"]
        assert tries == [1_000, 20_000], "the second has the tool's own deadline"


async def test_the_start_of_its_process_is_paid_by_the_call_that_waits_for_it(
    database: Database, database_settings: Settings
) -> None:
    slow = {
        **FILES,
        "nimbos.toml": MANIFEST.replace(b"caller", b"slow"),
        "tools.py": b"import time\ntime.sleep(0.3)\n" + TOOLS,
    }
    async with gated(database, database_settings) as gate:
        await gate.place.kernel.programs.put(ACCOUNT, slow)
        gate.program(tool("look"))
        for _ in range(2):  # what tools there are is asked once for a program, and before its first call
            pid = await gate.place.kernel.spawn(ACCOUNT, "slow", {}, name="plain")
            assert (await gate.place.over(pid)).reason is Reason.OK
        (used,) = await settled(gate, pid)
        assert used["seconds_ms"] >= 300


async def settled(gate: Gated, pid: str) -> list[dict[str, int]]:
    return [body.used for _, body in await gate.log(pid) if isinstance(body, BudgetSettled)]


async def test_what_a_killed_process_held_for_a_call_is_not_held_for_ever(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as gate:
        gate.program(tool("mail", {"hold": True}))
        pid = await gate.spawn(budget=Allowance(calls=5, seconds=50))
        await gate.started(pid, "mail")
        assert (await budgets(database, pid))["calls"].reserved == 1
        await gate.place.send(pid, SignalKind.KILL)
        assert (await gate.place.over(pid)).reason is Reason.KILLED
        own = await budgets(database, pid)
        assert (own["calls"].used, own["calls"].reserved, own["seconds_ms"].reserved) == (1, 0, 0)


async def more(gate: Gated, pid: str, **amounts: int) -> bool:
    from tests.kernel.running import ACCOUNT as GATED

    return await gate.place.kernel.top_up(GATED, pid, Allowance(**amounts), source="user:test", external_id="more")


async def test_what_a_tree_cost_is_told_by_process(database: Database, database_settings: Settings) -> None:
    await database.run(lambda: set_prices([Price(meter="output", micros_per_million=1_000_000)]))
    says = script(
        {"match": "^parent$", **calling("spawn", input="child")},
        {"match": "pid", **calling("wait")},
        {"match": "exited", "text": "Done."},
        default=words(40),
    )
    async with minds(database, database_settings, says) as place:
        parent = await place.run(await place.program(CHILD), "parent", budget=Allowance(tokens=10_000))
        await place.result(parent)
        (child,) = (await place.view(parent)).children
        cost = await place.kernel.cost(ACCOUNT, parent)
        assert [(share.pid, share.parent, share.state) for share in cost.processes] == [
            (parent, None, State.DONE),
            (child, parent, State.DONE),
        ]
        own, other = await place.billed(parent), await place.billed(child)
        assert cost.processes[1].used == {"asks": 1, "input": other.input, "output": 40, "cost_micros": 40}
        assert cost.used["output"] == own.output
        assert cost.total["output"] == own.output + 40
        assert cost.total["cost_micros"] == own.output + 40
        assert cost.total["asks"] == 4
        left = {budget.meter: budget for budget in cost.budgets}
        assert left["tokens"].used == own.input + own.output + other.input + 40
        assert (left["tokens"].limit, left["calls"].limit) == (10_000, None)


async def test_a_parent_gives_a_child_more_of_its_own_and_the_child_goes_on(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as gate:
        calls: list[Syscall] = [call(Verb.SPAWN, id="s", input={}, name="child", budget={"calls": 1})]
        gate.program(*(tool("look", id=f"c{n}") for n in range(3)), name="child")
        parent = gate.program(*calls, call(Verb.ASK, id="a1", question="?"), name="parent")
        pid = await gate.spawn("parent", budget=Allowance(calls=3))
        await gate.asking(pid, Reason.INPUT)
        child = parent.outcomes["s"].child
        held = await gate.asking(child, Reason.BUDGET)

        more = {"to": child, "message": "go on"}
        parent.syscalls = (
            *parent.syscalls,
            call(Verb.SEND, id="much", **more, budget={"calls": 3}),
            call(Verb.SEND, id="stranger", to=pid, message="mine", budget={"calls": 1}),
            call(Verb.SEND, id="one", **more, budget={"calls": 1}),
            call(Verb.ASK, id="a2", question="?"),
            call(Verb.SEND, id="another", **more, budget={"calls": 1}),
            call(Verb.WAIT, id="w"),
        )
        await gate.answer(pid, "yes")
        await gate.asking(child, Reason.BUDGET, after=held.seq)
        assert gate.done(child) == ["look -"] * 2
        assert "has 2 calls left, and cannot give 3" in parent.outcomes["much"].value
        assert "only what is one's own" in parent.outcomes["stranger"].value
        assert parent.outcomes["one"].error == ""
        await gate.asking(pid, Reason.INPUT)
        await gate.answer(pid, "yes")
        assert (await gate.place.over(pid)).reason is Reason.OK
        assert gate.done(child) == ["look -"] * 3
        own, other = await budgets(database, pid), await budgets(database, child)
        assert (own["calls"].limit, own["calls"].used) == (3, 3), "its own limit stays, and nothing was spent twice"
        assert (other["calls"].limit, other["calls"].used) == (3, 3)


async def test_a_wait_lets_a_parent_out_that_can_give_its_child_more(
    database: Database, database_settings: Settings
) -> None:
    """Once for each time that the child parks, and what it was told so is no message besides."""
    async with gated(database, database_settings) as gate:
        gate.program(*(tool("look", id=f"c{n}") for n in range(3)), name="child")
        spawning = call(Verb.SPAWN, id="s", input={}, name="child", budget={"calls": 1})
        parent = gate.program(spawning, call(Verb.WAIT, id="w1"), call(Verb.ASK, id="a", question="?"), name="parent")
        pid = await gate.spawn("parent")
        await gate.asking(pid, Reason.INPUT)
        child = parent.outcomes["s"].child
        told = parent.outcomes["w1"].value
        assert (told["exited"], told["running"]) == ({}, [child])
        assert "is out of budget and waits: 1 of 1 calls" in told["asking"][child]

        more = {"to": child, "message": "go on", "budget": {"calls": 1}}
        parent.syscalls = (
            *parent.syscalls,
            call(Verb.SEND, id="one", **more),
            call(Verb.WAIT, id="w2"),
            call(Verb.SEND, id="another", **more),
            call(Verb.WAIT, id="w3", asking=False),
        )
        await gate.answer(pid, "yes")
        assert (await gate.place.over(pid)).reason is Reason.OK
        assert list(parent.outcomes["w2"].value["asking"]) == [child]
        assert parent.outcomes["w3"].value == {"exited": {child: {"reason": "ok", "result": None}}, "running": []}
        kinds = [body.signal for _, body in await gate.log(pid) if isinstance(body, SignalReceived)]
        assert kinds.count(SignalKind.MESSAGE) == 2, "it was told of each by its wait"


async def test_a_function_that_wants_to_know_is_told_that_a_child_is_out_of_budget(
    database: Database, database_settings: Settings
) -> None:
    main = b"""
from nimbos.adk import send, spawn, wait

async def main(input):
    part = await spawn("agents", "child", budget={"tokens": 60})
    (stuck,) = await wait(part, asking=True)
    await send(part, "go on", budget={"tokens": 1000})
    (ended,) = await wait(part)
    return [stuck.reason, "out of budget" in stuck.error, len(ended.value().split())]
"""
    async with minds(database, database_settings, script(default=words(100))) as place:
        await place.kernel.programs.put(ACCOUNT, {"nimbos.toml": b'name = "agents"\n', "instructions.md": b"Talk."})
        program = await place.program('entry = "main.py:main"\n', {"main.py": main})
        pid = await place.run(program, budget=Allowance(tokens=5_000))
        assert await place.result(pid) == ["asking", True, 100]

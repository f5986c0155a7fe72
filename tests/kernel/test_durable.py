"""Durable functions: code that runs from the top again and again, and does each thing once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from textwrap import dedent, indent
from time import monotonic
from typing import Any

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason, SignalKind, State, outward, runner
from nimbos.kernel import durable as durables
from nimbos.kernel.events import BudgetSettled, CallDone, CallIntent, ModelIntent, Note, ProcState
from nimbos.kernel.tools.turns import Turns
from nimbos.kernel.words import Verb
from nimbos.ledger import Allowance, set_limit
from tests.databases import put_file
from tests.kernel.minds import ACCOUNT, Minds, minds
from tests.kernel.running import PATIENCE_S

TOOLS = '''
import time
from pathlib import Path
from nimbos.adk import tool

def _do(what: str) -> int:
    with open("done.txt", "a") as file:
        file.write(what + "\\n")
    return len(Path("done.txt").read_text().splitlines())

@tool(effect="opaque")
def mail(to: str, hold: bool = False) -> str:
    """Sends."""
    _do(f"mail {to}")
    while hold and not Path("go").exists():
        time.sleep(0.01)
    return f"sent to {to}"

@tool(effect="pure")
def count() -> int:
    """How often anything was done here."""
    return _do("count")

@tool(effect="pure", deadline_s=0.5)
def hang() -> None:
    """Never returns."""
    while True:
        time.sleep(60)

@tool(effect="pure", deadline_s=2)
def half_a_second(number: int) -> int:
    """Takes a while."""
    time.sleep(0.5)
    return number

@tool(effect="pure")
def fails() -> None:
    """Raises."""
    raise ValueError("not today")
'''
SCRIPT = {
    "replies": [
        {"match": "^one$", "text": "1"},
        {"match": "^two$", "text": "2"},
        {"match": "^number$", "text": '{"value": 42}'},
        {"match": "^long$", "text": "word " * 400},
    ],
    "default": {"text": "I do not know."},
}


# The worker's own socket, in the hand of a program that means harm.
LINE = "import os, socket, sys; socket.socket(fileno=os.dup(int(sys.argv[1])))"


def function(body: str, *, also: str = "") -> dict[str, bytes]:
    """A program whose `main(input)` has this body."""
    lines = indent(dedent(body).strip(), "    ")
    head = "from pathlib import Path\nfrom nimbos.adk import *\n"
    return {
        "main.py": f"{head}{also}\nasync def main(input):\n{lines}\n".encode(),
        "tools.py": TOOLS.encode(),
    }


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[tuple[Database, Settings]]:
    """For what has many cases and nothing to do with the database."""
    put_file(tmp_path)
    settings = Settings(home=str(tmp_path))
    database = await Database.open(settings)
    yield database, settings
    await database.close()


async def start(
    place: Minds,
    body: str,
    *,
    also: str = "",
    manifest: str = "",
    input: Any = None,
    budget: Allowance | None = None,
) -> str:
    program = await place.program(f'entry = "main.py:main"\n{manifest}', function(body, also=also))
    return await place.run(program, input, budget=budget)


def done(place: Minds, pid: str) -> list[str]:
    file = place.kernel.workspaces.path(pid) / "done.txt"
    return file.read_text().splitlines() if file.exists() else []


async def asks_of(place: Minds, pid: str) -> int:
    return sum(isinstance(body, ModelIntent) for body in await place.bodies_of(pid))


async def answer(place: Minds, pid: str, body: Any) -> None:
    head = await place.head(pid)
    view = await place.view(pid)
    about = next(name for name in view.about if name in view.calls)
    await place.kernel.signal(
        ACCOUNT, pid, SignalKind.ANSWER, source="user:test", external_id=f"a{head.seq}", about=about, body=body
    )


async def test_a_function_thinks_calls_and_returns(database: Database, database_settings: Settings) -> None:
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(
            place,
            """
            first = await think("one")
            sent = await call("mail", to=input["name"])
            number = await think("number", schema={"type": "object"})
            return [first, sent, number["value"]]
            """,
            input={"name": "Ada"},
        )
        assert await place.result(pid) == ["1", "sent to Ada", 42]
        view = await place.view(pid)
        assert len(view.steps) == 3 and view.reason is Reason.OK
        billed = await place.billed(pid)
        assert view.used["tokens"] == billed.input + billed.output > 0


async def test_a_function_that_parks_loses_its_process_and_does_nothing_twice(
    database: Database, database_settings: Settings
) -> None:
    body = """
first = await think("one")
await call("mail", to="Ada")
said = await ask("Go on?")
second = await think("two")
return [first, said, second]
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body)
        head = await place.until(pid, State.ASKING)
        assert head.reason is Reason.INPUT
        assert (await asks_of(place, pid), done(place, pid)) == (1, ["mail Ada"])
        await answer(place, pid, "yes")
        assert await place.result(pid) == ["1", "yes", "2"]
        assert (await asks_of(place, pid), done(place, pid)) == (2, ["mail Ada"])


async def test_what_runs_at_once_parks_when_all_of_it_waits_and_any_of_it_wakes(
    database: Database, database_settings: Settings
) -> None:
    body = """
async def later():
    await sleep(0.05)
    return await think("two")
return await gather(ask("Go on?"), think("one"), later())
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body)
        async with asyncio.timeout(PATIENCE_S):
            while await asks_of(place, pid) < 2:  # the sleep woke it while the question stood
                await place.until(pid, State.ASKING, after=(await place.head(pid)).seq - 1)
                await asyncio.sleep(0)
        await place.until(pid, State.ASKING)
        await answer(place, pid, "yes")
        assert await place.result(pid) == ["yes", "1", "2"]
        assert await asks_of(place, pid) == 2


async def test_steps_that_are_alike_are_told_apart_by_their_number(
    database: Database, database_settings: Settings
) -> None:
    body = """
first = [await call("count"), await call("count")]
await ask("Go on?")
return [*first, await call("count")]
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body)
        await place.until(pid, State.ASKING)
        await answer(place, pid, None)
        assert await place.result(pid) == [1, 2, 3]


async def test_map_and_reduce_over_children_is_one_line_each(database: Database, database_settings: Settings) -> None:
    also = """
@child
async def square(n):
    await think("one")
    return n * n
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, "return sum(await each(square, input))", also=also, input=[1, 2, 3])
        assert await place.result(pid) == 14
        view = await place.view(pid)
        assert len(view.children) == 3
        assert {child.exited for child in view.children.values()} == {Reason.OK}


async def test_best_of_n_is_one_line(database: Database, database_settings: Settings) -> None:
    also = """
@child
async def draft(n):
    return "x" * n
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, "return max(await each(draft, [2, 5, 3]), key=len)", also=also)
        assert await place.result(pid) == "xxxxx"


async def test_a_child_that_fails_is_an_error_with_its_reason(database: Database, database_settings: Settings) -> None:
    also = """
@child
async def draft(n):
    raise ValueError("no idea")
"""
    body = """
try:
    await (await spawn(draft)).result()
except StepFailed as failed:
    return [failed.code, failed.message]
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body, also=also)
        code, message = await place.result(pid)
        assert code == "child_failed" and "ValueError: no idea" in message


@pytest.mark.parametrize(
    ("step", "code", "says"),
    [
        ('call("fails")', "raised", "ValueError: not today"),
        ('call("nothing")', "denied", "no tool 'nothing'"),
        ('call("mail", wrong=1)', "denied", "to"),
        ('call("hang")', "deadline", "deadline"),
        ('sleep("long")', "denied", "seconds"),
        ('think("number", regex="[0-9]+")', "misfit", "[0-9]+"),
        ('think("one", model="nobody")', "model_not_found", "nobody"),
        ('think([{"role": "robot", "content": "x"}])', "invalid_request", "role"),
        ('think("one", seed="x")', "bad_step", "seed"),
        ('think("one", seed=2**64)', "bad_step", "seed"),
        ('think("one", max_tokens=0)', "bad_step", "max_tokens"),
        ('think("one", temperature=-1)', "bad_step", "temperature"),
        ('call("count", step_deadline_s=-1000)', "bad_step", "deadline_s"),
        ('spawn("nowhere")', "not_found", "nowhere"),
        ('send("proc_nobody", "x")', "not_found", "proc_nobody"),
    ],
)
async def test_a_step_that_goes_wrong_is_an_error_that_is_the_same_when_it_runs_again(
    sqlite: tuple[Database, Settings], step: str, code: str, says: str
) -> None:
    body = f"""
try:
    await {step}
except StepFailed as failed:
    said = [failed.code, failed.message]
open("said", "a").write(repr(said) + "\\n")
await ask("Go on?")
return said
"""
    async with minds(*sqlite, SCRIPT) as place:
        pid = await start(place, body)
        await place.until(pid, State.ASKING)
        await answer(place, pid, None)
        result = await place.result(pid)
        assert result[0] == code and says in result[1]
        first, again = (place.kernel.workspaces.path(pid) / "said").read_text().splitlines()[-2:]
        assert first == again


async def test_a_function_that_changes_does_the_new_step_and_says_what_it_did_not_ask_for_again(
    database: Database, database_settings: Settings
) -> None:
    body = """
runs = Path("runs")
runs.write_text(runs.read_text() + "x" if runs.exists() else "x")
sent = await call("mail", to=f"number {len(runs.read_text())}")
await ask("Go on?")
return sent
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body)
        await place.until(pid, State.ASKING)
        await answer(place, pid, None)
        assert await place.result(pid) == "sent to number 2"
        notes = [body for body in await place.bodies_of(pid) if isinstance(body, Note)]
        assert [note.about for note in notes] == ["changed_step"]
        assert "call:mail" in notes[0].text


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ValueError('not like that')", "ValueError: not like that (main.py:"),
        ("return object()", "cannot be said in JSON"),
        ("while True: pass", "between two steps"),
        ("import asyncio; await asyncio.Event().wait()", "between two steps"),
        ("import os; os._exit(3)", "died 3 times"),
        (f"{LINE}.sendall(bytes([2, 0, 0, 0])); await sleep(60)", "died 3 times at the same place: it sent a frame"),
        (
            f"{LINE}.sendall(pack(Step(number=1, verb='call', name='x', arguments=b'{{'))); await sleep(60)",
            "died 3 times at the same place: it asked for too many steps at once",
        ),
        ("await ask('?', name='x' * 5); return 1", ""),
    ],
)
async def test_a_function_that_cannot_go_on_ends_and_says_why(
    sqlite: tuple[Database, Settings], body: str, says: str
) -> None:
    async with minds(*sqlite, SCRIPT) as place:
        also = "from nimbos.toolwire import Step, pack"
        limit_s = 1.0 if says.startswith("between") else PATIENCE_S
        pid = await start(place, body, also=also, manifest=f"[limits]\ntool_deadline_s = {limit_s}\n")
        if not says:
            assert (await place.until(pid, State.ASKING)).reason is Reason.INPUT
            return
        head = await place.over(pid)
        assert head.reason is Reason.FAILED and says in head.error


async def test_calls_that_are_made_at_once_do_not_wait_for_each_other_within_their_deadlines(
    sqlite: tuple[Database, Settings],
) -> None:
    body = 'return await gather(*(call("half_a_second", number=number) for number in range(64)))'
    async with minds(*sqlite, SCRIPT) as place:
        assert await place.result(await start(place, body)) == list(range(64))


CHECKED = """
from pathlib import Path
from nimbos.adk import tool

def _booked(room: str, key: str) -> bool:
    return room == "booked"

@tool(effect="checkable", verify=_booked, deadline_s=0.1)
async def book(room: str, key: str) -> str:
    'Hangs, but for the second time.'
    import asyncio
    if not Path(room).exists():
        Path(room).touch()
        await asyncio.sleep(60)
    return room
"""


class Clock:
    """Of whoever measures what a call takes. `away_s`: what it is ahead by."""

    away_s = 0.0

    def monotonic(self) -> float:
        return monotonic() + self.away_s


@pytest.mark.parametrize("room", ["booked", "free"])
async def test_a_call_does_not_pay_for_the_time_it_waits_to_be_alone(
    sqlite: tuple[Database, Settings], monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    clock, take, turns = Clock(), Turns.take, list[float]()

    @asynccontextmanager
    async def late(self: Turns, *, alone: bool) -> AsyncIterator[None]:
        async with take(self, alone=alone):
            clock.away_s += 1_000
            turns.append(clock.away_s)
            yield

    monkeypatch.setattr(outward, "time", clock)
    monkeypatch.setattr(Turns, "take", late)
    async with minds(*sqlite, SCRIPT) as place:
        files = {**function("return await call('book', room=input)"), "tools.py": CHECKED.encode()}
        pid = await place.run(await place.program('entry = "main.py:main"\n', files), room)
        await place.over(pid)
        paid = [body.used["seconds_ms"] for body in await place.bodies_of(pid) if isinstance(body, BudgetSettled)]
        assert len(turns) >= 2 and paid and sum(paid) < 1_000_000


async def test_a_tool_that_hangs_takes_the_function_with_it_which_begins_anew(
    database: Database, database_settings: Settings
) -> None:
    body = """
open("runs", "a").write("x")
await call("mail", to="Ada")
try:
    await call("hang")
except StepFailed as failed:
    return [failed.code, len(Path("runs").read_text())]
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body)
        assert await place.result(pid) == ["deadline", 2]
        assert done(place, pid) == ["mail Ada"]


async def test_another_server_goes_on_where_this_one_was_closed(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
first = await think("one")
await call("mail", to="Ada", hold=True)
return [first, await think("two")]
"""
    monkeypatch.setattr(runner, "CALLS_GRACE_S", 0.0)  # as if it were killed
    async with minds(database, database_settings, SCRIPT, server="first") as place:
        pid = await start(place, body)
        async with asyncio.timeout(PATIENCE_S):
            while not done(place, pid):
                await asyncio.sleep(0.01)  # another process writes it, and rings no bell
    async with minds(database, database_settings, SCRIPT, server="second") as place:
        head = await place.until(pid, State.ASKING)
        assert head.reason is Reason.IN_DOUBT  # it was sent, or not: nobody here knows
        await answer(place, pid, {"verdict": "happened", "result": "sent, I saw it"})
        assert await place.result(pid) == ["1", "2"]
        assert done(place, pid) == ["mail Ada"]
        assert await asks_of(place, pid) == 2


async def test_an_effect_in_doubt_that_a_function_did_not_wait_for_is_asked_about_before_it_ends(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
if not Path("done.txt").exists():
    await call("mail", to="Ada", hold=True)
return "no need"
"""
    monkeypatch.setattr(runner, "CALLS_GRACE_S", 0.0)  # as if it were killed
    async with minds(database, database_settings, SCRIPT, server="first") as place:
        pid = await start(place, body)
        async with asyncio.timeout(PATIENCE_S):
            while not done(place, pid):
                await asyncio.sleep(0.01)
    async with minds(database, database_settings, SCRIPT, server="second") as place:
        assert (await place.until(pid, State.ASKING)).reason is Reason.IN_DOUBT
        await answer(place, pid, {"verdict": "abandon"})
        assert await place.result(pid) == "no need"
        assert done(place, pid) == ["mail Ada"]


async def test_a_model_that_its_key_may_never_ask_is_an_error_of_the_step(
    database: Database, database_settings: Settings
) -> None:
    body = """
try:
    await think("one")
except StepFailed as failed:
    return failed.code
"""
    await database.run(lambda: set_limit("key", ACCOUNT.key, requests_per_min=0))
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body)
        assert await place.result(pid) == "overloaded"
        assert (await place.head(pid)).epoch == 1


async def test_a_spent_budget_parks_it_with_its_work_and_a_top_up_goes_on(
    database: Database, database_settings: Settings
) -> None:
    body = """
first = await think("one")
rest = await gather(think("long", name="a"), think("long", name="b"), call("mail", to="Ada"))
return [first, len(rest[0].split()), len(rest[1].split()), rest[2]]
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body, budget=Allowance(tokens=300))
        assert (await place.until(pid, State.ASKING)).reason is Reason.BUDGET
        assert done(place, pid) == ["mail Ada"]
        await place.kernel.top_up(ACCOUNT, pid, Allowance(tokens=100_000), source="user:test", external_id="t1")
        assert await place.result(pid) == ["1", 400, 400, "sent to Ada"]
        assert done(place, pid) == ["mail Ada"]


async def test_a_fork_waits_at_an_effect_until_it_is_adopted_and_then_does_it_once(
    database: Database, database_settings: Settings
) -> None:
    body = """
    first = await think("one")
    said = await ask("Go on?")
    rest = await gather(call("mail", to=said), think("two"))
    return [first, *rest]
    """
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body)
        await place.until(pid, State.ASKING)
        (made,) = await place.kernel.fork(ACCOUNT, pid)
        await place.until(made, State.ASKING)
        await answer(place, pid, "Ada")
        assert await place.result(pid) == ["1", "sent to Ada", "2"]
        await answer(place, made, "Bob")
        assert (await place.until(made, State.WAITING)).reason is Reason.SIGNAL
        assert done(place, made) == []
        await place.kernel.adopt(ACCOUNT, made)
        assert await place.result(made) == ["1", "sent to Bob", "2"]
        assert (done(place, pid), done(place, made)) == (["mail Ada"], ["mail Bob"])
        assert not any(isinstance(body, Note) and body.about == "changed_step" for body in await place.bodies_of(made))


async def test_a_fork_of_a_fork_does_once_it_is_adopted_what_both_wait_at(
    database: Database, database_settings: Settings
) -> None:
    body = """
    said = await ask("Go on?")
    return await call("mail", to=said)
    """
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body)
        await place.until(pid, State.ASKING)
        (first,) = await place.kernel.fork(ACCOUNT, pid)
        await place.until(first, State.ASKING)
        await answer(place, first, "Bob")
        await place.until(first, State.WAITING, reason="signal")
        (second,) = await place.kernel.fork(ACCOUNT, first)
        await place.until(second, State.WAITING, reason="signal")
        await place.kernel.adopt(ACCOUNT, second)
        assert await place.result(second) == "sent to Bob"
        assert (done(place, first), done(place, second)) == ([], ["mail Bob"])
        await place.kernel.adopt(ACCOUNT, first)
        assert await place.result(first) == "sent to Bob"
        assert done(place, first) == ["mail Bob"]


async def test_a_fork_that_is_adopted_while_it_runs_does_what_it_withheld_and_does_not_wait_for_ever(
    database: Database, database_settings: Settings
) -> None:
    body = """
    said = await ask("Go on?")
    return await gather(call("mail", to=said), think("slow"))
    """
    slow = {"match": "^slow$", "text": "word " * 30, "tokens_per_second": 15}
    async with minds(database, database_settings, {**SCRIPT, "replies": [slow]}) as place:
        pid = await start(place, body)
        await place.until(pid, State.ASKING)
        (made,) = await place.kernel.fork(ACCOUNT, pid)
        await place.until(made, State.ASKING)
        await answer(place, made, "Bob")

        async def withheld() -> bool:
            return any(isinstance(one, CallDone) and one.withheld for one in await place.bodies_of(made))

        await place.when(made, withheld)
        assert (await place.head(made)).state is State.RUNNING  # in the middle of what it thinks
        await place.kernel.adopt(ACCOUNT, made)
        sent, _ = await place.result(made)
        assert sent == "sent to Bob"
        assert done(place, made) == ["mail Bob"]


async def test_a_flood_of_steps_ends_the_process(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durables, "STEPS_MAX", 20)
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, "while True: await sleep(0)")
        head = await place.over(pid)
        assert head.reason is Reason.FAILED and "more than 20 steps" in head.error


async def test_it_is_killed_in_the_middle_of_a_step(database: Database, database_settings: Settings) -> None:
    slow = {"replies": [{"match": "^slow$", "text": "word " * 5_000, "tokens_per_second": 50}]}
    async with minds(database, database_settings, slow) as place:
        pid = await start(place, 'return await think("slow")')
        await place.until_partial(pid)
        await place.kernel.signal(ACCOUNT, pid, SignalKind.KILL, source="user:test", external_id="k")
        assert (await place.over(pid)).reason is Reason.KILLED


async def test_it_is_paused_in_the_middle_of_a_step_and_goes_on_with_the_same_answer(
    database: Database, database_settings: Settings
) -> None:
    text = " ".join(f"w{number}" for number in range(300))
    slow = {"replies": [{"match": "^slow$", "text": text, "tokens_per_second": 200}]}
    async with minds(database, database_settings, slow) as place:
        pid = await start(place, 'return await think("slow")')
        await place.until_partial(pid)
        await place.kernel.signal(ACCOUNT, pid, SignalKind.PAUSE, source="user:test", external_id="p")
        await place.until(pid, State.PAUSED)
        await place.kernel.signal(ACCOUNT, pid, SignalKind.RESUME, source="user:test", external_id="r")
        assert await place.result(pid) == text
        billed = await place.billed(pid)
        assert billed.output == 300
        assert (await place.view(pid)).used["tokens"] == billed.input + billed.output


async def test_the_log_has_no_prompt_and_names_each_step(database: Database, database_settings: Settings) -> None:
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(
            place, 'return [await think("a secret", name="ask it"), await call("mail", to="a secret", step="look")]'
        )
        await place.result(pid)
        bodies = await place.bodies_of(pid)
        steps = [body.step for body in bodies if isinstance(body, ModelIntent | CallIntent)]
        assert [step.partition("#")[0] for step in steps] == ["ask it", "look"]
        events = [event async for event in place.kernel.log.all(pid)]
        assert all(b"secret" not in event.body for event in events)


async def test_a_function_receives_each_message_once_in_their_order(
    database: Database, database_settings: Settings
) -> None:
    body = """
early = await receive(timeout_s=0.01)
first, second = await gather(receive(), receive())
third = await receive()
late = await receive(timeout_s=0.01)
return [early, [one.body for one in (first, second, third)], first.sender, late]
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body)

        async def listens() -> bool:
            made = [body.verb for body in await place.bodies_of(pid) if isinstance(body, CallIntent)]
            return made.count(Verb.RECEIVE) == 3

        await place.when(pid, listens)
        await place.until(pid, State.WAITING, reason="signal")
        for words in ("one", {"two": 2}, "three"):
            await place.send(pid, SignalKind.MESSAGE, body=words)
        assert await place.result(pid) == [None, ["one", {"two": 2}, "three"], "user:test", None]
        assert (await place.view(pid)).signals == []


async def test_children_are_waited_for_by_several_steps_at_once(
    database: Database, database_settings: Settings
) -> None:
    also = """
@child
async def one(n):
    return n
"""
    body = """
first = await spawn(one, 1)
ended = await gather(wait(first), wait(first), wait(first, any_of=True))
return [each[0].result for each in ended]
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body, also=also)
        assert await place.result(pid) == [1, 1, 1]
        states = [body.to for body in await place.bodies_of(pid) if isinstance(body, ProcState)]
        assert (State.RUNNING, State.READY) not in pairwise(states), "no run of it was cut off"

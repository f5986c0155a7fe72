"""Children of a durable function: how many and how deep they may be, and what they may spend."""

from __future__ import annotations

import pytest

from nimbos.adk.steps import CHILD_KEY
from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import SignalKind, State, segments
from nimbos.kernel.segments import canonical
from nimbos.kernel.steps import Occurrences
from nimbos.ledger import Allowance
from nimbos.toolwire import Step
from tests.kernel.minds import ACCOUNT, calling, minds
from tests.kernel.test_durable import SCRIPT, function, start

GIVEN = {"input": {CHILD_KEY: "kid", "input": 7}}  # to a step that spawns it


async def test_each_has_no_more_children_at_a_time_than_its_program_may(
    database: Database, database_settings: Settings
) -> None:
    also = """
@child
async def square(n):
    return n * n
"""
    async with minds(database, database_settings, SCRIPT) as place:
        body = "return await each(square, input)"
        pid = await start(place, body, also=also, manifest="[limits]\nchildren = 2\n", input=[1, 2, 3, 1, 2])
        assert await place.result(pid) == [1, 4, 9, 1, 4]
        assert len((await place.view(pid)).children) == 5


async def test_a_start_with_any_key_does_not_stand_in_the_way_of_a_child(
    database: Database, database_settings: Settings
) -> None:
    body = "await receive()\nreturn await (await spawn(kid, 7)).result()"
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body, also="@child\nasync def kid(n):\n    return n\n")
        await place.until(pid, State.WAITING)
        asked = Occurrences().read(Step(number=1, verb="spawn", name="spawn", arguments=canonical(GIVEN)))
        program = (await place.head(pid)).program
        for key in (f"{pid}/{asked.call_id}", f"spawn {pid} {asked.call_id}"):
            await place.kernel.spawn(ACCOUNT, program, None, model="demo", key=key)
        await place.send(pid, SignalKind.MESSAGE, body="go")
        assert await place.result(pid) == 7
        (child,) = (await place.view(pid)).children
        assert (await place.head(child)).key.endswith(asked.call_id), "the key that was guessed is the child's"


async def test_where_there_may_be_no_children_each_says_so(database: Database, database_settings: Settings) -> None:
    body = """
try:
    await each(kid, [1])
except StepFailed as failed:
    return failed.code
"""
    also = "@child\nasync def kid(n): ..."
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body, also=also, manifest="[limits]\nchildren = 0\n")
        assert await place.result(pid) == "overloaded"


async def test_how_deep_a_tree_may_be_holds_for_those_below_as_well(
    database: Database, database_settings: Settings
) -> None:
    also = """
@child
async def deeper(left):
    try:
        return await (await spawn(deeper, left - 1)).result() + 1
    except StepFailed as failed:
        return 1 if failed.code == "invalid_request" and "2 deep" in failed.message else failed.code
"""
    async with minds(database, database_settings, SCRIPT) as place:
        body = "return await (await spawn(deeper, 9)).result()"
        pid = await start(place, body, also=also, manifest="[limits]\ndepth = 2\n")
        assert await place.result(pid) == 2


async def test_a_part_has_the_budget_of_its_own_manifest_where_nobody_says_another(
    database: Database, database_settings: Settings
) -> None:
    body = """
kids = [await spawn("kid"), await spawn("kid", budget={"calls": 3})]
return [(await wait(kid, asking=True))[0].reason for kid in kids]
"""
    kid = function("await call('count')\nreturn await call('count', step='again')")
    part = {"nimbos.toml": b'name = "kid"\nentry = "main.py:main"\n[budget]\ncalls = 1\ntokens = 1_000\n', **kid}
    files = {**function(body), **{f"agents/kid/{path}": content for path, content in part.items()}}
    async with minds(database, database_settings, SCRIPT) as place:
        program = await place.program('entry = "main.py:main"\n', files)
        pid = await place.run(program, None, budget=Allowance(tokens=500))  # the kid may want more than there is
        assert await place.result(pid) == ["asking", "ok"]


async def test_results_that_are_too_large_together_are_an_error_with_a_name_and_can_be_had_one_by_one(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES_MAX", 1_500)
    body = """
kids = [await spawn(talk, n) for n in range(2)]
try:
    await wait(*kids)
except StepFailed as failed:
    return [failed.code, *[len(await kid.result()) for kid in kids]]
"""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body, also="@child\nasync def talk(n):\n    return 'x' * 1_000\n")
        assert await place.result(pid) == ["too_large", 1_000, 1_000]


async def test_what_no_database_stores_is_left_out_of_a_name_and_else_an_error_that_the_function_sees(
    database: Database, database_settings: Settings
) -> None:
    body = """
codes = []
for step in (spawn("kid", label="a\\0b\\n"), spawn("kid", model="a\\0b"), send("proc_\\0", "hello")):
    try:
        kid = await step
    except StepFailed as failed:
        codes.append(failed.code)
return [*codes, kid.pid]
"""
    kid = {"agents/kid/nimbos.toml": b'name = "kid"\n', "agents/kid/instructions.md": b"Be brief."}
    async with minds(database, database_settings, SCRIPT) as place:
        program = await place.program('entry = "main.py:main"\n', {**function(body), **kid})
        pid = await place.run(program, None)
        *codes, child = await place.result(pid)
        assert codes == ["invalid_request", "not_found"]
        assert (await place.head(child)).name == "a b "


async def test_a_result_is_as_deep_as_any_value_may_be_and_can_be_waited_for(
    database: Database, database_settings: Settings
) -> None:
    also = """
def nested(levels):
    return [nested(levels - 1)] if levels else []

@child
async def deep(levels):
    return nested(levels)
"""
    body = """
kids = [await spawn(deep, levels) for levels in input]
kept, refused = await wait(*kids)
alone = (await wait(kids[0], any_of=True, name="alone"))[0].result
try:
    await each(deep, input[1:])
except StepFailed as failed:
    return [kept.result == alone == nested(input[0]), refused.reason, refused.error, failed.message]
"""
    most = segments.JSON_DEPTH_MAX
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, body, also=also, input=[most, most + 1])
        good, reason, *errors = await place.result(pid)
        assert (good, reason) == (True, "failed")
        assert all(f"more than {most} deep" in error for error in errors)
        ends = [await place.head(child) for child in (await place.view(pid)).children]
        assert [head.error for head in ends] == ["", errors[0], errors[0]], "the log of the child says so, too"


async def test_an_agent_reads_a_result_that_is_as_deep_as_any_value_may_be(
    database: Database, database_settings: Settings
) -> None:
    levels = segments.JSON_DEPTH_MAX
    kid = function(f"value = []\nfor _ in range({levels}):\n    value = [value]\nreturn value")
    part = {"nimbos.toml": b'name = "kid"\nentry = "main.py:main"\n', **kid}
    script = {
        "replies": [
            {"match": "^go$", **calling("spawn", program="kid", input=None)},
            {"match": "pid", "times": 1, **calling("wait")},
            {"match": r"\[" * (levels + 1), "text": "Deep."},
        ],
        "default": {"text": "Not seen."},
    }
    async with minds(database, database_settings, script) as place:
        files = {f"agents/kid/{path}": content for path, content in part.items()}
        pid = await place.run(await place.program('[tools]\nbuiltin = ["spawn", "wait"]\n', files))
        assert await place.result(pid) == "Deep."

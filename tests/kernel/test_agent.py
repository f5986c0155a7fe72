"""Agents: a loop that any server goes on with, tools that may be wrong, words in the middle, limits that hold."""

from __future__ import annotations

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason, SignalKind, State
from nimbos.kernel.events import CallDenied, ModelFailed, Note
from nimbos.ledger import set_limit
from tests.kernel.minds import ACCOUNT, calling, minds, words


async def test_an_agent_thinks_calls_and_answers(database: Database, database_settings: Settings) -> None:
    script = {
        "replies": [
            {"match": "^go$", **calling("pin", text="be kind")},
            {"match": "^.Pinned", "text": "It is done."},
        ]
    }
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program('[tools]\nbuiltin = ["pin", "read"]\n'))
        assert await place.result(pid) == "It is done."
        roles = [message["role"] for message in await place.shown(pid)]
        assert roles == ["system", "user", "assistant", "tool", "user", "assistant"]
        view = await place.view(pid)
        assert (view.state, view.reason, view.turns, view.calls_made) == (State.DONE, Reason.OK, 2, 1)
        billed = await place.billed(pid)
        assert view.used["tokens"] == billed.input + billed.output > 0


async def test_calls_that_cannot_be_are_told_to_the_model(database: Database, database_settings: Settings) -> None:
    script = {
        "replies": [
            {"match": "^go$", "text": "", "tool_calls": [{"name": "fly"}, {"name": "sleep", "arguments": {"s": "x"}}]},
            {"match": "wrong_arguments", "text": "I see."},
        ]
    }
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program('[tools]\nbuiltin = ["sleep"]\n'))
        assert await place.result(pid) == "I see."
        bodies = await place.bodies_of(pid)
        denied = sorted((b for b in bodies if isinstance(b, CallDenied)), key=lambda b: b.call_id)  # both at once
        assert "There is no tool 'fly'" in denied[0].why
        assert "seconds" in denied[1].why
        told = [message["content"] for message in await place.shown(pid) if message["role"] == "tool"]
        assert len(told) == 2 and "unknown_tool" in told[0]


async def test_a_model_that_repeats_itself_is_ended_by_the_limit_on_turns(
    database: Database, database_settings: Settings
) -> None:
    script = {"default": calling("sleep", seconds=0)}
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program('[tools]\nbuiltin = ["sleep"]\n[limits]\nturns = 5\n'))
        head = await place.over(pid)
        assert head.reason is Reason.FAILED
        assert "5" in head.error and "limits.turns" in head.error
        view = await place.view(pid)
        assert (view.turns, view.calls_made) == (5, 5)


async def test_a_message_takes_the_word_in_the_middle_of_an_answer(
    database: Database, database_settings: Settings
) -> None:
    script = {
        "replies": [
            {"match": "^go$", **words(2_000, rate=400)},
            {"match": "stop that", "text": "Yes."},
        ]
    }
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program())
        await place.until_partial(pid)
        await place.send(pid, SignalKind.MESSAGE, body="stop that")
        assert await place.result(pid) == "Yes."
        failed = [body for body in await place.bodies_of(pid) if isinstance(body, ModelFailed)]
        assert [body.code for body in failed] == ["interrupted"]
        said = (await place.shown(pid))[2:]
        assert [message["role"] for message in said] == ["assistant", "user", "assistant"]
        assert said[0]["content"].startswith("w0 w1 ") and said[0]["content"].endswith("…")
        billed, view = await place.billed(pid), await place.view(pid)
        assert view.used["tokens"] == billed.input + billed.output


async def test_a_message_that_came_while_it_was_paused_is_heard_before_it_goes_on(
    database: Database, database_settings: Settings
) -> None:
    script = {"replies": [{"match": "^go$", **words(300, rate=200)}, {"match": "^no$", "text": "Then not."}]}
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program())
        await place.until_partial(pid)
        await place.send(pid, SignalKind.PAUSE)
        await place.until(pid, State.PAUSED)
        await place.send(pid, SignalKind.MESSAGE, body="no")
        await place.send(pid, SignalKind.RESUME)
        assert await place.result(pid) == "Then not."
        said = (await place.shown(pid))[2:]
        assert [message["role"] for message in said] == ["assistant", "user", "assistant"]


async def test_an_answer_that_does_not_fit_is_asked_for_again(database: Database, database_settings: Settings) -> None:
    script = {
        "replies": [
            {"match": "^go$", "text": "about 12"},
            {"match": "does not match", "text": "12"},
        ]
    }
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program("[answer]\nregex = '[0-9]+'\n"))
        assert await place.result(pid) == "12"
        assert (await place.view(pid)).turns == 2


async def test_an_answer_by_schema_is_a_value(database: Database, database_settings: Settings) -> None:
    schema = b'{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'
    script = {"replies": [{"match": "^go$", "text": '{"n": "x"}'}, {"match": "schema", "text": '{"n": 3}'}]}
    async with minds(database, database_settings, script) as place:
        program = await place.program('[answer]\nschema = "answer.json"\n', {"answer.json": schema})
        assert await place.result(await place.run(program)) == {"n": 3}


async def test_what_no_model_can_do_is_a_clear_end(database: Database, database_settings: Settings) -> None:
    async with minds(database, database_settings, {"replies": [{"match": "never", "text": "x"}]}) as place:
        pid = await place.run(await place.program())
        head = await place.over(pid)
        assert head.reason is Reason.FAILED and "scripted model" in head.error
        assert not [body for body in await place.bodies_of(pid) if isinstance(body, Note)]


async def test_an_answer_that_says_nothing_is_asked_for_once_more(
    database: Database, database_settings: Settings
) -> None:
    script = {"replies": [{"match": "^go$", "text": " "}, {"match": "empty", "times": 1, "text": "Well."}]}
    async with minds(database, database_settings, script) as place:
        assert await place.result(await place.run(await place.program())) == "Well."
    async with minds(database, database_settings, {"default": {"text": ""}}, server="two") as place:
        silent = await place.run(await place.program())
        assert await place.result(silent) == ""
        assert (await place.view(silent)).turns == 2


async def test_what_a_limit_refuses_is_waited_for_without_holding_anything(
    database: Database, database_settings: Settings
) -> None:
    script = {"replies": [{"match": "^go$", **calling("sleep", seconds=0)}], "default": {"text": "Done."}}
    await database.run(lambda: set_limit("project", ACCOUNT.id, requests_per_min=1))
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program('[tools]\nbuiltin = ["sleep"]\n'))
        parked = await place.until(pid, State.WAITING)
        assert parked.reason is Reason.MODEL
        assert parked.due_ms is not None and parked.due_ms > parked.changed_ms
        await database.run(lambda: set_limit("project", ACCOUNT.id))
        await place.send(pid, SignalKind.MESSAGE, body="go on")  # anything wakes it; so would its timer
        assert await place.result(pid) == "Done."

"""Questions with choices: a function's are its only answers, a model's are what it suggests."""

from __future__ import annotations

from typing import Any

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import Conflict, InvalidRequest
from nimbos.kernel import SignalKind, State, asks_of
from tests.kernel.minds import ACCOUNT, Minds, calling, minds
from tests.kernel.test_durable import SCRIPT, start

CHOOSING = """
first = await ask("Shall I?", choices=["yes", "no", "\\u2713 \\u00fc"])
second = await ask("And why?")
return [first, second]
"""


async def refuse(place: Minds, pid: str, answer: Any, **fields: Any) -> None:
    with pytest.raises(InvalidRequest, match="choices") as refused:
        await place.send(pid, SignalKind.ANSWER, body=answer, **fields)
    assert refused.value.param == "body"


async def test_an_answer_that_is_none_of_the_choices_is_refused_and_the_question_stays_open(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, CHOOSING)
        asking = await place.until(pid, State.ASKING, reason="input")
        (asked,) = await asks_of(place.kernel.log, place.kernel.segments, asking)
        assert asked.what["choices"] == ["yes", "no", "\u2713 \u00fc"]
        for wrong in ("Yes", "yes ", "", "perhaps", True, None, ["yes"], {"yes": "no"}, "y"):
            await refuse(place, pid, wrong)
        await refuse(place, pid, "perhaps", about=asked.about)
        with pytest.raises(Conflict, match="does not ask"):
            await place.send(pid, SignalKind.ANSWER, body="perhaps", about="another")
        (fork,) = await place.kernel.fork(ACCOUNT, pid)
        await place.until(fork, State.ASKING, reason="input")
        await refuse(place, fork, "perhaps")
        await place.send(pid, SignalKind.PAUSE)
        await place.until(pid, State.PAUSED)
        await refuse(place, pid, "perhaps")
        await place.send(pid, SignalKind.RESUME)
        again = await place.until(pid, State.ASKING, reason="input", after=asking.seq)
        await place.send(pid, SignalKind.ANSWER, body="\u2713 \u00fc")
        free = await place.until(pid, State.ASKING, reason="input", after=again.seq)
        (asked,) = await asks_of(place.kernel.log, place.kernel.segments, free)
        assert "choices" not in asked.what
        await place.send(pid, SignalKind.ANSWER, body={"any": "thing"})
        assert await place.result(pid) == ["\u2713 \u00fc", {"any": "thing"}]
        with pytest.raises(Conflict, match="is over"):
            await place.send(pid, SignalKind.ANSWER, body="perhaps", about=asked.about)


async def test_what_a_model_suggests_as_answers_does_not_bind_a_person(
    database: Database, database_settings: Settings
) -> None:
    script = {
        "replies": [
            {"match": "^go$", **calling("ask", question="Which?", choices=["Send it all"])},
            {"match": "None of that", "text": "As you like."},
        ],
        "default": {"text": "Not heard."},
    }
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program('[tools]\nbuiltin = ["ask"]\n'))
        asking = await place.until(pid, State.ASKING, reason="input")
        (asked,) = await asks_of(place.kernel.log, place.kernel.segments, asking)
        assert (asked.what["arguments"]["choices"], "choices" in asked.what) == (["Send it all"], False)
        await place.send(pid, SignalKind.ANSWER, body="None of that.")
        assert await place.result(pid) == "As you like."


async def test_an_answer_belongs_to_the_question_that_was_asked_when_it_came(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at before it lies in the mailbox, and another may be quicker."""
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await start(place, CHOOSING)
        asking = await place.until(pid, State.ASKING, reason="input")
        put = place.kernel.segments.put_bytes

        async def slowly(account: str, content: bytes) -> str:
            if content == b'"no"':
                monkeypatch.undo()
                await place.send(pid, SignalKind.ANSWER, body="yes")
                await place.until(pid, State.ASKING, reason="input", after=asking.seq)
            return await put(account, content)

        monkeypatch.setattr(place.kernel.segments, "put_bytes", slowly)
        with pytest.raises(Conflict, match="does not ask"):
            await place.send(pid, SignalKind.ANSWER, body="no")
        await place.send(pid, SignalKind.ANSWER, body="because")
        assert await place.result(pid) == ["yes", "because"]

"""Replays: the log folded again says the same, and another model's words show where it would have gone another way."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import ModelNotFound, NotFound
from nimbos.kernel import SignalKind, State
from nimbos.kernel.replay import Folded, Replayed, Said
from nimbos.ledger import Allowance
from nimbos.types import Usage
from tests.kernel.minds import ACCOUNT, Minds, calling, minds, words
from tests.kernel.running import OTHER

MANIFEST = '[tools]\nbuiltin = ["ask", "pin"]\n'
SCRIPT = {
    "replies": [
        {"match": "^go$", **calling("pin", text="be kind")},
        {"match": "Pinned", **calling("ask", question="Which?")},
        {"match": "^this$", "text": "You said this, and so be it."},
    ],
    "default": words(150),
}
OTHER_SCRIPT = {
    "replies": [
        {"match": "^go$", **calling("pin", text="be kind")},
        {"match": "Pinned", "text": "I need not ask."},
        {"match": "^this$", "text": "You said that."},
    ],
    "default": words(3),
}


async def replayed(place: Minds, pid: str, *, model: str = "") -> tuple[list[Replayed], Folded]:
    async with aclosing(place.kernel.replay(ACCOUNT, pid, model=model)) as replay:
        found: list[Any] = [one async for one in replay]
    assert all(isinstance(one, Replayed) for one in found[:-1])
    assert isinstance(found[-1], Folded)
    return found[:-1], found[-1]


async def finished(place: Minds) -> str:
    pid = await place.run(await place.program(MANIFEST))
    await place.until(pid, State.ASKING, reason="input")
    await place.send(pid, SignalKind.ANSWER, body="this")
    await place.result(pid)
    return pid


async def test_a_log_is_folded_offline_and_nothing_is_asked_or_written(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await finished(place)
        before = (await place.head(pid)).seq, await place.billed(pid)
        answers, end = await replayed(place, pid)
        assert [one.then.calls or one.then.text for one in answers] == [
            (("pin", '{"text": "be kind"}'),),
            (("ask", '{"question": "Which?"}'),),
            "You said this, and so be it.",
        ]
        assert all(one.now is None and not one.same for one in answers)
        assert end == Folded(events=before[0], state="done", reason="ok", agrees=True, turns=3, calls=2)
        assert ((await place.head(pid)).seq, await place.billed(pid)) == before
        with pytest.raises(NotFound):
            async with aclosing(place.kernel.replay(OTHER, pid)) as replay:
                await anext(replay)


async def test_the_same_model_is_asked_the_very_same_and_says_the_same(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await finished(place)
        before = (await place.head(pid)).seq, await place.billed(pid)
        answers, end = await replayed(place, pid, model="demo")
        assert [one.same for one in answers] == [True, True, True]
        assert [one.same_question for one in answers] == [True, True, True]
        assert end.agrees
        assert ((await place.head(pid)).seq, await place.billed(pid)) == before, "it is not the process's to pay"
        assert [path.name for path in Path(database_settings.home, "workspaces").glob("replay*")] == []


async def test_an_answer_in_several_pieces_is_one_question(database: Database, database_settings: Settings) -> None:
    async with minds(database, database_settings, SCRIPT) as place:
        pid = await place.run(await place.program(MANIFEST), "at length", budget=Allowance(tokens=60))
        await place.until(pid, State.ASKING, reason="budget")
        await place.kernel.top_up(ACCOUNT, pid, Allowance(tokens=10_000), source="user:test", external_id="more")
        await place.result(pid)
        answers, _ = await replayed(place, pid, model="demo")
        assert [(one.same, one.same_question) for one in answers] == [(True, True)]
        assert len(answers[0].then.text.split()) == 150


async def test_another_model_is_shown_to_part_where_it_does(database: Database, database_settings: Settings) -> None:
    async with minds(database, database_settings, SCRIPT, others={"second": OTHER_SCRIPT}) as place:
        pid = await finished(place)
        answers, end = await replayed(place, pid, model="second")
        assert [one.same for one in answers] == [True, False, False]
        assert [one.same_question for one in answers] == [None, None, None]
        assert answers[1].now == Said(text="I need not ask.")
        assert answers[2].now == Said(text="You said that."), "behind the parting it is asked what the log says"
        assert answers[2].common_characters == len("You said th")
        assert end.agrees
        assert (await place.view(pid)).children == {}
        billed = await place.billed(pid)
        assert billed != Usage()
        with pytest.raises(ModelNotFound):
            await replayed(place, pid, model="nobody")

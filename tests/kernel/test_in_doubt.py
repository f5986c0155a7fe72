"""The four answers to an effect in doubt, and those that are none."""

from __future__ import annotations

from typing import Any

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import Conflict
from nimbos.kernel import Reason
from tests.kernel.gating import gated, on_sqlite, tool
from tests.kernel.test_effects import Cut


@on_sqlite
@pytest.mark.parametrize(
    ("answer", "sent", "events", "error", "value"),
    [
        ({"verdict": "happened", "result": {"id": 7}}, 1, ["resolved", "done"], "", {"id": 7}),
        ({"verdict": "happened"}, 1, ["resolved", "done"], "", None),
        ({"verdict": "did_not"}, 1, ["resolved", "done"], "did_not_happen", "It did not happen, says a person."),
        ({"verdict": "retry"}, 2, ["resolved", "started", "done"], "", "mail is done"),
        ({"verdict": "abandon"}, 1, ["resolved", "done"], "unknown", None),
    ],
    ids=["happened, with a result", "happened", "did not", "retry", "abandon"],
)
async def test_a_person_says_what_came_of_it(
    database: Database,
    database_settings: Settings,
    answer: dict[str, Any],
    sent: int,
    events: list[str],
    error: str,
    value: Any,
) -> None:
    async with Cut(database, database_settings) as cut:
        at, pid, calls = await cut.off("mail", {"hold": True})
        await at.asking(pid, Reason.IN_DOUBT)
        await at.answer(pid, answer)
        await at.place.over(pid)
        assert at.done(pid) == ["mail -"] * sent
        assert await at.calls_of(pid, "c1") == ["intent", "started", "unknown", *events]
        outcome = calls.outcomes["c1"]
        assert outcome.error == error
        assert outcome.value == value or (
            value is None and error == "unknown" and "Do not do it again" in outcome.shown
        )


@on_sqlite
async def test_a_call_that_is_tried_again_may_be_in_doubt_again(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        at.program(tool("slow_mail"))
        pid = await at.spawn()
        head = await at.asking(pid, Reason.IN_DOUBT)
        await at.answer(pid, {"verdict": "retry"})
        head = await at.asking(pid, Reason.IN_DOUBT, after=head.seq + 3)
        assert at.done(pid) == ["slow_mail -"] * 2 and head.used["calls"] == 2
        await at.answer(pid, {"verdict": "abandon"})
        await at.place.over(pid)


async def test_an_answer_that_is_none_of_the_four_changes_nothing(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        at.program(tool("slow_mail"))
        pid = await at.spawn()
        head = await at.asking(pid, Reason.IN_DOUBT)
        await at.answer(pid, {"verdict": "perhaps"})
        head = await at.asking(pid, Reason.IN_DOUBT, after=head.seq)
        await at.answer(pid, {"verdict": "did_not"})
        with pytest.raises(Conflict):  # the first of two answers counts
            await at.answer(pid, {"verdict": "retry"})
        await at.place.over(pid)
        assert at.done(pid) == ["slow_mail -"]

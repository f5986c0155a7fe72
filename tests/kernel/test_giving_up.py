"""Before a function is given up, whatever is wrong with it, a person is asked what nobody knows."""

from __future__ import annotations

import asyncio
from textwrap import dedent

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason, State, runner
from nimbos.kernel import durable as durables
from nimbos.kernel.events import CallDone
from tests.kernel.gating import on_sqlite
from tests.kernel.minds import minds
from tests.kernel.running import PATIENCE_S
from tests.kernel.test_durable import SCRIPT, answer, done, start

SENDS = """
if not Path("done.txt").exists():
    await call("mail", to="Ada", hold=True)
"""


# `linger` returns where the function does not run. The function ends its process as soon as one of its calls is begun.
LINGERS = b"""
import os, time
from pathlib import Path
from nimbos.adk import tool

@tool(effect="pure")
def linger(number: int) -> int:
    'For as long as the function runs here.'
    runs, begun = Path(f"runs.{os.getpid()}"), Path(f"begun.{os.getpid()}")
    while runs.exists():
        begun.touch()
        time.sleep(0.01)
    return number
"""
ENDS_ITSELF = b"""
import asyncio, os
from pathlib import Path
from nimbos.adk import call

async def main(others):
    Path(f"runs.{os.getpid()}").touch()
    with open("starts", "a") as file:
        file.write("x")
    first = Path("starts").stat().st_size * 10 if others else 0
    lingering = [asyncio.ensure_future(call("linger", number=first + number)) for number in range(3)]
    while not Path(f"begun.{os.getpid()}").exists() and not all(one.done() for one in lingering):
        await asyncio.sleep(0.01)
    os._exit(3)
"""


@pytest.mark.parametrize(("others", "times"), [(False, 4), (True, 2)], ids=["the same calls", "others each time"])
async def test_a_function_that_ends_its_process_is_given_up_and_its_calls_are_not_charged_for_it(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch, others: bool, times: int
) -> None:
    monkeypatch.setattr(durables, "SUSPECTED_MAX", 2)
    async with minds(database, database_settings, SCRIPT) as place:
        files = {"main.py": ENDS_ITSELF, "tools.py": LINGERS}
        pid = await place.run(await place.program('entry = "main.py:main"\n', files), others)
        head = await place.over(pid)
        assert head.reason is Reason.FAILED and f"died {times} times" in head.error, head.error
        assert (place.kernel.workspaces.path(pid) / "starts").read_text() == "x" * times
        made = [body for body in await place.bodies_of(pid) if isinstance(body, CallDone)]
        assert [body.error for body in made] == [""] * (3 * times if others else 3)
        assert head.used["calls"] == len(made)


async def test_an_error_that_no_database_stores_is_told_and_is_no_fault_of_the_server(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, SCRIPT) as place:
        head = await place.over(await start(place, "raise ValueError('of a file: a\\0b')"))
        assert (head.reason, head.epoch) == (Reason.FAILED, 1) and "of a file: a\ufffdb" in head.error


@on_sqlite
@pytest.mark.parametrize(
    ("later", "also", "says"),
    [
        ("import os; os._exit(3)", "", "died 3 times"),
        ("while True: await sleep(0)", "", "more than 20 steps"),
        ("while True: await __import__('asyncio').sleep(0.01)", "", "between two steps"),
        ("pass", "if Path('done.txt').exists(): raise ValueError('broken since')", "broken since"),
    ],
    ids=["crashes", "floods", "takes for ever", "cannot be loaded"],
)
async def test_an_effect_in_doubt_is_asked_about_before_the_function_fails(
    database: Database,
    database_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    later: str,
    also: str,
    says: str,
) -> None:
    monkeypatch.setattr(runner, "CALLS_GRACE_S", 0.0)  # as if it were killed
    monkeypatch.setattr(durables, "STEPS_MAX", 20)
    body = f"{dedent(SENDS)}{later}"
    async with minds(database, database_settings, SCRIPT, server="first") as place:
        limit_s = 1.0 if says.startswith("between") else PATIENCE_S
        pid = await start(place, body, also=also, manifest=f"[limits]\ntool_deadline_s = {limit_s}\n")
        async with asyncio.timeout(PATIENCE_S):
            while not done(place, pid):
                await asyncio.sleep(0.01)  # another process writes it, and rings no bell
    async with minds(database, database_settings, SCRIPT, server="second") as place:
        head = await place.until(pid, State.ASKING)
        assert head.reason is Reason.IN_DOUBT
        await answer(place, pid, {"verdict": "abandon"})
        head = await place.over(pid)
        assert head.reason is Reason.FAILED and says in head.error
        assert done(place, pid) == ["mail Ada"]

"""Before a function is given up, whatever is wrong with it, a person is asked what nobody knows."""

from __future__ import annotations

import asyncio
from textwrap import dedent

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason, State, runner
from nimbos.kernel import durable as durables
from tests.kernel.gating import on_sqlite
from tests.kernel.minds import minds
from tests.kernel.running import PATIENCE_S
from tests.kernel.test_durable import SCRIPT, answer, done, start

SENDS = """
if not Path("done.txt").exists():
    await call("mail", to="Ada", hold=True)
"""


LINGERS = b"""
import os, time
from pathlib import Path
from nimbos.adk import tool

@tool(effect="pure")
def linger(until_starts: int) -> None:
    'Until the function has begun so often and does not run here.'
    Path(f"begun.{os.getpid()}").touch()
    while Path("starts").stat().st_size < until_starts or Path(f"runs.{os.getpid()}").exists():
        time.sleep(0.01)
"""
ENDS_ITSELF = b"""
import asyncio, os
from pathlib import Path
from nimbos.adk import call

async def main(until_starts):
    Path(f"runs.{os.getpid()}").touch()
    with open("starts", "a") as file:
        file.write("x")
    lingering = [asyncio.ensure_future(call("linger", until_starts=until_starts)) for _ in range(3)]
    while not Path(f"begun.{os.getpid()}").exists() and not all(one.done() for one in lingering):
        await asyncio.sleep(0.01)
    os._exit(3)
"""


async def test_a_function_that_ends_its_process_is_not_begun_again_for_each_call_that_is_under_way(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durables, "SUSPECTED_MAX", 5)
    async with minds(database, database_settings, SCRIPT) as place:
        files = {"main.py": ENDS_ITSELF, "tools.py": LINGERS}
        pid = await place.run(await place.program('entry = "main.py:main"\n', files), 5)
        head = await place.over(pid)
        assert head.reason is Reason.FAILED and "died 5 times" in head.error, head.error
        assert (place.kernel.workspaces.path(pid) / "starts").read_text() == "xxxxx"


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

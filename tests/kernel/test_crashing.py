"""A tool that takes its process along: what ran beside it is made again, and is not failed for it."""

from __future__ import annotations

import asyncio

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Reason
from nimbos.kernel.events import CallStarted
from nimbos.kernel.outward import TRIES_MAX
from nimbos.kernel.tools.turns import Turns
from tests.kernel.minds import Minds, minds
from tests.kernel.running import PATIENCE_S
from tests.kernel.test_together import answering, number_of, results

# `crash` ends its process. The others wait for it the first time, and whenever it begins beside them; else they return.
TOOLS = b'''
import os, time
from pathlib import Path
from nimbos.adk import tool

def _crashes() -> int:
    return Path("crashes").stat().st_size if Path("crashes").exists() else 0

def _beside(before: int) -> None:
    late = time.monotonic() + 0.3
    while not before or _crashes() > before or time.monotonic() < late:
        time.sleep(0.01)

@tool(effect="pure")
def crash(others: int) -> str:
    """Ends its process."""
    while len(list(Path().glob("begun.*"))) < others:
        time.sleep(0.01)
    with open("crashes", "a") as file:
        file.write(".")
    os._exit(7)

@tool(effect="pure")
def look(name: str) -> str:
    """Looks."""
    before = _crashes()
    Path(f"begun.{name}").touch()
    _beside(before)
    return f"{name} is seen"

@tool(effect="idempotent")
def pay(name: str, key: str) -> str:
    """Pays."""
    before = _crashes()
    Path(f"begun.{name}").touch()
    _beside(before)
    return f"{name} is paid"
'''
MAIN = b"""
import asyncio
from nimbos.adk import *

async def crashing():
    try:
        await call("crash", others=2)
    except StepFailed as failed:
        return failed.code

async def main(input):
    return await asyncio.gather(crashing(), call("pay", name="rent"), call("look", name="Ada"))
"""


async def tries_of(place: Minds, pid: str, number: int) -> int:
    call_id = await number_of(place, pid, number)
    return sum(isinstance(body, CallStarted) and body.call_id == call_id for body in await place.bodies_of(pid))


async def test_neighbours_of_a_call_that_crashes_are_not_failed_for_it(
    database: Database, database_settings: Settings
) -> None:
    script = answering(("look", {"name": "Ada"}), ("crash", {"others": 2}), ("look", {"name": "Bob"}))
    async with minds(database, database_settings, script) as place:
        pid = await place.run(await place.program("", {"tools.py": TOOLS}))
        assert await place.result(pid) == "Done."
        ada, crash, bob = await results(place, pid)
        assert (ada, bob) == ("Ada is seen", "Bob is seen")
        assert crash.startswith("Error (died)")
        assert [await tries_of(place, pid, number) for number in range(3)] == [2, 1 + TRIES_MAX, 2]


async def test_in_a_function_a_tool_that_crashes_fails_its_own_step_alone(
    database: Database, database_settings: Settings
) -> None:
    async with minds(database, database_settings, {"default": {"text": "Done."}}) as place:
        program = await place.program('entry = "main.py:main"\n', {"tools.py": TOOLS, "main.py": MAIN})
        pid = await place.run(program, None)
        head = await place.over(pid)
        assert head.reason is Reason.OK, head.error
        assert await place.result(pid) == ["died", "rent is paid", "Ada is seen"]


async def test_who_is_alone_has_nobody_beside_it() -> None:
    turns, log = Turns(9), list[str]()

    async def one(name: str, *, alone: bool, leave: asyncio.Event) -> None:
        async with turns.take(alone=alone):
            log.append(f"+{name}")
            await leave.wait()
            log.append(f"-{name}")

    leave = {name: asyncio.Event() for name in "abcdef"}
    tasks = {name: asyncio.create_task(one(name, alone=name in "cef", leave=leave[name])) for name in "abcdef"}
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.sleep(0)  # all have come
        tasks["e"].cancel()  # before it had its turn
        for name in "abcfd":
            leave[name].set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    inside: set[str] = set()
    for said in log:
        inside ^= {said[1]}
        assert inside <= set("abd") or len(inside) == 1, log
    assert sorted(log) == sorted(f"{sign}{name}" for name in "abcdf" for sign in "+-")
    assert log.index("+d") > log.index("-f"), "who waits to be alone is not overtaken"


async def test_no_more_have_a_turn_at_once_than_may() -> None:
    turns, now, most = Turns(3), [0], [0]

    async def one() -> None:
        async with turns.take(alone=False):
            now[0] += 1
            most[0] = max(most[0], now[0])
            await asyncio.sleep(0)
            now[0] -= 1

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(one() for _ in range(20)))
    assert (now, most) == ([0], [3])

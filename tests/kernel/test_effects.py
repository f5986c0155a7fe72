"""What a server that is gone leaves behind between an intent and its outcome, for each effect class."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
from sqlalchemy import select

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.db.statements import Statement
from nimbos.db.tables.kernel import process_effects
from nimbos.kernel import Reason, calling, outward, runner
from nimbos.kernel.effects import HARMLESS, RECOVERY, bound_hash, effect_key
from nimbos.kernel.events import BudgetSettled, CallIntent
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Fenced
from nimbos.kernel.processes import raise_epoch
from nimbos.kernel.words import Effect, Label
from tests.kernel.gating import FILES, MANIFEST, TOOLS, Calls, Gated, gated, on_sqlite, tool
from tests.kernel.running import ACCOUNT, PATIENCE_S


def test_every_effect_class_has_its_recovery_and_only_what_is_harmless_is_not_withheld() -> None:
    assert RECOVERY.keys() == set(Effect)
    assert set(Effect) - HARMLESS == {Effect.IDEMPOTENT, Effect.CHECKABLE, Effect.OPAQUE}


def test_a_key_is_the_same_for_the_same_call_and_no_other() -> None:
    assert effect_key("proc_1", "c1") == effect_key("proc_1", "c1")
    assert len({effect_key("proc_1", "c1"), effect_key("proc_1", "c11"), effect_key("proc_11", "c1")}) == 3
    assert bound_hash("a", b"bc") != bound_hash("ab", b"c")


class Cut:
    """A call that is cut off in its driver: its server stops while the tool holds; another goes on."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Cut:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def off(self, name: str, arguments: dict[str, Any]) -> tuple[Gated, str, Calls]:
        syscall = tool(name, arguments)
        async with gated(self._database, self._settings) as first:
            first.program(syscall)
            pid = await first.spawn()
            await first.started(pid, name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(runner, "CALLS_GRACE_S", 0.0)  # as if it were killed
                await first.place.kernel.close()
            first.go(pid)  # what runs again shall not wait
        second = await self._stack.enter_async_context(
            gated(self._database, self._settings, server="meter-two", start=False)
        )
        calls = second.program(syscall)
        await second.place.kernel.start(second.place.drive)
        return second, pid, calls


async def test_a_pure_call_is_run_again(database: Database, database_settings: Settings) -> None:
    async with Cut(database, database_settings) as cut:
        at, pid, calls = await cut.off("look", {"hold": True})
        await at.place.over(pid)
        assert await at.calls_of(pid, "c1") == ["intent", "started", "started", "done"]
        assert calls.outcomes["c1"].value == "look is done"
        assert await _keys(database) == []
        paid = [body.used for _, body in await at.log(pid) if isinstance(body, BudgetSettled)]
        assert [used["calls"] for used in paid] == [0, 1], "the try that ended with its server, too"
        assert all(used["seconds_ms"] > 0 for used in paid)


async def test_an_idempotent_call_is_run_again_with_the_same_key(
    database: Database, database_settings: Settings
) -> None:
    async with Cut(database, database_settings) as cut:
        at, pid, _ = await cut.off("pay", {"hold": True})
        await at.place.over(pid)
        key = effect_key(pid, "c1")
        assert at.done(pid) == [f"pay {key}"] * 2
        assert await at.calls_of(pid, "c1") == ["intent", "started", "started", "done"]
        assert await _keys(database) == [key]


@on_sqlite
@pytest.mark.parametrize(
    ("known", "times", "value"), [("yes", 1, "booked before"), ("no", 2, "book is done")], ids=["it did", "it did not"]
)
async def test_a_checkable_call_is_verified_and_done_only_if_it_was_not(
    database: Database, database_settings: Settings, known: str, times: int, value: str
) -> None:
    async with Cut(database, database_settings) as cut:
        at, pid, calls = await cut.off("book", {"hold": True, "known": known})
        await at.place.over(pid)
        assert len(at.done(pid)) == times
        assert calls.outcomes["c1"].value == value


@pytest.mark.parametrize(
    ("name", "arguments"), [("mail", {"hold": True}), ("book", {"hold": True, "known": "who knows"})]
)
async def test_what_nobody_can_know_is_never_repeated_and_a_person_is_asked(
    database: Database, database_settings: Settings, name: str, arguments: dict[str, Any]
) -> None:
    async with Cut(database, database_settings) as cut:
        at, pid, calls = await cut.off(name, arguments)
        head = await at.asking(pid, Reason.IN_DOUBT)
        assert head.about == ("c1",) and len(at.done(pid)) == 1
        assert await at.calls_of(pid, "c1") == ["intent", "started", "unknown"]
        assert calls.outcomes == {}
        assert head.used["calls"] == 1  # what nobody knows is settled as it was reserved


@on_sqlite
@pytest.mark.parametrize(("name", "asked"), [("look", False), ("pay", True)])
async def test_a_call_that_was_begun_too_often_is_given_up(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch, name: str, asked: bool
) -> None:
    monkeypatch.setattr(outward, "RECOVERIES_MAX", 1)
    async with Cut(database, database_settings) as cut:
        at, pid, calls = await cut.off(name, {"hold": True})
        if asked:
            await at.asking(pid, Reason.IN_DOUBT)
        else:
            await at.place.over(pid)
            assert calls.outcomes["c1"].error == "died"
        assert len(at.done(pid)) == 1


@on_sqlite
async def test_a_tool_that_takes_its_process_along_is_run_again_a_few_times(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        pid, calls = await at.run(tool("dies"))
        assert await at.calls_of(pid, "c1") == ["intent", "started", "started", "started", "done"]
        assert calls.outcomes["c1"].value == "third time"


@on_sqlite
async def test_an_opaque_call_stopped_at_its_deadline_is_in_doubt(
    database: Database, database_settings: Settings
) -> None:
    async with gated(database, database_settings) as at:
        at.program(tool("slow_mail"))
        pid = await at.spawn()
        await at.asking(pid, Reason.IN_DOUBT)
        assert at.done(pid) == ["slow_mail -"]


SLOW_START = b"""
import time
from pathlib import Path
Path("starts").touch()
while Path("slow").exists():
    time.sleep(0.01)
"""


async def test_a_worker_whose_start_takes_longer_than_the_lease_leaves_the_call_to_whoever_has_the_process_then(
    database: Database, database_settings: Settings
) -> None:
    files = {**FILES, "nimbos.toml": MANIFEST.replace(b"caller", b"slow"), "tools.py": SLOW_START + TOOLS}
    async with gated(database, database_settings) as at:
        await at.place.kernel.programs.put(msgspec.structs.replace(ACCOUNT, scopes=frozenset({"programs:code"})), files)

        async def body(holding: Holding) -> None:
            folder = at.workspaces.path(holding.pid)
            if holding.view.name == "second" and not folder.exists():
                folder.mkdir()
                (folder / "slow").touch()
            # From the first on it is known which tools there are.
            await at.gate.call(holding, tool("look" if holding.view.name == "first" else "mail"))
            await holding.exit(Reason.OK)

        at.place.bodies.update(first=body, second=body)
        first = await at.place.kernel.spawn(ACCOUNT, "slow", {}, name="first")
        await at.place.over(first)
        pid = await at.place.kernel.spawn(ACCOUNT, "slow", {}, name="second")
        folder = at.workspaces.path(pid)
        async with asyncio.timeout(PATIENCE_S):
            while not (folder / "starts").exists():
                await asyncio.sleep(0.01)  # another process makes it, and rings no bell
        assert await at.calls_of(pid, "c1") == [], "what has not begun is not in doubt"
        await database.run(lambda: raise_epoch(pid))  # what a server does that claims it
        (folder / "slow").unlink()
        assert (await at.place.over(pid)).reason is Reason.OK  # the next run, of whoever has it now
        assert await at.calls_of(pid, "c1") == ["intent", "started", "done"]
        assert at.done(pid) == ["mail -"]


async def _keys(database: Database) -> list[str]:
    return [row["key"] for row in await database.read(Statement(select(process_effects.c.key))())]


async def test_a_server_that_stood_still_behind_the_start_of_a_call_does_not_make_it_when_another_has_it(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = calling.begin
    async with gated(database, database_settings, start=False) as at:
        fenced = asyncio.Event()

        async def then_stands_still(holding: Holding, intent: CallIntent, *, label: Label) -> None:
            await begin(holding, intent, label=label)
            await database.run(lambda: raise_epoch(holding.pid))  # what a server does that claims it

        async def body(holding: Holding) -> None:
            try:
                await at.gate.call(holding, tool("mail"))
            except Fenced:
                fenced.set()
                raise

        monkeypatch.setattr(outward, "STALL_S", -1.0)
        monkeypatch.setattr(calling, "begin", then_stands_still)
        at.place.bodies["plain"] = body
        pid = await at.spawn()
        await at.place.kernel.start(at.place.drive)
        async with asyncio.timeout(PATIENCE_S):
            await fenced.wait()
        assert at.done(pid) == []

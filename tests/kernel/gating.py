"""A gate on a real database with real tools in real workers; what a program calls is a list of syscalls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import Event, Head, Reason, SignalKind, State
from nimbos.kernel.chain import decoded
from nimbos.kernel.gate import Gate, Outcome, Syscall
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.timers import SteadyClock
from nimbos.kernel.tools import ToolWorkers, Workspaces
from nimbos.kernel.words import Verb
from tests.kernel.running import ACCOUNT, PATIENCE_S, Place, running

MANIFEST = b"""
name = "caller"
[tools]
builtin = ["ask", "pin", "read", "send", "sleep", "spawn", "wait"]
confirm = ["buy"]
[limits]
tool_deadline_s = 20.0
result_bytes = 256
"""

# Each tool with an effect leaves a line in the workspace, and with `hold` waits for a file that the test makes.
TOOLS = b'''
import os, time
from pathlib import Path
from nimbos.adk import Happened, tool

def _do(name: str, key: str, hold: bool) -> str:
    with open("done.txt", "a") as file:
        file.write(f"{name} {key}\\n")
    while hold and not Path("go").exists():
        time.sleep(0.01)
    return f"{name} is done"

def _lines() -> list[str]:
    return Path("done.txt").read_text().splitlines() if Path("done.txt").exists() else []

@tool(effect="pure")
def look(hold: bool = False) -> str:
    """Looks."""
    return _do("look", "-", hold)

@tool(effect="idempotent")
def pay(key: str, hold: bool = False) -> str:
    """Pays."""
    return _do("pay", key, hold)

def _booked(key: str, hold: bool = False, known: str = "yes"):
    if known == "who knows":
        return None
    return Happened("booked before") if f"book {key}" in _lines() and known == "yes" else False

@tool(effect="checkable", verify=_booked)
def book(key: str, hold: bool = False, known: str = "yes") -> str:
    """Books."""
    return _do("book", key, hold)

@tool(effect="opaque")
def mail(hold: bool = False) -> str:
    """Sends."""
    return _do("mail", "-", hold)

@tool(effect="opaque")
def buy(what: str) -> str:
    """Buys."""
    return _do(f"buy {what}", "-", False)

@tool(effect="pure")
def words(count: int, text: str = "word ") -> str:
    """Many words."""
    return text * count

@tool(effect="pure")
def broken(how: str) -> str:
    """Goes wrong."""
    if how == "raises":
        raise ValueError("no such city")
    if how == "not utf-8":
        return "\\udcff"
    if how == "not json":
        return {"a": object()}
    return "x" * 100_000_000

@tool(effect="pure", deadline_s=0.5)
def slow() -> str:
    """Never returns."""
    while True:
        time.sleep(60)

@tool(effect="opaque", deadline_s=0.5)
def slow_mail() -> str:
    """Sends, and never returns."""
    _do("slow_mail", "-", False)
    while True:
        time.sleep(60)

@tool(effect="pure")
def dies() -> str:
    """Takes its process along, twice."""
    _do("dies", "-", False)
    if len(_lines()) < 3:
        os._exit(7)
    return "third time"
'''
# What does not depend on the database is tested on one.
on_sqlite = pytest.mark.parametrize("database_settings", ["sqlite"], indirect=True)

FILES = {"nimbos.toml": MANIFEST, "instructions.md": b"Call.\n", "tools.py": TOOLS}


@dataclass
class Calls:
    """A program that makes these calls, one after the other, and ends; woken, it goes on. `outcomes`: by call id."""

    gate: Gate
    syscalls: Sequence[Syscall]
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    async def __call__(self, holding: Holding) -> None:
        await holding.take_mail()
        await self.gate.finish_open(holding, also=self._keep)
        for syscall in self.syscalls:
            if syscall.call_id not in holding.view.syscalls.ended:
                await self.gate.call(holding, syscall, also=self._keep)
        await holding.exit(Reason.OK)

    async def _keep(self, outcome: Outcome) -> Sequence[Draft]:
        self.outcomes[outcome.call_id] = outcome
        return ()


@dataclass
class Gated:
    """`calls`: by process name."""

    place: Place
    gate: Gate
    workspaces: Workspaces
    calls: dict[str, Calls] = field(default_factory=dict)

    def program(self, *syscalls: Syscall, name: str = "plain") -> Calls:
        calls = self.calls[name] = Calls(self.gate, syscalls)
        self.place.bodies[name] = calls
        return calls

    async def spawn(self, name: str = "plain", **fields: Any) -> str:
        return await self.place.kernel.spawn(ACCOUNT, "caller", {"go": 1}, name=name, **fields)

    async def run(self, *syscalls: Syscall) -> tuple[str, Calls]:
        """To the end."""
        calls = self.program(*syscalls)
        pid = await self.spawn()
        assert (await self.place.over(pid)).reason is Reason.OK
        return pid, calls

    async def answer(self, pid: str, body: Any, *, about: str = "") -> Head:
        """The head as it was when the answer was posted."""
        head = await self.place.head(pid)
        await self.place.send(pid, SignalKind.ANSWER, body=body, about=about)
        return head

    async def asking(self, pid: str, reason: Reason, *, after: int = 0) -> Head:
        return await self.place.until(pid, State.ASKING, reason=reason.value, after=after)

    async def log(self, pid: str) -> list[tuple[str, Any]]:
        events = await self.place.kernel.events(ACCOUNT, pid)
        return [(event.kind, decoded(event)) for event in events]

    async def calls_of(self, pid: str, call_id: str) -> list[str]:
        """The kinds of a call's events, without the word they share."""
        events: list[Event] = await self.place.kernel.events(ACCOUNT, pid)
        return [
            event.kind.removeprefix("call.")
            for event in events
            if event.call_id == call_id and event.kind.startswith("call.")
        ]

    async def started(self, pid: str, tool: str) -> None:
        """The tool is running, and waits for `go`."""
        file = self.workspaces.path(pid) / "done.txt"
        async with asyncio.timeout(PATIENCE_S):
            while not (file.exists() and tool in file.read_text()):
                await asyncio.sleep(0.01)  # another process writes it, and rings no bell

    def done(self, pid: str) -> list[str]:
        file = self.workspaces.path(pid) / "done.txt"
        return file.read_text().splitlines() if file.exists() else []

    def go(self, pid: str) -> None:
        (self.workspaces.path(pid) / "go").touch()


def tool(name: str, arguments: Any = None, *, id: str = "c1") -> Syscall:
    return Syscall(call_id=id, verb=Verb.TOOL, resource=name, arguments={} if arguments is None else arguments)


def call(verb: Verb, *, id: str = "c1", **arguments: Any) -> Syscall:
    return Syscall(call_id=id, verb=verb, arguments=arguments)


@asynccontextmanager
async def gated(
    database: Database,
    settings: Settings,
    *,
    server: str = "meter-one",
    start: bool = True,
    clock: SteadyClock | None = None,
) -> AsyncIterator[Gated]:
    async with running(database, settings, server=server, start=False, clock=clock) as place:
        kernel = place.kernel
        await kernel.programs.put(msgspec.structs.replace(ACCOUNT, scopes=frozenset({"programs:code"})), FILES)
        workspaces = Workspaces(Path(settings.home) / "workspaces")
        workers = ToolWorkers(kernel.programs, workspaces)
        gate = Gate(kernel.shared, programs=kernel.programs, workers=workers)
        if start:
            await kernel.start(place.drive)
        yield Gated(place, gate, workspaces)

"""What came of a run, in words that are the same for every run of the same scenario: the final fold of each process,
with the contents of what it names, without ids, times and keys."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nimbos.blobs import open_blobs
from nimbos.config import Settings, StorageSettings
from nimbos.db import Database
from nimbos.kernel.events import CallDenied, ModelFailed
from nimbos.kernel.fold import View, fold
from nimbos.kernel.log import Log
from nimbos.kernel.segments import Segments
from nimbos.kernel.view import Recorded
from nimbos.ledger import budgets_of
from nimbos.work import Work
from tests.ledger.books import ASKS, METERS, Books
from tests.ledger.shop import ledger_of

_LOOSE = frozenset({"listener"})  # how often it looked before it was told is a matter of time
_ASK_ID = re.compile(r"ask_[0-9a-f]{32}")
_PID = re.compile(r"proc_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`processes`: one text for each, comparable. `tokens`: of each, by the ledger. `broken`: what is not as it must be
    whatever happened."""

    processes: tuple[str, ...]
    tokens: tuple[int, ...]
    broken: tuple[str, ...]


async def outcome_of(home: Path, url: str, pids: Sequence[str]) -> Outcome:
    settings = Settings(home=str(home), storage=StorageSettings(database_url=url))
    database = await Database.open(settings)
    try:
        return await Reader(database, settings, pids).read()
    finally:
        await database.close()


class Reader:
    def __init__(self, database: Database, settings: Settings, pids: Sequence[str]) -> None:
        self._database = database
        self._log = Log(database, Work(database))
        self._segments = Segments(database, open_blobs(settings, database))
        self._pids = pids

    async def read(self) -> Outcome:
        books = Books(self._database, server_id="none")
        rows = {row["id"]: {**row, "meters": {}} for row in await books.rows(ASKS)}
        for row in await books.rows(METERS):
            rows[row["ask"]]["meters"][row["meter"]] = row["quantity"]
        told, tokens, broken = [], [], list[str]()
        for pid in self._pids:
            view = fold([event async for event in self._log.all(pid)])
            told.append(await self._told(view))
            used = [ledger_of(row) for row in rows.values() if row["process"] == pid]
            by_log, by_ledger = view.used.get("tokens", 0), sum(one.input + one.output for one in used)
            if by_log != by_ledger:
                broken.append(f"{pid} used {by_log} tokens by its log and {by_ledger} by the ledger")
            if view.name not in _LOOSE:
                tokens.append(by_ledger)
            broken += await self._broken(view)
        broken += [f"ask {row['id']} is {row['state']}" for row in rows.values() if row["state"] != "settled"]
        return Outcome(processes=tuple(sorted(told)), tokens=tuple(sorted(tokens)), broken=tuple(broken))

    async def _told(self, view: View) -> str:
        loose = view.name in _LOOSE
        told = {
            "name": view.name,
            "end": [view.state, view.reason, await self._value(view, view.result), view.error],
            "withheld": view.withheld,
            "steps": sorted([await self._step(view, key, one) for key, one in view.steps.items()], key=json.dumps),
            "children": sorted(
                [[child.exited, await self._value(view, child.result)] for child in view.children.values()],
                key=json.dumps,
            ),
            "context": [] if loose else [await self._value(view, segment.hash) for segment in view.context],
            "turns": 0 if loose else view.turns,
            "calls": 0 if loose else view.calls_made,
            "open": [*view.calls, *view.asks.open, *(call.call_id for call in view.wanted)],
            "signals": [signal.signal for signal in view.signals],
            "exhausted": view.exhausted is not None,
        }
        return _PID.sub("<pid>", _ASK_ID.sub("<ask>", json.dumps(_nameless(told), sort_keys=True)))

    async def _step(self, view: View, key: str, recorded: Recorded) -> list[Any]:
        name = key.rsplit("/", 1)[0].split("#")[0]
        denied = recorded.outcome if isinstance(recorded.outcome, CallDenied | ModelFailed) else None
        return [
            re.sub(r"[0-9a-f]{16}", "<arguments>", name),
            recorded.error,
            await self._value(view, recorded.result),
            denied is not None,
        ]

    async def _value(self, view: View, hash: str | None) -> Any:
        return None if hash is None else await self._segments.get(view.account, hash)

    async def _broken(self, view: View) -> list[str]:
        broken = []
        verified = await self._log.verify(view.pid)
        if verified.broken_at is not None:
            broken.append(f"the log of {view.pid} is broken at {verified.broken_at}: {verified.why}")
        broken += [
            f"ask {ask_id} is not settled in the log" for ask_id, known in view.asks.settled.items() if not known
        ]
        for budget in await self._database.run(lambda: budgets_of("process", view.pid)):
            if budget.reserved:
                broken.append(f"{budget.reserved} {budget.meter} of {view.pid} are still reserved")
        return broken


def _nameless(value: Any) -> Any:
    """What stands under processes' ids stands in the order of its words instead."""
    if isinstance(value, dict):
        told = {name: _nameless(one) for name, one in value.items()}
        if told and all(_PID.fullmatch(name) for name in told):
            return sorted(told.values(), key=json.dumps)
        return told
    return [_nameless(one) for one in value] if isinstance(value, list) else value


def world_is_wrong(done: Sequence[tuple[str, str, str]], pids: Sequence[str]) -> list[str]:
    """What must not have happened outside, whatever happened inside."""
    mails = Counter(pid for pid, tool, _ in done if tool == "mail")
    wrong = [f"{pid} sent {count} mails" for pid, count in mails.items() if count > 1]
    for pid in pids:
        for effect in ("pay", "book"):
            keys = {key for one, tool, key in done if (one, tool) == (pid, effect)}
            if len(keys) > 1:
                wrong.append(f"{pid} did {effect} under {len(keys)} keys")
        books = sum(1 for one, tool, _ in done if (one, tool) == (pid, "book"))
        if books > 1:
            wrong.append(f"{pid} booked {books} times, and could have looked")
    return wrong


def effects_of(done: Sequence[tuple[str, str, str]], pids: Sequence[str]) -> list[list[str]]:
    """What happened outside at least once, for each process, in no order."""
    return sorted(sorted({tool for one, tool, _ in done if one == pid}) for pid in pids)

"""A service without HTTP: a scripted model or a real engine, the real meter file, the real ledger."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nimbos.db import Database
from nimbos.engine import Engine
from nimbos.engine.script import Reply, Script
from nimbos.engine.scripted import TEMPLATE_SHA256, ScriptedSource
from nimbos.hub import Hub, LocalModel
from nimbos.ledger import Desk, Fired, Journal, Recovery
from nimbos.meterfile import MeterFile, _used_rows
from nimbos.service import Service
from nimbos.sources import Sources
from nimbos.types import Account, Admission, Ask, Final, Sampling, Text, TokenChunk, Usage, new_id
from tests.engine.asking import settings_in
from tests.ledger.books import ACCOUNT, ASKS, METERS, Books


@dataclass
class Told:
    """What the caller of one ask was given."""

    ask: Ask
    output: int = 0
    finals: list[Final] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def usage(self) -> Usage:
        return sum((final.usage for final in self.finals), Usage())

    @property
    def complete(self) -> bool:
        return len(self.finals) == self.ask.n


@dataclass
class Shop:
    database: Database
    service: Service
    desk: Desk
    meters: MeterFile
    books: Books
    fired: list[Fired]

    async def ask(
        self,
        text: str = "say",
        *,
        leave_after: int | None = None,
        leave: Callable[[], None] = lambda: None,
        account: Account = ACCOUNT,
        admission: Admission | None = None,
        journal: Journal | None = None,
        told: Told | None = None,
        **fields: Any,
    ) -> Told:
        """The whole answer, or what came before the caller left. `leave` is called right before."""
        told = told or Told(an_ask(text, **fields))
        chunks = self.service.generate(account, told.ask, admission=admission, journal=journal)
        async with aclosing(chunks):
            async for chunk in chunks:
                if isinstance(chunk, TokenChunk):
                    told.output += len(chunk.ids)
                elif isinstance(chunk, Final):
                    told.finals.append(chunk)
                if leave_after is not None and told.output >= leave_after:
                    leave()
                    break
        return told

    async def rows(self) -> dict[str, Mapping[str, Any]]:
        """The asks' rows with their tokens by meter, by id."""
        found = {row["id"]: {**row, "meters": {}} for row in await self.books.rows(ASKS)}
        for row in await self.books.rows(METERS):
            found[row["ask"]]["meters"][row["meter"]] = row["quantity"]
        return found

    def counted(self, ask_id: str) -> Usage:
        """What the meter says of an ask that is not settled."""
        descriptor = self.meters.descriptor()
        try:
            return dict(_used_rows(descriptor))[ask_id].usage()
        finally:
            os.close(descriptor)

    @property
    def rows_in_use(self) -> int:
        return len(self.meters._used)


def an_ask(text: str = "say", **fields: Any) -> Ask:
    given = {"model": "demo", "sampling": Sampling(temperature=0.0), **fields}
    return Ask(id=new_id("ask"), account=ACCOUNT.id, parts=(Text(text),), **given)


def ledger_of(row: Mapping[str, Any]) -> Usage:
    """What one ask's rows say, as a usage."""
    found = row["meters"]
    cached, thinking = found.get("cached", 0), found.get("thinking", 0)
    return Usage(
        input=found.get("input", 0) + cached,
        cached=cached,
        output=found.get("output", 0) + thinking,
        thinking=thinking,
        recomputed=found.get("recomputed", 0),
    )


def script(words: int = 200, *, thinking: int = 0, rate: float | None = None) -> Script:
    text, thought = " ".join(["word"] * words), " ".join(["hm"] * thinking)
    return Script((), Reply(text=text, thinking=thought, tokens_per_second=rate))


@asynccontextmanager
async def shop(
    database: Database,
    home: Path,
    *,
    says: Script | None = None,
    others: Mapping[str, Script] | None = None,
    models: tuple[Path, ...] = (),
    patience_s: float = 10.0,
    recover: bool = True,
    model_hash: str = "0" * 64,
) -> AsyncIterator[Shop]:
    """`others`: scripted models beside `demo`, by id. `models`: GGUF files; their id is the file's stem."""
    settings = settings_in(home)
    meters = MeterFile.create(settings.run_dir)
    books = Books(database, server_id=meters.path.stem)
    fired: list[Fired] = []
    desk = Desk(
        database=database, ledger=books.ledger, meters=meters, on_alert=fired.append, admit_patience_s=patience_s
    )
    if recover:
        await Recovery(database=database, ledger=books.ledger, run_dir=settings.run_dir).recover()
    said = {"demo": says or script(), **(others or {})}
    scripted = tuple(ScriptedSource(one, model_id=name, model_hash=model_hash) for name, one in said.items())
    for source in scripted:
        source.count_into(meters)
    hub = Hub(settings)

    def start_engine(model: LocalModel, spare_bytes: int) -> Engine:
        return Engine(
            model_path=model.path, model_id=model.id, settings=settings, model_hash=model.sha256, meters=meters
        )

    sources = Sources(
        shelf=hub,
        start_engine=start_engine,
        memory_needed=lambda model: 1,
        memory_wished=lambda model: 0,
        memory_budget_bytes=2**30,
        scripted=scripted,
        named={path.stem: replace(hub.find(str(path)), id=path.stem) for path in models},
    )
    service = Service(sources=sources, desk=desk, watchers=(), trusted_templates=frozenset({TEMPLATE_SHA256}))
    try:
        yield Shop(database, service, desk, meters, books, fired)
    finally:
        await service.close()
        meters.close()

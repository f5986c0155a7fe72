"""A kernel whose agents think with a scripted model, on a real database, ledger and meter file."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nimbos.blobs import open_blobs
from nimbos.config import Settings
from nimbos.db import Database
from nimbos.engine.script import Script
from nimbos.kernel import Kernel
from nimbos.kernel.chain import decoded
from nimbos.kernel.events import Body, ModelPartial
from nimbos.kernel.fold import View, fold
from nimbos.ledger import Allowance
from nimbos.types import Account, Usage
from tests.kernel.running import Place
from tests.ledger.shop import Shop, ledger_of, shop

ACCOUNT = Account(
    id="proj_one", name="one", organisation="org_default", key="key_one", scopes=frozenset({"programs:code"})
)


@dataclass
class Minds(Place):
    """Programs are `instructions.md` and a manifest; every process of a test is of one account."""

    shop: Shop | None = None

    async def program(self, manifest: str = "", files: Mapping[str, bytes] | None = None) -> str:
        given = {"nimbos.toml": b'name = "agent"\n' + manifest.encode(), "instructions.md": b"Be brief."}
        return (await self.kernel.programs.put(ACCOUNT, {**given, **(files or {})})).hash

    async def run(
        self, program: str, input: Any = "go", *, model: str = "demo", budget: Allowance | None = None
    ) -> str:
        return await self.kernel.spawn(ACCOUNT, program, input, model=model, budget=budget)

    async def result(self, pid: str) -> Any:
        head = await self.over(pid)
        assert head.result is not None, head
        return await self.kernel.segments.get(head.account, head.result)

    async def bodies_of(self, pid: str) -> list[Body]:
        return [decoded(event) async for event in self.kernel.log.all(pid)]

    async def view(self, pid: str) -> View:
        return fold([event async for event in self.kernel.log.all(pid)])

    async def shown(self, pid: str) -> list[dict[str, Any]]:
        view = await self.view(pid)
        return [await self.kernel.segments.get(view.account, segment.hash) for segment in view.context]

    async def billed(self, pid: str) -> Usage:
        """What the ledger says of all its asks."""
        assert self.shop is not None
        rows = await self.shop.rows()
        return sum((ledger_of(row) for row in rows.values() if row["process"] == pid), Usage())

    async def until_partial(self, pid: str, *, tokens: int = 1) -> None:
        """Waits until so many tokens of a running answer are in its log."""
        with self.kernel.bells.follow(pid) as follower:
            while True:
                follower.news.clear()
                bodies = await self.bodies_of(pid)
                if sum(len(body.ids) for body in bodies if isinstance(body, ModelPartial)) >= tokens:
                    return
                await follower.news.wait()


@asynccontextmanager
async def minds(
    database: Database,
    settings: Settings,
    script: Mapping[str, Any],
    *,
    others: Mapping[str, Mapping[str, Any]] | None = None,
    server: str = "one",
    start: bool = True,
    model_hash: str = "0" * 64,
    models: tuple[Path, ...] = (),
) -> AsyncIterator[Minds]:
    """`models`: GGUF files beside the scripted model, each known by its stem."""
    home = Path(settings.home)
    home.mkdir(parents=True, exist_ok=True)
    says = _read(home, "demo", script)
    also = {name: _read(home, name, other) for name, other in (others or {}).items()}
    async with shop(database, home / server, says=says, others=also, model_hash=model_hash, models=models) as open_shop:
        kernel = Kernel(
            database=database,
            blobs=open_blobs(settings, database),
            service=open_shop.service,
            home=home,
            server=f"meter-{server}",
            resolve=_same,
        )
        place = Minds(kernel, database, shop=open_shop)
        if start:
            await kernel.start()
        try:
            yield place
        finally:
            await kernel.close()


def calling(name: str, **arguments: Any) -> dict[str, Any]:
    """A script's reply that calls one tool."""
    return {"text": "", "tool_calls": [{"name": name, "arguments": arguments}]}


def words(count: int, *, rate: float | None = None) -> dict[str, Any]:
    """A reply of so many tokens, each another word."""
    return {"text": " ".join(f"w{number}" for number in range(count)), "tokens_per_second": rate}


def _read(home: Path, name: str, script: Mapping[str, Any]) -> Script:
    (home / f"{name}.json").write_text(json.dumps(script))
    return Script.read(home / f"{name}.json")[0]


async def _same(account: Account) -> Account:
    return account

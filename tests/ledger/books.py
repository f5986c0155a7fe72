"""A ledger on a database, and the little that most tests say of an ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sqlalchemy import select

from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.ledger import asks, meters, usage_days, usage_hours, usage_months
from nimbos.ledger import (
    Budget,
    Extended,
    Ledger,
    Progress,
    Reserved,
    Settled,
    Settlement,
    budgets_of,
    find_budget,
    set_budget,
)
from nimbos.types import Account, Ask, AskClass, ModelCard, Origin, Usage, new_id

T = TypeVar("T")
CARD = ModelCard(id="demo", model_hash="0" * 64, architecture="scripted", context_tokens=4096)
ACCOUNT = Account(id="proj_a", name="A", organisation="org_default", key="key_a", key_name="laptop", user="user_a")

ASKS = Statement(select(asks).order_by(asks.c.id))
METERS = Statement(select(meters).order_by(meters.c.ask, meters.c.meter))
HOURS = Statement(select(usage_hours))
DAYS = Statement(select(usage_days))
MONTHS = Statement(select(usage_months))


def an_ask(**fields: Any) -> Ask:
    return Ask(**{"id": new_id("ask"), "account": ACCOUNT.id, "model": CARD.id, **fields})


class Books:
    """One server's view. `run` is for what changes budgets, limits and prices."""

    def __init__(self, database: Database, *, server_id: str = "meter-1") -> None:
        self.database = database
        self.ledger = Ledger(server_id=server_id)

    async def run(self, make: Callable[[], Transaction[T]]) -> T:
        return await self.database.run(make)

    async def budget(self, kind: str, owner: str, **fields: Any) -> Budget:
        given = {"meter": "tokens", "period": "total", **fields}
        return await self.run(lambda: set_budget(kind, owner, **given))

    async def look(self, budget: Budget) -> Budget:
        return await self.run(lambda: find_budget(budget.id))

    async def budgets_of(self, kind: str, owner: str) -> list[Budget]:
        return await self.run(lambda: budgets_of(kind, owner))

    async def reserve(
        self, ask: Ask | None = None, *, prompt: int = 10, account: Account = ACCOUNT, process: str = ""
    ) -> Reserved:
        ask = ask or an_ask()
        origin = Origin(route="/v1/chat/completions", process=process)
        return await self.run(lambda: self.ledger.reserve(account, ask, origin=origin, prompt_tokens=prompt, card=CARD))

    async def extend(self, ask_id: str, usage: Usage, *, allowance: int, **fields: Any) -> Extended:
        given = {"live": 1, "ended_output": 0, "limit_tokens": None, **fields}
        progress = Progress(usage=usage, allowance_tokens=allowance, **given)
        return await self.run(lambda: self.ledger.extend(ask_id, progress))

    async def settle(self, ask_id: str, usage: Usage, *, outcome: str = "done") -> Settled:
        settlement = Settlement(ask_id=ask_id, usage=usage, outcome=outcome, told_output=usage.output)
        return await self.run(lambda: self.ledger.settle(settlement))

    async def ask_and_settle(self, usage: Usage, *, prompt: int | None = None, **fields: Any) -> Settled:
        reserved = await self.reserve(prompt=usage.input if prompt is None else prompt, **fields)
        return await self.settle(reserved.ask_id, usage)

    async def rows(self, statement: Statement) -> list[Mapping[str, Any]]:
        return [dict(row) for row in await self.database.read(statement())]


def of_class(ask_class: AskClass) -> Ask:
    return an_ask(ask_class=ask_class)

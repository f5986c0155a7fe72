"""What a process and all that draw on its budget used: tokens and money of their asks, calls and time of their budgets.

An ask counts when it is settled, for the process that asked it; a budget's `used` counts at once, also for all above.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from sqlalchemy import CTE, bindparam, func, literal_column, select

from nimbos.db import Database, Statement
from nimbos.db.tables.ledger import asks, budgets, meters
from nimbos.ledger.allowances import METERS
from nimbos.ledger.budgets import CALL_METERS, Budget, budget_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessUse:
    """What one process used itself: `asks`, tokens by kind (`prices.quantities`), `cost_micros`, `seconds_ms` and
    `calls`; what is zero is left out. `parent`: whose budget it draws on; None for the one that was asked for.
    `budgets`: by meter; their `used` is of all below, too."""

    process: str
    parent: str | None
    used: dict[str, int]
    budgets: dict[str, Budget]


async def family_use(database: Database, process: str) -> list[ProcessUse]:
    """The process first, parents before children. Raises: StorageUnavailable."""
    rows = [budget_of(row) for row in await database.read(_BUDGETS(of=process))]
    used: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for row in await database.read(_ASKS(of=process)):
        used[row["process"]] |= {"asks": int(row["asks"]), "cost_micros": int(row["cost_micros"])}
    for row in await database.read(_METERS(of=process)):
        used[row["process"]][row["meter"]] = int(row["quantity"])
    owners = {budget.id: budget.owner_id for budget in rows}
    below: defaultdict[str, int] = defaultdict(int)
    for budget in rows:
        if budget.parent is not None:
            below[budget.parent] += budget.used
    family: dict[str, ProcessUse] = {}
    for budget in rows:
        name = budget.owner_id
        if name not in family:
            parent = owners.get(budget.parent or "") if name != process else None
            family[name] = ProcessUse(process=name, parent=parent, used=used[name], budgets={})
        family[name].budgets[budget.meter] = budget
        if budget.meter in CALL_METERS:
            family[name].used[budget.meter] = budget.used - below[budget.id]
    for use in family.values():
        for meter in [meter for meter, amount in use.used.items() if not amount]:
            del use.used[meter]
    return list(family.values())


def _family() -> CTE:
    """The budgets of a process and of all that draw on them."""
    wanted = budgets.c.meter.in_([literal_column(f"'{meter}'") for meter in METERS])
    start = select(budgets.c.id, budgets.c.owner_id).where(
        budgets.c.owner_kind == literal_column("'process'"),
        budgets.c.owner_id == bindparam("of"),
        budgets.c.period == literal_column("'total'"),
        wanted,
    )
    down = start.cte("down", recursive=True)
    return down.union(select(budgets.c.id, budgets.c.owner_id).join(down, budgets.c.parent == down.c.id))


def _budgets() -> Statement:
    down = _family()
    found = select(budgets).where(budgets.c.id.in_(select(down.c.id)))
    return Statement(found.order_by(budgets.c.depth, budgets.c.owner_id, budgets.c.meter))


def _asks() -> Statement:
    down = _family()
    counted = select(
        asks.c.process, func.count().label("asks"), func.sum(asks.c.cost_micros).label("cost_micros")
    ).where(
        literal_column("process <> ''"),  # as the partial index has it
        asks.c.process.in_(select(down.c.owner_id)),
        asks.c.state == literal_column("'settled'"),
    )
    return Statement(counted.group_by(asks.c.process))


def _meters() -> Statement:
    down = _family()
    summed = (
        select(asks.c.process, meters.c.meter, func.sum(meters.c.quantity).label("quantity"))
        .join(meters, meters.c.ask == asks.c.id)
        .where(literal_column("process <> ''"), asks.c.process.in_(select(down.c.owner_id)))
    )
    return Statement(summed.group_by(asks.c.process, meters.c.meter))


_BUDGETS = _budgets()
_ASKS = _asks()
_METERS = _meters()

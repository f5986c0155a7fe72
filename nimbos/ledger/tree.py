"""Making, changing and showing the tree of budgets. Read `budgets.py` for what a budget does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    Select,
    bindparam,
    column,
    delete,
    func,
    literal_column,
    select,
    text,
    update,
)

from nimbos.db import Dialect, Statement, Transaction, insert
from nimbos.db.tables.ledger import budgets, usage_days
from nimbos.errors import InvalidRequest, NotFound
from nimbos.ledger import alerts, periods
from nimbos.ledger.budgets import COST, TOKENS, Budget, budget_of
from nimbos.ledger.owners import DEPTHS, OWNER_KINDS
from nimbos.ledger.prices import PRICED
from nimbos.ledger.rollups import UNFOLDED, unfolded_hours
from nimbos.types import new_id

LIMIT_MAX = 10**15
DEPTH_MAX = 64
_METERS = (TOKENS, COST)

_FIND = Statement(
    select(budgets)
    .where(
        budgets.c.owner_kind == bindparam("kind"),
        budgets.c.owner_id == bindparam("owner"),
        budgets.c.meter == bindparam("of_meter"),
        budgets.c.period == bindparam("of_period"),
    )
    .with_for_update()
)
_SELECT_OF = Statement(
    select(budgets)
    .where(budgets.c.owner_kind == bindparam("kind"), budgets.c.owner_id == bindparam("owner"))
    .order_by(budgets.c.meter, budgets.c.period)
)
_SELECT_ALL = Statement(
    select(budgets)
    .where(budgets.c.owner_kind != literal_column("'process'"))
    .order_by(budgets.c.depth, budgets.c.owner_id, budgets.c.meter)
)
_SELECT_ONE = Statement(select(budgets).where(budgets.c.id == bindparam("of")))
_INSERT = insert(budgets)
_CHANGE = Statement(
    update(budgets)
    .where(budgets.c.id == bindparam("of"))
    .values(limit=bindparam("new_limit"), owner_name=bindparam("name"))
)
_DELETE = Statement(delete(budgets).where(budgets.c.id == bindparam("of")))


def set_budget(
    owner_kind: str,
    owner_id: str,
    *,
    meter: str,
    limit: int | None,
    period: str,
    parent: str | None = None,
    owner_name: str = "",
    alerts_at: Sequence[int] | None = None,
) -> Transaction[Budget]:
    """Makes the owner's budget of this meter and period, or changes its limit; what is used stays used.

    A new one of a day or a month begins with what its owner has used in that period already. Asks that run are charged
    to it whole, and none is missed or counted twice. `parent`: the id of the budget that a child process draws on as
    well; the other owners' budgets need none, an ask finds them all. `alerts_at`: thresholds in the meter's unit; None
    leaves them as they are.

    Raises: InvalidRequest; NotFound for a parent that is not there.
    """
    _check(owner_kind, owner_id, meter=meter, limit=limit, period=period, alerts_at=alerts_at or ())
    rows = yield _FIND(kind=owner_kind, owner=owner_id, of_meter=meter, of_period=period)
    now_ms = _now_ms()
    if rows:
        budget_id = rows[0]["id"]
        yield _CHANGE(of=budget_id, new_limit=limit, name=owner_name or rows[0]["owner_name"])
    else:
        yield _HOLD_ASKS()
        budget_id = new_id("budget")
        depth = yield from _depth(owner_kind, parent)
        used = yield from _used_already(owner_kind, owner_id, meter=meter, period=period, now_ms=now_ms)
        yield _INSERT(
            id=budget_id,
            parent=parent,
            depth=depth,
            owner_kind=owner_kind,
            owner_id=owner_id,
            owner_name=owner_name,
            meter=meter,
            period=period,
            limit=limit,
            period_start_ms=periods.start_ms(period, now_ms),
            reserved=0,
            used=used,
            alert_at=None,
        )
    if alerts_at is not None:
        yield from alerts.replace_alerts(budget_id, alerts_at)
    return (yield from find_budget(budget_id))


def remove_budget(budget_id: str) -> Transaction[None]:
    """Asks that hold some of it go on unheld by it."""
    yield from alerts.remove_alerts(budget_id)
    yield _DELETE(of=budget_id)


def find_budget(budget_id: str) -> Transaction[Budget]:
    """Raises: NotFound."""
    rows = yield _SELECT_ONE(of=budget_id)
    if not rows:
        raise NotFound(f"There is no budget {budget_id[:60]!r}.", param="budget")
    return budget_of(rows[0]).at(_now_ms())


def budgets_of(owner_kind: str, owner_id: str) -> Transaction[list[Budget]]:
    rows = yield _SELECT_OF(kind=owner_kind, owner=owner_id)
    now_ms = _now_ms()
    return [budget_of(row).at(now_ms) for row in rows]


def all_budgets() -> Transaction[list[Budget]]:
    """From the root, without those of processes, of which each has four (`allowances.py`)."""
    rows = yield _SELECT_ALL()
    now_ms = _now_ms()
    return [budget_of(row).at(now_ms) for row in rows]


def _depth(owner_kind: str, parent: str | None) -> Transaction[int]:
    least = DEPTHS[owner_kind]
    if parent is None:
        return least
    above = yield from find_budget(parent)
    if above.depth + 1 > DEPTH_MAX:
        raise InvalidRequest(f"Budgets may be nested {DEPTH_MAX} deep.", param="parent")
    return max(least, above.depth + 1)


def _holding(dialect: Dialect) -> Executable:
    """Until the transaction ends no ask is let in, extended or settled, so each is settled either before what is summed
    here, or when its settlement finds the budget. SQLite has one writer anyway."""
    if dialect == "sqlite":
        return select(literal_column("1"))
    return text("LOCK TABLE asks IN EXCLUSIVE MODE")


_HOLD_ASKS = Statement(_holding)


@cache
def _sum_of(owner_kind: str, meter: str) -> Statement:
    """What the days have, and what of the hours they do not have yet (`rollups.py`): in one statement, as they may be
    brought up to date meanwhile."""
    name = "cost_micros" if meter == COST else "quantity"
    counted = ("asks",) if meter == COST else PRICED
    of_owner: list[ColumnElement[bool]] = [column("meter").in_([literal_column(f"'{one}'") for one in counted])]
    if owner_kind != "organisation":  # there is one
        of_owner.append(column(owner_kind) == bindparam("owner"))
    since_ms = bindparam("since_ms", type_=BigInteger)
    of_days, of_hours = column("day_ms") >= since_ms, column("hour_ms") >= since_ms
    days: Select[Any] = select(func.sum(column(name))).select_from(usage_days).where(of_days, *of_owner)
    rest: Select[Any] = select(func.sum(column(name) - column(f"folded_{name}"))).where(of_hours, *of_owner)

    def build(dialect: Dialect) -> Executable:
        hours = rest.select_from(unfolded_hours(dialect)).where(UNFOLDED)
        sums = [func.coalesce(part.scalar_subquery(), 0) for part in (days, hours)]
        return select((sums[0] + sums[1]).label("used"))

    return Statement(build)


def _used_already(owner_kind: str, owner_id: str, *, meter: str, period: str, now_ms: int) -> Transaction[int]:
    if period == "total":
        return 0
    values: dict[str, int | str] = {"since_ms": periods.start_ms(period, now_ms)}
    if owner_kind != "organisation":
        values["owner"] = owner_id
    rows = yield _sum_of(owner_kind, meter)(**values)
    return int(rows[0]["used"])


def _check(
    owner_kind: str, owner_id: str, *, meter: str, limit: int | None, period: str, alerts_at: Sequence[int]
) -> None:
    if owner_kind not in OWNER_KINDS:
        raise InvalidRequest(f"There is no owner {owner_kind[:60]!r}; there are {', '.join(OWNER_KINDS)}.")
    if not owner_id:
        raise InvalidRequest("A budget needs an owner.")
    if meter not in _METERS:
        raise InvalidRequest(f"There is no meter {meter[:60]!r}; budgets count {' or '.join(_METERS)}.", param="meter")
    if period not in periods.PERIODS:
        known = ", ".join(periods.PERIODS)
        raise InvalidRequest(f"There is no period {period[:60]!r}; there are {known}.", param="period")
    for number in (*alerts_at, *(() if limit is None else (limit,))):
        if not 0 <= number <= LIMIT_MAX:
            raise InvalidRequest(f"A budget and its alerts are from 0 to {LIMIT_MAX}, not {number}.", param="limit")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

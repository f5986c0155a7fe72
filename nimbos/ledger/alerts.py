"""Thresholds of budgets that tell somebody, once in each period.

A threshold is in the budget's own unit. That it fired is a row, changed in the transaction that crossed it; whoever
runs the transaction tells it (`desk.py`: log and metrics) once that is committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import bindparam, delete, func, or_, select, update

from nimbos.db import Row, Statement, Transaction, insert
from nimbos.db.tables.ledger import alerts, budgets
from nimbos.ledger.budgets import Budget
from nimbos.types import new_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """`details`: JSON of whoever asked for it, kept for them. `fired_period_ms`: the start of the period in which it
    fired last."""

    id: str
    budget: str
    threshold: int
    details: str = ""
    fired_ms: int | None = None
    fired_period_ms: int | None = None
    fired_used: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """A threshold was crossed."""

    alert: str
    budget: Budget
    threshold: int


_SELECT_DUE = Statement(
    select(alerts)
    .where(
        alerts.c.budget == bindparam("of"),
        alerts.c.threshold <= bindparam("reached"),
        or_(alerts.c.fired_period_ms.is_(None), alerts.c.fired_period_ms < bindparam("start_ms")),
    )
    .order_by(alerts.c.threshold, alerts.c.id)
    .with_for_update()
)
_FIRE = Statement(
    update(alerts)
    .where(alerts.c.id == bindparam("of"))
    .values(fired_ms=bindparam("at_ms"), fired_period_ms=bindparam("start_ms"), fired_used=bindparam("reached"))
)
_SELECT_OF = Statement(
    select(alerts).where(alerts.c.budget == bindparam("of")).order_by(alerts.c.threshold, alerts.c.id)
)
_SELECT_ONE = Statement(select(alerts).where(alerts.c.id == bindparam("of")))
_INSERT = insert(alerts)
_CHANGE = Statement(
    update(alerts)
    .where(alerts.c.id == bindparam("of"))
    .values(threshold=bindparam("at"), details=bindparam("new_details"), fired_period_ms=None)
)
_DELETE = Statement(delete(alerts).where(alerts.c.id == bindparam("of")))
# `alert_at` of a budget may be too low, which costs a look; never too high.
_LOWEST = Statement(
    update(budgets)
    .where(budgets.c.id.in_(select(alerts.c.budget).where(alerts.c.id == bindparam("of"))))
    .values(alert_at=select(func.min(alerts.c.threshold)).where(alerts.c.budget == budgets.c.id).scalar_subquery())
)
_DELETE_OF = Statement(delete(alerts).where(alerts.c.budget == bindparam("of")))


def fire(chain: Sequence[Budget], now_ms: int) -> Transaction[list[Fired]]:
    """Marks and returns what the budgets' `used` has reached and this period has not told yet."""
    fired = []
    for budget in chain:
        if budget.alert_at is None or budget.used < budget.alert_at:
            continue
        rows = yield _SELECT_DUE(of=budget.id, reached=budget.used, start_ms=budget.period_start_ms)
        for row in rows:
            yield _FIRE(of=row["id"], at_ms=now_ms, start_ms=budget.period_start_ms, reached=budget.used)
            fired.append(Fired(alert=row["id"], budget=budget, threshold=row["threshold"]))
    return fired


def alerts_of(budget_id: str) -> Transaction[list[Alert]]:
    rows = yield _SELECT_OF(of=budget_id)
    return [alert_of(row) for row in rows]


def find_alert(alert_id: str) -> Transaction[Alert | None]:
    rows = yield _SELECT_ONE(of=alert_id)
    return alert_of(rows[0]) if rows else None


def add_alert(budget_id: str, *, threshold: int, details: str = "") -> Transaction[Alert]:
    alert = Alert(id=new_id("alert"), budget=budget_id, threshold=threshold, details=details)
    yield _INSERT(**{name: getattr(alert, name) for name in Alert.__dataclass_fields__})
    yield _LOWEST(of=alert.id)
    return alert


def change_alert(alert_id: str, *, threshold: int, details: str = "") -> Transaction[None]:
    """It may fire again in this period."""
    yield _CHANGE(of=alert_id, at=threshold, new_details=details)
    yield _LOWEST(of=alert_id)


def remove_alert(alert_id: str) -> Transaction[None]:
    yield _DELETE(of=alert_id)


def replace_alerts(budget_id: str, thresholds: Sequence[int]) -> Transaction[None]:
    """These and no others; those that stay keep whether they fired."""
    known = yield from alerts_of(budget_id)
    for alert in known:
        if alert.threshold not in thresholds:
            yield from remove_alert(alert.id)
    for threshold in sorted(set(thresholds) - {alert.threshold for alert in known}):
        yield from add_alert(budget_id, threshold=threshold)


def remove_alerts(budget_id: str) -> Transaction[None]:
    yield _DELETE_OF(of=budget_id)


def alert_of(row: Row) -> Alert:
    return Alert(**{name: row[name] for name in Alert.__dataclass_fields__})

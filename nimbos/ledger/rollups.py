"""Sums by hour, kept in the transaction that settles an ask, and by day and month, added up from them when somebody
reads, and from time to time before: who reads after a month must not wait for that month. `reports.py` reads them.

An hour's row remembers how much of it the days and months have, so what is settled late, or by a server whose clock is
wrong, comes into them as well, once.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import ColumnElement, Executable, TextClause, bindparam, column, literal_column, select, text, update

from nimbos.db import Database, Dialect, ManyRows, Row, Statement, Transaction, Value, upsert
from nimbos.db.tables.ledger import usage_days, usage_hours, usage_months
from nimbos.errors import NimbosError
from nimbos.ledger.periods import DAY_MS, HOUR_MS, start_ms

ASKS = "asks"
_KEY = ("project", "key", "model", "class", "process", "meter")
_SUMS = ("quantity", "cost_micros")
_AT_ONCE = 200  # asks are settled in between
FOLD_S = 600.0
_ADD_HOUR = ManyRows(usage_hours, key=("hour_ms", *_KEY), add=_SUMS)
_ADD_DAY = upsert(usage_days, key=("day_ms", *_KEY), add=_SUMS)
_ADD_MONTH = upsert(usage_months, key=("month_ms", *_KEY), add=_SUMS)
_PRIMARY = tuple(usage_hours.primary_key.columns)
UNFOLDED: ColumnElement[Any] = literal_column("quantity <> folded_quantity")  # as the partial index has it


def unfolded_hours(dialect: Dialect) -> TextClause:
    """The hours, to select from those that are `UNFOLDED`. SQLite takes the index of those few only when it is told to:
    it would read every hour there ever was."""
    return text("usage_hours INDEXED BY ix_usage_hours_unfolded" if dialect == "sqlite" else "usage_hours")


def _unfolded(dialect: Dialect) -> Executable:
    columns: list[ColumnElement[Any]] = [column(one.name) for one in usage_hours.columns]
    return (
        select(*columns)
        .select_from(unfolded_hours(dialect))
        .where(UNFOLDED)
        .order_by(*(column(one.name) for one in _PRIMARY))
        .limit(_AT_ONCE)
        .with_for_update()
    )


_UNFOLDED = Statement(_unfolded)
_FOLDED = Statement(
    update(usage_hours)
    .where(*(column == bindparam(f"the_{column.name}") for column in _PRIMARY))
    .values(folded_quantity=bindparam("in_quantity"), folded_cost_micros=bindparam("in_cost_micros"))
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Whose row of sums an ask belongs to."""

    project: str
    key: str
    model: str
    ask_class: str
    process: str


def add(line: Line, quantities: dict[str, int], *, cost_micros: int, ended_ms: int) -> Transaction[None]:
    """One ask more. Rows are always taken in the same order, so that settlements do not wait in a circle."""
    rows: list[dict[str, Value]] = [
        {
            "hour_ms": ended_ms - ended_ms % HOUR_MS,
            "project": line.project,
            "key": line.key,
            "model": line.model,
            "class": line.ask_class,
            "process": line.process,
            "meter": meter,
            "quantity": quantity,
            "cost_micros": cost_micros if meter == ASKS else 0,
            "folded_quantity": 0,
            "folded_cost_micros": 0,
        }
        for meter, quantity in sorted({**quantities, ASKS: 1}.items())
    ]
    yield _ADD_HOUR(rows)


async def keep_folding(database: Database) -> None:
    """Until it is cancelled."""
    while True:
        await asyncio.sleep(FOLD_S)
        try:
            await fold_all(database)
        except NimbosError as error:
            _log.warning("ledger.sums_not_added_up", code=error.code)


async def fold_all(database: Database) -> None:
    """The sums by day and month have everything that was settled before. Raises: StorageUnavailable."""
    while await database.run(fold):
        pass


def fold() -> Transaction[bool]:
    """Adds to days and months what they do not have; whether there may be more."""
    rows = yield _UNFOLDED()
    sums: dict[tuple[Statement, str, int, tuple[str, ...]], list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        key = tuple(row[name] for name in _KEY)
        hour_ms = row["hour_ms"]
        for statement, name, at_ms in (
            (_ADD_DAY, "day_ms", hour_ms - hour_ms % DAY_MS),
            (_ADD_MONTH, "month_ms", start_ms("month", hour_ms)),
        ):
            found = sums[statement, name, at_ms, key]
            found[0] += row["quantity"] - row["folded_quantity"]
            found[1] += row["cost_micros"] - row["folded_cost_micros"]
    for (statement, name, at_ms, key), (quantity, cost_micros) in sums.items():
        values: dict[str, Value] = {**dict(zip(_KEY, key, strict=True)), name: at_ms}
        yield statement(quantity=quantity, cost_micros=cost_micros, **values)
    for row in rows:
        yield _FOLDED(**_primary(row), in_quantity=row["quantity"], in_cost_micros=row["cost_micros"])
    return len(rows) == _AT_ONCE


def _primary(row: Row) -> dict[str, Value]:
    return {f"the_{column.name}": row[column.name] for column in _PRIMARY}

"""Sums by hour, day and month, kept in the transaction that settles an ask. `reports.py` reads them."""

from __future__ import annotations

from dataclasses import dataclass

from nimbos.db import ManyRows, Transaction, Value
from nimbos.db.tables.ledger import usage_days, usage_hours, usage_months
from nimbos.ledger.periods import DAY_MS, HOUR_MS, start_ms

ASKS = "asks"
_KEY = ("project", "key", "model", "class", "process", "meter")
_ADD_HOUR = ManyRows(usage_hours, key=("hour_ms", *_KEY), add=("quantity", "cost_micros"))
_ADD_DAY = ManyRows(usage_days, key=("day_ms", *_KEY), add=("quantity", "cost_micros"))
_ADD_MONTH = ManyRows(usage_months, key=("month_ms", *_KEY), add=("quantity", "cost_micros"))


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
            "project": line.project,
            "key": line.key,
            "model": line.model,
            "class": line.ask_class,
            "process": line.process,
            "meter": meter,
            "quantity": quantity,
            "cost_micros": cost_micros if meter == ASKS else 0,
        }
        for meter, quantity in sorted({**quantities, ASKS: 1}.items())
    ]
    yield _ADD_HOUR([{**row, "hour_ms": ended_ms - ended_ms % HOUR_MS} for row in rows])
    yield _ADD_DAY([{**row, "day_ms": ended_ms - ended_ms % DAY_MS} for row in rows])
    month_ms = start_ms("month", ended_ms)
    yield _ADD_MONTH([{**row, "month_ms": month_ms} for row in rows])

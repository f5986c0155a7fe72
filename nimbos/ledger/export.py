"""Every settled ask as a line of CSV or JSON, streamed: the whole is never in memory."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Literal, cast

import msgspec
from sqlalchemy import Executable, bindparam, func, select

from nimbos.db import Database, Dialect, Row, Statement
from nimbos.db.tables.ledger import asks, meters
from nimbos.ledger.prices import PRICED, RECOMPUTED

Format = Literal["csv", "json"]
_RECEIPT = (
    "id",
    "organisation",
    "project",
    "key",
    "user",
    "process",
    "batch",
    "route",
    "model",
    "model_hash",
    "kind",
    "class",
    "n",
    "started_ms",
    "ended_ms",
    "queue_ms",
    "compute_ms",
    "outcome",
    "finish",
    "price_version",
    "told_output",
    "restarts",
)
_METERS = (*PRICED, RECOMPUTED)
COLUMNS = (*_RECEIPT, *(f"{meter}_tokens" for meter in _METERS), "cost_micros")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run
_FOREVER_MS = 2**62


def _quantity(meter: str) -> Any:
    found = select(meters.c.quantity).where(meters.c.ask == asks.c.id, meters.c.meter == meter).scalar_subquery()
    return func.coalesce(found, 0).label(f"{meter}_tokens")


def _settled(_: Dialect) -> Executable:
    return (
        select(*(asks.c[name] for name in _RECEIPT), *map(_quantity, _METERS), asks.c.cost_micros)
        .where(asks.c.ended_ms >= bindparam("since_ms"), asks.c.ended_ms < bindparam("until_ms"))
        .order_by(asks.c.ended_ms)
    )


_SETTLED = Statement(_settled)


async def export_asks(
    database: Database, form: Format, *, since_ms: int | None = None, until_ms: int | None = None
) -> AsyncIterator[bytes]:
    """Lines of asks that ended in `[since_ms, until_ms)`, in that order: CSV with a head, or a JSON object each.
    Here `input_tokens` are those that were computed, `output_tokens` those of the answer without its thinking."""
    if form == "csv":
        yield _csv(COLUMNS)
    query = _SETTLED(since_ms=since_ms or 0, until_ms=_FOREVER_MS if until_ms is None else until_ms)
    async with aclosing(cast("Any", database.stream(query))) as rows:
        async for row in rows:
            yield _csv(_harmless(row)) if form == "csv" else _json(row)


def _json(row: Row) -> bytes:
    return msgspec.json.encode({name: row[name] for name in COLUMNS}) + b"\n"


def _csv(values: Any) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue().encode()


def _harmless(row: Row) -> list[Any]:
    values = [row[name] for name in COLUMNS]
    return [f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value for value in values]

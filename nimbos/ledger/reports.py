"""What was used, from the sums: by key, model, project, day, class or process, and in the buckets of a time line.

Whole months are read from the sums by month, and what is left at the ends of a span from those by day and by hour.
Only buckets of a minute read the asks themselves. A span is half-open, `[since_ms, until_ms)`, and is widened to whole
hours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal, get_args

from sqlalchemy import BigInteger, ColumnElement, bindparam, cast, func, literal_column, select

from nimbos.db import Database, Row, Statement
from nimbos.db.tables.ledger import asks, meters, usage_days, usage_hours, usage_months
from nimbos.errors import InvalidRequest, StorageUnavailable
from nimbos.ledger import periods
from nimbos.ledger.periods import DAY_MS, HOUR_MS
from nimbos.ledger.rollups import ASKS, fold_all

By = Literal["key", "model", "project", "day", "class", "process"]
Width = Literal["1m", "1h", "1d"]
BY: tuple[By, ...] = get_args(By)
DIMENSIONS = ("project", "key", "model", "class", "process")
WIDTH_MS: dict[Width, int] = {"1m": 60_000, "1h": HOUR_MS, "1d": DAY_MS}
FILTER_VALUES_MAX = 100
MINUTES_MAX_MS = 2 * DAY_MS  # a span of buckets of a minute reads every ask in it
_FOREVER_MS = 2**62


@dataclass(slots=True, kw_only=True)
class Used:
    """As the wire has it: `cached_tokens` is a part of `input_tokens`, `thinking_tokens` of `output_tokens`."""

    asks: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    thinking_tokens: int = 0
    cost_micros: int = 0
    recomputed_tokens: int = 0

    def add(self, meter: str, quantity: int, cost_micros: int) -> None:
        if meter == ASKS:
            self.asks += quantity
            self.cost_micros += cost_micros
        elif meter == "recomputed":
            self.recomputed_tokens += quantity
        elif meter in ("input", "cached", "cache_write", "cache_read"):
            self.input_tokens += quantity
            self.cached_tokens += quantity if meter in ("cached", "cache_read") else 0
        elif meter in ("output", "thinking"):
            self.output_tokens += quantity
            self.thinking_tokens += quantity if meter == "thinking" else 0

    def body(self) -> dict[str, int]:
        """The fields of `nimbos usage --json`."""
        return {
            "asks": self.asks,
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "thinking_tokens": self.thinking_tokens,
            "cost_micros": self.cost_micros,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """`group`: the values of what was asked for, in that order; a day is `2026-01-31`. `start_ms`: of its bucket."""

    group: tuple[str, ...]
    used: Used
    start_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    by: str
    total: Used
    rows: list[UsageRow]

    def body(self) -> dict[str, Any]:
        """The shape of `nimbos usage --json`."""
        rows = [{self.by: row.group[0], **row.used.body()} for row in self.rows]
        return {"total": self.total.body(), "rows": rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """None: from the first ask, to the last. `filters`: a dimension's name to the values wanted of it."""

    since_ms: int | None = None
    until_ms: int | None = None
    filters: dict[str, Sequence[str]] = field(default_factory=dict)

    def hours(self) -> tuple[int, int]:
        since = 0 if self.since_ms is None else self.since_ms
        until = _FOREVER_MS if self.until_ms is None else self.until_ms
        return since - since % HOUR_MS, -(-until // HOUR_MS) * HOUR_MS


async def usage(database: Database, *, by: str = "key", span: Span | None = None) -> Report:
    """One row for each value of `by`, the most costly first, then by tokens; days in their order.

    Raises: InvalidRequest.
    """
    if by not in BY:
        raise InvalidRequest(f"Usage is told by {', '.join(BY)}; not by {by[:60]!r}.", param="by")
    span = span or Span()
    total, groups = Used(), dict[tuple[str, ...], Used]()
    dimensions = () if by == "day" else (by,)
    levels: tuple[str, ...] = ("hours", "days") if by == "day" else ("hours", "days", "months")
    if not await _folded(database):
        levels = ("hours",)
    for table, since_ms, until_ms in _parts(*span.hours(), levels):
        width_ms = DAY_MS if by == "day" else 0
        for row in await _sums(database, table, since_ms, until_ms, dimensions, width_ms, span.filters):
            name = _day(row["start_ms"]) if by == "day" else row[by]
            for used in (total, groups.setdefault((name,), Used())):
                used.add(row["meter"], int(row["quantity"]), int(row["cost_micros"]))
    rows = [UsageRow(group=group, used=used) for group, used in groups.items()]
    return Report(by=by, total=total, rows=sorted(rows, key=_by_day if by == "day" else _by_cost))


async def usage_buckets(
    database: Database, *, width: Width, span: Span, group_by: Sequence[str] = ()
) -> list[UsageRow]:
    """A row for each group in each bucket that has one, in order of time.

    Raises: InvalidRequest.
    """
    unknown = set(group_by) - set(DIMENSIONS)
    if unknown:
        raise InvalidRequest(f"There is no group {min(unknown)[:60]!r}; there are {', '.join(DIMENSIONS)}.")
    width_ms = WIDTH_MS[width]
    since_ms = (span.since_ms or 0) // width_ms * width_ms
    until_ms = time.time_ns() // 1_000_000 + 1 if span.until_ms is None else span.until_ms
    until_ms = -(-until_ms // width_ms) * width_ms
    if width == "1m" and until_ms - since_ms > MINUTES_MAX_MS:
        raise InvalidRequest("Buckets of a minute span at most two days; ask for less, or for hours.")
    table = {"1m": "asks", "1h": "hours", "1d": "days"}[width]
    if table == "days" and not await _folded(database):
        table = "hours"
    found: dict[tuple[int, tuple[str, ...]], Used] = {}
    for row in await _sums(database, table, since_ms, until_ms, tuple(group_by), width_ms, span.filters):
        group = (int(row["start_ms"]), tuple(row[name] for name in group_by))
        found.setdefault(group, Used()).add(row["meter"], int(row["quantity"]), int(row["cost_micros"]))
    return [UsageRow(group=group, used=used, start_ms=start) for (start, group), used in sorted(found.items(), key=_at)]


async def _folded(database: Database) -> bool:
    """Whether the sums by day and month can be read: those by hour always can, also where nothing can be written."""
    try:
        await fold_all(database)
    except StorageUnavailable:
        return False
    return True


def _parts(since_ms: int, until_ms: int, levels: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """The span as whole months, whole days at their ends, and hours at the ends of those."""
    level, *coarser = levels
    if not coarser:
        return [(level, since_ms, until_ms)]
    first, last = _next_start(coarser[0], since_ms), _start(coarser[0], until_ms)
    if first >= last:
        return [(level, since_ms, until_ms)]
    parts = [(level, since_ms, first), *_parts(first, last, tuple(coarser)), (level, last, until_ms)]
    return [part for part in parts if part[1] < part[2]]


def _start(level: str, at_ms: int) -> int:
    if at_ms >= _FOREVER_MS:
        return at_ms
    return periods.start_ms("month" if level == "months" else "day", at_ms)


def _next_start(level: str, at_ms: int) -> int:
    if at_ms >= _FOREVER_MS or _start(level, at_ms) == at_ms:
        return at_ms
    return periods.end_ms("month" if level == "months" else "day", at_ms) or at_ms


async def _sums(
    database: Database,
    table: str,
    since_ms: int,
    until_ms: int,
    dimensions: tuple[str, ...],
    width_ms: int,
    filters: dict[str, Sequence[str]],
) -> list[Row]:
    values: dict[str, int | str] = {"since_ms": since_ms, "until_ms": until_ms}
    shape = []
    for name in sorted(filters):
        if name not in DIMENSIONS:
            raise InvalidRequest(f"There is no filter {name[:60]!r}; there are {', '.join(DIMENSIONS)}.")
        wanted = list(dict.fromkeys(filters[name]))
        if len(wanted) > FILTER_VALUES_MAX:
            raise InvalidRequest(
                f"A filter takes at most {FILTER_VALUES_MAX} values; {name} has {len(wanted)}.", param=name
            )
        shape.append((name, len(wanted)))
        values |= {f"{name}_{number}": value for number, value in enumerate(wanted)}
    make = _sum_of_asks if table == "asks" else _sum_of_table
    return await database.read(make(table, dimensions, width_ms, tuple(shape))(**values))


_Shape = tuple[tuple[str, int], ...]


@cache
def _sum_of_table(name: str, dimensions: tuple[str, ...], width_ms: int, filters: _Shape) -> Statement:
    table = {"hours": usage_hours, "days": usage_days, "months": usage_months}[name]
    at = table.c[f"{name.removesuffix('s')}_ms"]
    own = {"hours": HOUR_MS, "days": DAY_MS, "months": 0}[name]
    groups: list[ColumnElement[Any]] = [table.c[dimension] for dimension in dimensions]
    columns = [*groups]
    if width_ms:
        start = at if width_ms == own else _floor(at, width_ms)
        groups.append(start)
        columns.append(start.label("start_ms"))
    where = [at >= bindparam("since_ms"), at < bindparam("until_ms"), *_wanted(table.c, filters)]
    quantity = cast(func.sum(table.c.quantity), BigInteger).label("quantity")
    cost = cast(func.sum(table.c.cost_micros), BigInteger).label("cost_micros")
    query = select(*columns, table.c.meter, quantity, cost).where(*where).group_by(*groups, table.c.meter)
    return Statement(query)


@cache
def _sum_of_asks(_: str, dimensions: tuple[str, ...], width_ms: int, filters: _Shape) -> Statement:
    """From the asks themselves; an ask's cost stands with its count, as in the sums."""
    groups: list[ColumnElement[Any]] = [asks.c[dimension] for dimension in dimensions]
    start = _floor(asks.c.ended_ms, width_ms)
    where = [
        asks.c.ended_ms >= bindparam("since_ms"),
        asks.c.ended_ms < bindparam("until_ms"),
        *_wanted(asks.c, filters),
    ]
    keys = [*groups, start]
    columns = [*groups, start.label("start_ms")]
    tokens = (
        select(
            *columns,
            meters.c.meter.label("meter"),
            cast(func.sum(meters.c.quantity), BigInteger).label("quantity"),
            literal_column("0").label("cost_micros"),
        )
        .select_from(asks.join(meters, meters.c.ask == asks.c.id))
        .where(*where)
        .group_by(*keys, meters.c.meter)
    )
    counts = (
        select(
            *columns,
            literal_column(f"'{ASKS}'").label("meter"),
            cast(func.count(), BigInteger).label("quantity"),
            cast(func.sum(asks.c.cost_micros), BigInteger).label("cost_micros"),
        )
        .where(*where)
        .group_by(*keys)
    )
    return Statement(tokens.union_all(counts))


def _floor(at: ColumnElement[int], width_ms: int) -> ColumnElement[int]:
    return at - at % literal_column(str(width_ms))


def _wanted(columns: Any, filters: _Shape) -> list[ColumnElement[bool]]:
    return [columns[name].in_([bindparam(f"{name}_{number}") for number in range(count)]) for name, count in filters]


def _day(start_ms: int) -> str:
    return datetime.fromtimestamp(int(start_ms) / 1000, UTC).strftime("%Y-%m-%d")


def _by_day(row: UsageRow) -> Any:
    return row.group


def _by_cost(row: UsageRow) -> Any:
    used = row.used
    return -used.cost_micros, -(used.input_tokens + used.output_tokens), row.group


def _at(found: tuple[tuple[int, tuple[str, ...]], Used]) -> Any:
    return found[0]

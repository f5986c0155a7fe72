"""What was used, from the sums: by key, model, project, day, class or process, and in the buckets of a time line.

Whole months are read from the sums by month, and what is left at the ends of a span from those by day and by hour.
Only buckets of a minute, and what was used by processes that are named, come from the asks themselves. A span is
half-open, `[since_ms, until_ms)`, and is widened to whole hours. Read `sums.py` for the statements.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from nimbos.db import Database, Row
from nimbos.errors import InvalidRequest, StorageUnavailable
from nimbos.ledger import periods
from nimbos.ledger.periods import DAY_MS, HOUR_MS
from nimbos.ledger.rollups import fold_all
from nimbos.ledger.sums import Part, Source, sums

By = Literal["key", "model", "project", "day", "class", "process"]
Width = Literal["1m", "1h", "1d"]
BY: tuple[By, ...] = get_args(By)
DIMENSIONS = ("project", "key", "model", "class", "process")
WIDTH_MS: dict[Width, int] = {"1m": 60_000, "1h": HOUR_MS, "1d": DAY_MS}
FILTER_VALUES_MAX = 100
MINUTES_MAX_MS = 2 * DAY_MS  # a span of buckets of a minute reads every ask in it
ROWS = 1000  # of a report, where nothing else is said
ROWS_MOST = 10_000
PAGE_MOST = 2**31 - 1
_FOREVER_MS = 2**62
_LEVELS: tuple[Source, ...] = ("hours", "days", "months")


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

    @classmethod
    def of(cls, row: Row) -> Used:
        return cls(**{name: int(row[name]) for name in cls.__slots__})

    def add(self, more: Used) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(more, name))

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
    """`total`: of all rows, also those of other pages. `next_page`: where the next begins; None where none does."""

    by: str
    total: Used
    rows: list[UsageRow]
    next_page: int | None = None

    def body(self) -> dict[str, Any]:
        """The shape of `nimbos usage --json`."""
        rows = [{self.by: row.group[0], **row.used.body()} for row in self.rows]
        following = None if self.next_page is None else str(self.next_page)
        more = following is not None
        return {"total": self.total.body(), "rows": rows, "has_more": more, "next_page": following}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """None: from the first ask, to the last. `filters`: a dimension's name to the values wanted of it."""

    since_ms: int | None = None
    until_ms: int | None = None
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def hours(self) -> tuple[int, int]:
        since = 0 if self.since_ms is None else self.since_ms
        until = _FOREVER_MS if self.until_ms is None else self.until_ms
        return since - since % HOUR_MS, -(-until // HOUR_MS) * HOUR_MS


async def usage(
    database: Database, *, by: str = "key", span: Span | None = None, limit: int = ROWS, page: int = 0
) -> Report:
    """One row for each value of `by`, the most costly first, then by tokens; days in their order. `page`: so many rows
    are left out before.

    Raises: InvalidRequest.
    """
    if by not in BY:
        raise InvalidRequest(f"Usage is told by {', '.join(BY)}; not by {by[:60]!r}.", param="by")
    span = span or Span()
    filters = _checked(span.filters)
    levels: tuple[Source, ...] = ("hours", "days") if by == "day" else _LEVELS
    if "" not in filters.get("process", [""]):
        levels = ("asks",)
    elif not await _folded(database):
        levels = ("hours",)
    parts = _parts(*span.hours(), levels)
    groups, width_ms = ((), DAY_MS) if by == "day" else ((by,), 0)
    order: Literal["cost", "time"] = "time" if by == "day" else "cost"
    query = sums(parts, groups=groups, filters=filters, width_ms=width_ms, order=order, limit=limit + 1, offset=page)
    found = await database.read(query)
    rows = [
        UsageRow(group=(_day(row["start_ms"]) if by == "day" else row[by],), used=Used.of(row)) for row in found[:limit]
    ]
    total = Used()
    if page or len(found) > limit:
        (row,) = await database.read(sums(parts, groups=(), filters=filters, limit=1))
        total = Used.of(row)
    else:
        for one in rows:
            total.add(one.used)
    return Report(by=by, total=total, rows=rows, next_page=page + limit if len(found) > limit else None)


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
    source: Source = "asks" if width == "1m" else "hours" if width == "1h" else "days"
    if source == "days" and not await _folded(database):
        source = "hours"
    query = sums(
        [Part(source=source, since_ms=since_ms, until_ms=until_ms)],
        groups=tuple(group_by),
        filters=_checked(span.filters),
        width_ms=width_ms,
        order="time",
        limit=PAGE_MOST,
    )
    return [
        UsageRow(group=tuple(row[name] for name in group_by), used=Used.of(row), start_ms=int(row["start_ms"]))
        for row in await database.read(query)
    ]


async def _folded(database: Database) -> bool:
    """Whether the sums by day and month can be read: those by hour always can, also where nothing can be written."""
    try:
        await fold_all(database)
    except StorageUnavailable:
        return False
    return True


def _parts(since_ms: int, until_ms: int, levels: tuple[Source, ...]) -> list[Part]:
    """The span as whole months, whole days at their ends, and hours at the ends of those."""
    level, *coarser = levels
    first = _next_start(coarser[0], since_ms) if coarser else until_ms
    last = _start(coarser[0], until_ms) if coarser else until_ms
    if first >= last:
        return [Part(source=level, since_ms=since_ms, until_ms=until_ms)]
    inner = _parts(first, last, tuple(coarser))
    parts = [
        Part(source=level, since_ms=since_ms, until_ms=first),
        *inner,
        Part(source=level, since_ms=last, until_ms=until_ms),
    ]
    return [part for part in parts if part.since_ms < part.until_ms]


def _start(level: str, at_ms: int) -> int:
    if at_ms >= _FOREVER_MS:
        return at_ms
    return periods.start_ms("month" if level == "months" else "day", at_ms)


def _next_start(level: str, at_ms: int) -> int:
    if at_ms >= _FOREVER_MS or _start(level, at_ms) == at_ms:
        return at_ms
    return periods.end_ms("month" if level == "months" else "day", at_ms) or at_ms


def _checked(filters: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Each value once. Raises: InvalidRequest."""
    checked = {}
    for name in sorted(filters):
        if name not in DIMENSIONS:
            raise InvalidRequest(f"There is no filter {name[:60]!r}; there are {', '.join(DIMENSIONS)}.")
        wanted = checked[name] = list(dict.fromkeys(filters[name]))
        if len(wanted) > FILTER_VALUES_MAX:
            raise InvalidRequest(
                f"A filter takes at most {FILTER_VALUES_MAX} values; {name} has {len(wanted)}.", param=name
            )
    return checked


def _day(start_ms: int) -> str:
    return datetime.fromtimestamp(int(start_ms) / 1000, UTC).strftime("%Y-%m-%d")

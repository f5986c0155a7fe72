"""The statement behind a report: sums of what was used, from the roll-ups, or from the asks where those are too coarse.

    parts of a span ─▶ rows of (group, meter, quantity, cost) ─▶ one row for each group, a page of them

Nothing but that page leaves the database. The roll-ups are kept in the order of time, project, key: where a project is
named, each moment of them is looked up with it, and what others used is not read. Of one process the asks
themselves are read: of those there is an index, and a roll-up would be read whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    FromClause,
    Integer,
    Select,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    or_,
    select,
    union_all,
)

from nimbos.db import Bound, Statement, Value
from nimbos.db.tables.ledger import asks, meters, usage_days, usage_hours, usage_months
from nimbos.ledger.rollups import ASKS

Source = Literal["hours", "days", "months", "asks"]
Order = Literal["cost", "time"]
_STATEMENTS = 256  # a client decides on the filters and so on the statement; so many are kept
_TABLES = {"hours": usage_hours, "days": usage_days, "months": usage_months}
_METERS = {
    "input_tokens": ("input", "cached", "cache_write", "cache_read"),
    "cached_tokens": ("cached", "cache_read"),
    "output_tokens": ("output", "thinking"),
    "thinking_tokens": ("thinking",),
    "recomputed_tokens": ("recomputed",),
    "asks": (ASKS,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`[since_ms, until_ms)` of a source; an ask belongs to the moment of its end."""

    source: Source
    since_ms: int
    until_ms: int


@dataclass(frozen=True, slots=True)
class _Shape:
    """What makes two statements differ. `filters`: the number of values for each dimension."""

    sources: tuple[Source, ...]
    groups: tuple[str, ...]
    width_ms: int
    filters: tuple[tuple[str, int], ...]
    order: Order


def sums(
    parts: Sequence[Part],
    *,
    groups: tuple[str, ...],
    filters: Mapping[str, Sequence[str]],
    width_ms: int = 0,
    order: Order = "cost",
    limit: int,
    offset: int = 0,
) -> Bound:
    """Rows of the columns `groups`, `start_ms` where there is a width, and the numbers of `Used`. By cost, the most
    costly is first, then the one with most tokens; by time, the earliest. Without groups it is one row."""
    values: dict[str, Value] = {"limit": limit, "offset": offset}
    for number, part in enumerate(parts):
        values |= {f"since_{number}": part.since_ms, f"until_{number}": part.until_ms}
    counts = []
    for name in sorted(filters):
        counts.append((name, len(filters[name])))
        values |= {f"{name}_{number}": value for number, value in enumerate(filters[name])}
    sources = tuple(part.source for part in parts)
    return _statement(_Shape(sources, groups, width_ms, tuple(counts), order))(**values)


@lru_cache(maxsize=_STATEMENTS)
def _statement(shape: _Shape) -> Statement:
    rows = union_all(*(query for number in range(len(shape.sources)) for query in _rows(shape, number))).subquery()
    names = (*shape.groups, *(("start_ms",) if shape.width_ms else ()))
    groups = [rows.c[name] for name in names]
    numbers = [_number(name, _quantity(rows, meters)) for name, meters in _METERS.items()]
    numbers.append(_number("cost_micros", rows.c.cost_micros))
    found = select(*groups, *numbers).group_by(*groups).subquery()
    order: list[ColumnElement[Any]] = [found.c[name] for name in shape.groups]
    if shape.order == "cost":
        order = [found.c.cost_micros.desc(), (found.c.input_tokens + found.c.output_tokens).desc(), *order]
    elif shape.width_ms:
        order = [found.c.start_ms, *order]
    page = select(*found.c).order_by(*order)
    return Statement(page.limit(bindparam("limit", type_=Integer)).offset(bindparam("offset", type_=Integer)))


def _number(name: str, amount: ColumnElement[int]) -> ColumnElement[int]:
    return cast(func.coalesce(func.sum(amount), literal_column("0")), BigInteger).label(name)


def _quantity(rows: FromClause, meters: Sequence[str]) -> ColumnElement[int]:
    wanted = or_(*(rows.c.meter == literal_column(f"'{meter}'") for meter in meters))
    return case((wanted, rows.c.quantity), else_=literal_column("0"))


def _rows(shape: _Shape, number: int) -> list[Select[Any]]:
    since = bindparam(f"since_{number}", type_=BigInteger)
    until = bindparam(f"until_{number}", type_=BigInteger)
    if shape.sources[number] == "asks":
        return _of_asks(shape, since, until)
    return [_of_table(shape, shape.sources[number], since, until)]


def _of_table(shape: _Shape, source: Source, since: ColumnElement[int], until: ColumnElement[int]) -> Select[Any]:
    table = _TABLES[source]
    at = table.c[f"{source.removesuffix('s')}_ms"]
    query = select(*_groups(shape, table, at), table.c.meter, table.c.quantity, table.c.cost_micros)
    wanted = _wanted(shape, table)
    if "project" in dict(shape.filters):
        moments = _moments(at, since, until)
        return query.select_from(moments.join(table, at == moments.c.at)).where(*wanted)
    return query.where(at >= since, at < until, *wanted)


def _moments(at: ColumnElement[int], since: ColumnElement[int], until: ColumnElement[int]) -> CTE:
    """Those of a roll-up that have rows, each found behind the one before."""
    first = select(at).where(at >= since, at < until).order_by(at).limit(1).scalar_subquery()
    moments = select(first.label("at")).cte(recursive=True)
    following = select(at).where(at > moments.c.at, at < until).order_by(at).limit(1).scalar_subquery()
    return moments.union_all(select(following).where(moments.c.at.is_not(None)))


def _of_asks(shape: _Shape, since: ColumnElement[int], until: ColumnElement[int]) -> list[Select[Any]]:
    """An ask's cost stands with its count, as in the roll-ups."""
    groups = _groups(shape, asks, asks.c.ended_ms)
    where = and_(asks.c.ended_ms >= since, asks.c.ended_ms < until, *_wanted(shape, asks))
    if "process" in dict(shape.filters):
        where = and_(where, asks.c.process != literal_column("''"))  # as the partial index has it
    nothing: ColumnElement[int] = literal_column("0").label("cost_micros")
    one: ColumnElement[int] = literal_column("1").label("quantity")
    tokens = select(*groups, meters.c.meter, meters.c.quantity, nothing)
    counts = select(*groups, literal_column(f"'{ASKS}'").label("meter"), one, asks.c.cost_micros)
    return [tokens.select_from(asks.join(meters, meters.c.ask == asks.c.id)).where(where), counts.where(where)]


def _groups(shape: _Shape, table: FromClause, at: ColumnElement[int]) -> list[ColumnElement[Any]]:
    groups: list[ColumnElement[Any]] = [table.c[name] for name in shape.groups]
    if shape.width_ms:
        groups.append((at - at % literal_column(str(shape.width_ms))).label("start_ms"))
    return groups


def _wanted(shape: _Shape, table: FromClause) -> list[ColumnElement[bool]]:
    return [table.c[name].in_([bindparam(f"{name}_{n}") for n in range(count)]) for name, count in shape.filters]

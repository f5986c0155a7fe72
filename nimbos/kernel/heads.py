"""Questions about many heads: pages of an account's processes, families, who has mail."""

from __future__ import annotations

from functools import cache

from sqlalchemy import ColumnClause, ColumnElement, Integer, Text, and_, bindparam, literal_column, or_, select

from nimbos.db import Bound, Statement, Transaction
from nimbos.db.tables.processes import processes
from nimbos.kernel.processes import Head, head_of
from nimbos.kernel.words import State

_BEHIND_ALL = "proc_g"  # no id sorts behind it
_BEHIND_DIGITS = "g"
FAMILY_PAGE = 1_000
_OPEN = frozenset(State) - {State.DONE}

_ID = bindparam("id", type_=Text)
_ONE = Statement(select(processes).where(processes.c.id == _ID))
_RUNNING_WITH_MAIL = Statement(
    select(processes.c.id).where(literal_column("state = 'running'"), processes.c.mail > processes.c.taken)
)


def one(pid: str) -> Bound:
    return _ONE(id=pid)


def running_with_mail() -> Bound:
    """Whichever server runs them."""
    return _RUNNING_WITH_MAIL()


def page(account: str, *, after: str, limit: int, states: tuple[State, ...], prefix: str = "") -> Bound:
    """Newest first. `after`: the last of the page before; "" begins. `states`: empty for all. `prefix`: what their ids
    begin with."""
    last = after or _BEHIND_ALL
    last = min(last, f"{prefix}{_BEHIND_DIGITS}") if prefix else last
    return _page(tuple(sorted(set(states))))(account=account, before=last, since=prefix, most=limit)


def family(pid: str, *, after: Head | None = None, most: int | None = None) -> Bound:
    """The process and all below it, parents before children: a page of them. `after`: the last of the page before."""
    depth, last = (after.depth, after.pid) if after is not None else (-1, "")
    return _FAMILY(id=pid, depth=depth, last=last, most=FAMILY_PAGE if most is None else most)


def whole_family(pid: str) -> Transaction[list[Head]]:
    """All of it, however large."""
    found: list[Head] = []
    while True:
        rows = yield family(pid, after=found[-1] if found else None)
        found += map(head_of, rows)
        if len(rows) < FAMILY_PAGE:
            return found


@cache
def _page(states: tuple[State, ...]) -> Statement:
    return Statement(
        select(processes)
        .where(
            processes.c.account == bindparam("account", type_=Text),
            processes.c.id < bindparam("before", type_=Text),
            processes.c.id >= bindparam("since", type_=Text),
            *_among(states),
        )
        .order_by(processes.c.id.desc())
        .limit(bindparam("most", type_=Integer))
    )


def _among(states: tuple[State, ...]) -> list[ColumnElement[bool]]:
    if set(states) == _OPEN:
        return [literal_column("state != 'done'")]  # as the index has it
    wanted: list[ColumnClause[str]] = [literal_column(f"'{state.value}'") for state in states]
    return [processes.c.state.in_(wanted)] if wanted else []


def _descend() -> Statement:
    way = select(processes.c.id).where(processes.c.id == _ID).cte("way", recursive=True)
    below = processes.alias()
    way = way.union(select(below.c.id).join(way, below.c.parent == way.c.id))
    depth = bindparam("depth", type_=Integer)
    behind = or_(
        processes.c.depth > depth,
        and_(processes.c.depth == depth, processes.c.id > bindparam("last", type_=Text)),
    )
    return Statement(
        select(processes)
        .where(processes.c.id.in_(select(way.c.id)), behind)
        .order_by(processes.c.depth, processes.c.id)
        .limit(bindparam("most", type_=Integer))
    )


_FAMILY = _descend()

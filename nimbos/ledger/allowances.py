"""Budgets of processes: four meters each, in one tree with the processes they came from.

Every process has a row for each meter, with or without a limit, whose parent is its parent's row (of a fork: that of
the process it was forked from), so what it uses is charged to all above it as well. What is given from outside raises
every limit on the way to the first process, what a parent gives those below it alone, and never more than it has left.

A call holds one of `calls` and its deadline of `seconds_ms` until it is settled. Who composes these with rows of a
process locks the budgets first: asks do (`ledger.reserve`, then their journal), and one order makes no circles.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, bindparam, func, literal_column, select, update

from nimbos.db import ManyRows, Statement, Transaction, Value
from nimbos.db.tables.ledger import budgets
from nimbos.errors import BudgetExhausted, InvalidRequest, NotFound
from nimbos.ledger.budgets import (
    CALL_METERS,
    CALLS,
    COST,
    SECONDS,
    TOKENS,
    Budget,
    Held,
    Hold,
    budget_of,
    charge,
    store,
)
from nimbos.ledger.owners import DEPTHS
from nimbos.ledger.tree import DEPTH_MAX, LIMIT_MAX
from nimbos.types import new_id

METERS = (TOKENS, COST, SECONDS, CALLS)
PERIOD = "total"
_MS = 1000
_NAMES = {TOKENS: "tokens", COST: "cost_micros", SECONDS: "seconds", CALLS: "calls"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a process and all below it may use, or get more of. None: no limit, or nothing more. `seconds`: of work,
    which is computing its answers and running its tools."""

    tokens: int | None = None
    cost_micros: int | None = None
    seconds: int | None = None
    calls: int | None = None

    def amounts(self) -> dict[str, int]:
        """By meter, in its unit, those that are given. Raises: InvalidRequest."""
        found: dict[str, int] = {}
        for meter, name in _NAMES.items():
            amount: int | None = getattr(self, name)
            if amount is None:
                continue
            if not 0 <= amount <= LIMIT_MAX // _MS:
                raise InvalidRequest(f"{name} is from 0 to {LIMIT_MAX // _MS}, not {amount}.", param=f"budget.{name}")
            found[meter] = amount * _MS if meter == SECONDS else amount
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class CallHold:
    """What a call may use. `deadline_ms`: the one that was wanted, or as much as is left of the seconds. `limited`:
    some budget holds it."""

    deadline_ms: int
    limited: bool

    @property
    def amounts(self) -> dict[str, int]:
        """By meter."""
        return {CALLS: 1, SECONDS: self.deadline_ms}


def make(
    process: str, allowance: Allowance, *, name: str = "", parent: str | None = None, given: bool = True
) -> Transaction[None]:
    """The rows of a new process. `parent`: the process it draws on, which is asked for all of it; `given` False: it is
    how much the new process wants at most.

    Raises: InvalidRequest, also when it would be given more than its parent has left.
    """
    amounts = allowance.amounts()
    above = {budget.meter: budget for budget in (yield from _own(parent))} if parent is not None else {}
    if parent is not None and amounts and given:
        _check_room((yield from _chain(parent)), amounts)
    depth = 1 + max((budget.depth for budget in above.values()), default=DEPTHS["process"] - 1)
    if depth > DEPTH_MAX:
        raise InvalidRequest(f"Processes may draw on each other {DEPTH_MAX} deep.", param="budget")
    rows: list[dict[str, Value]] = [
        {
            "id": new_id("budget"),
            "parent": above[meter].id if meter in above else None,
            "depth": depth,
            "owner_kind": "process",
            "owner_id": process,
            "owner_name": name,
            "meter": meter,
            "period": PERIOD,
            "limit": amounts.get(meter),
            "period_start_ms": 0,
            "reserved": 0,
            "used": 0,
            "alert_at": None,
        }
        for meter in METERS
    ]
    yield _INSERT(rows)


def top_up(process: str, allowance: Allowance) -> Transaction[list[str]]:
    """More, from outside: for the process, and for those above it, so that what they have left stays the same. What
    has no limit stays without.

    Returns: the process and all that draw on it, which may go on now. Raises: InvalidRequest, NotFound.
    """
    amounts = allowance.amounts()
    chain = yield from _known_chain(process)
    yield from _raise(chain, amounts)
    return [node.process for node in (yield from tree_of(process))]


def give(parent: str, child: str, allowance: Allowance) -> Transaction[list[str]]:
    """More for a child (or a child's child) out of what its parent has left.

    Returns: the child and all that draw on it. Raises: InvalidRequest, NotFound.
    """
    amounts = allowance.amounts()
    chain = yield from _known_chain(child)
    own = {budget.id for budget in (yield from _own(parent))}
    below = _below(chain, own)
    if not below:
        raise InvalidRequest(f"{child[:80]} does not draw on {parent[:80]}: only what is one's own can be given.")
    _check_room([budget for budget in chain if budget not in below], amounts)
    yield from _raise(below, amounts)
    return [node.process for node in (yield from tree_of(child))]


def reserve_call(process: str, *, deadline_ms: int) -> Transaction[CallHold]:
    """One call, and the time it may take, which is less where less is left. Settle it with the hold's `deadline_ms`.

    Raises: BudgetExhausted; Held, where calls that run now may give something back.
    """
    chain = yield from _chain(process, CALL_METERS)
    granted_ms = _grant_call(chain, deadline_ms)
    for budget in chain:
        yield from store(charge(budget, reserved=Hold(ms=granted_ms, calls=1), used=Hold()))
    return CallHold(deadline_ms=granted_ms, limited=any(budget.limit is not None for budget in chain))


def settle_call(process: str, *, reserved_ms: int, used_ms: int, calls: int = 1) -> Transaction[dict[str, int]]:
    """Once for each reservation. `calls` 0: the same call is tried again. Where nobody knows how long it took, it is
    what was reserved. A call that overran its deadline while it was ended is charged what it took.

    Returns: what was used, by meter.
    """
    used = Hold(ms=used_ms, calls=calls)
    for budget in (yield from _chain(process, CALL_METERS)):
        yield from store(charge(budget, reserved=Hold(ms=-reserved_ms, calls=-1), used=used))
    return {SECONDS: used_ms, CALLS: calls}


def close(process: str) -> Transaction[None]:
    """Its process is over: calls that nobody will settle are settled as they were reserved."""
    chain = yield from _chain(process, CALL_METERS)
    own = [budget for budget in chain if budget.owner_id == process]
    left: dict[str, int] = {}
    for budget in own:
        rows = yield _RESERVED_BELOW(of=budget.id)
        left[budget.meter] = max(0, budget.reserved - int(rows[0]["reserved"] or 0))
    hold = Hold(ms=left.get(SECONDS, 0), calls=left.get(CALLS, 0))
    if hold != Hold():
        for budget in chain:
            yield from store(charge(budget, reserved=Hold() - hold, used=hold))


def spent(process: str) -> Transaction[BudgetExhausted | None]:
    """What lets the process do nothing more: of the budgets of processes above it the first, and its own last."""
    for budget in (yield from _chain(process)):
        if budget.limit is not None and budget.used >= budget.limit:
            return budget.exhausted(_now_ms(), too_small=budget.limit == 0)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A process in the tree of those that draw on one. `parent` None: the one that was asked for."""

    process: str
    parent: str | None
    depth: int


def tree_of(process: str) -> Transaction[list[Node]]:
    """The process first, then those that draw on it, parents before children. Empty when it has no budget."""
    rows = yield _TREE(of=process)
    names = {row["id"]: row["owner_id"] for row in rows}
    return [
        Node(
            process=row["owner_id"],
            parent=names.get(row["parent"]) if row["owner_id"] != process else None,
            depth=row["depth"] - rows[0]["depth"],
        )
        for row in rows
    ]


def _grant_call(chain: Sequence[Budget], deadline_ms: int) -> int:
    """How long the call may take. Pure. Raises: BudgetExhausted, Held."""
    granted_ms, held = deadline_ms, None
    for budget in chain:
        if budget.limit is None:
            continue
        if budget.used >= budget.limit:
            raise budget.exhausted(_now_ms(), too_small=budget.limit == 0)
        room = budget.limit - budget.used - budget.reserved
        if room <= 0:
            held = held or budget
        elif budget.meter == SECONDS:
            granted_ms = min(granted_ms, room)
    if held is not None:
        raise Held(held)
    return granted_ms


def _check_room(chain: Sequence[Budget], amounts: dict[str, int]) -> None:
    """Raises: InvalidRequest, naming what is left."""
    for budget in chain:
        wanted = amounts.get(budget.meter)
        if wanted is None or budget.limit is None:
            continue
        left = max(0, budget.limit - budget.used - budget.reserved)
        if wanted > left:
            raise InvalidRequest(
                f"The {budget.owner} has {left} {budget.meter} left, and cannot give {wanted}.",
                param=f"budget.{_NAMES[budget.meter]}",
            )


def _below(chain: Sequence[Budget], own: set[str]) -> list[Budget]:
    """Those of the chain that are under the rows `own`."""
    below: set[str] = set()
    for budget in chain:  # from the root
        if budget.parent is not None and (budget.parent in own or budget.parent in below):
            below.add(budget.id)
    return [budget for budget in chain if budget.id in below]


def _raise(chain: Sequence[Budget], amounts: dict[str, int]) -> Transaction[None]:
    for budget in chain:
        more = amounts.get(budget.meter, 0)
        if more and budget.limit is not None:
            yield _SET_LIMIT(of=budget.id, to=min(LIMIT_MAX, budget.limit + more))


def _known_chain(process: str) -> Transaction[list[Budget]]:
    chain = yield from _chain(process)
    if not chain:
        raise NotFound(f"There is no budget of the process {process[:80]!r}.", param="process")
    return chain


def _chain(process: str, meters: Sequence[str] = METERS) -> Transaction[list[Budget]]:
    """Locked, from the root: the process's own rows and those above them."""
    rows = yield (_CALL_CHAIN if tuple(meters) == CALL_METERS else _CHAIN)(of=process)
    return [budget_of(row) for row in rows]


def _own(process: str) -> Transaction[list[Budget]]:
    rows = yield _OWN(of=process)
    return [budget_of(row) for row in rows]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _among(meters: Sequence[str]) -> ColumnElement[bool]:
    return budgets.c.meter.in_([literal_column(f"'{meter}'") for meter in meters])


_OF = (
    budgets.c.owner_kind == literal_column("'process'"),
    budgets.c.owner_id == bindparam("of"),
    budgets.c.period == literal_column(f"'{PERIOD}'"),
)


def _chain_of(meters: Sequence[str]) -> Statement:
    way = select(budgets.c.id, budgets.c.parent).where(*_OF, _among(meters)).cte("way", recursive=True)
    way = way.union(select(budgets.c.id, budgets.c.parent).join(way, budgets.c.id == way.c.parent))
    chain = select(budgets).where(budgets.c.id.in_(select(way.c.id)))
    return Statement(chain.order_by(budgets.c.depth, budgets.c.id).with_for_update())


def _tree() -> Statement:
    start = select(budgets.c.id).where(*_OF, _among((TOKENS,)))
    down = start.cte("down", recursive=True)
    down = down.union(select(budgets.c.id).join(down, budgets.c.parent == down.c.id))
    found = select(budgets).where(budgets.c.id.in_(select(down.c.id)))
    return Statement(found.order_by(budgets.c.depth, budgets.c.owner_id))


_INSERT = ManyRows(budgets)
_CHAIN = _chain_of(METERS)
_CALL_CHAIN = _chain_of(CALL_METERS)
_TREE = _tree()
_OWN = Statement(select(budgets).where(*_OF))
_SET_LIMIT = Statement(update(budgets).where(budgets.c.id == bindparam("of")).values(limit=bindparam("to")))
_RESERVED_BELOW = Statement(
    select(func.sum(budgets.c.reserved).label("reserved")).where(budgets.c.parent == bindparam("of"))
)

"""The one tree of budgets: organisation → project → key → process → child, in four meters.

    tokens, cost_micros   of asks
    seconds_ms            of work: computing answers, and running tools; waiting is none
    calls                 of tools

The last two are of processes alone; `allowances.py` reserves them for calls. What an ask may use is charged to every
budget on its way to the root: first `reserved`, then, as it is computed, `used`; `reserved + used` never grows beyond
`limit`. Rows are locked from the root, so asks at the same time never spend a unit twice and never wait for each other
in a circle.

A budget whose rest is held by running asks is not exhausted: they may give some of it back. Then `Held` is raised, and
`desk.py` waits for a while before it refuses. A period ends under the same lock: `used` begins at 0 again, and
`reserved` stays with the asks that hold it (what they use counts in the period in which it is charged).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
from sqlalchemy import Executable, and_, bindparam, literal_column, or_, select, update

from nimbos.db import Dialect, Row, Statement, Transaction
from nimbos.db.tables.ledger import budgets
from nimbos.errors import BudgetExhausted, Overloaded
from nimbos.ledger import periods
from nimbos.ledger.owners import OWNER_KINDS, Owners, named
from nimbos.ledger.prices import Rates

NO_RATES = Rates()
TOKENS = "tokens"
COST = "cost_micros"
SECONDS = "seconds_ms"
CALLS = "calls"
ASK_METERS = (TOKENS, COST, SECONDS)
CALL_METERS = (SECONDS, CALLS)
HELD_RETRY_S = 1.0


class Held(Overloaded):
    """What is left of a budget is reserved by asks that run now."""

    def __init__(self, budget: Budget) -> None:
        assert budget.limit is not None
        super().__init__(
            limit=f"{budget.meter} left in the budget",
            value=budget.limit,
            used=budget.used + budget.reserved,
            retry_after_s=HELD_RETRY_S,
            owner=budget.owner,
        )


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """`limit` None: it counts, warns, and holds nothing. `depth` is the order in which budgets are locked."""

    id: str
    parent: str | None
    depth: int
    owner_kind: str
    owner_id: str
    owner_name: str
    meter: str
    period: str
    limit: int | None
    period_start_ms: int
    reserved: int = 0
    used: int = 0
    alert_at: int | None = None  # below it no alert fires

    @property
    def owner(self) -> str:
        return named(self.owner_kind, self.owner_name, self.owner_id)

    def at(self, now_ms: int) -> Budget:
        """As it stands now: with a new period begun, if the old one is over."""
        start_ms = periods.start_ms(self.period, now_ms)
        if start_ms <= self.period_start_ms:
            return self
        return msgspec.structs.replace(self, period_start_ms=start_ms, used=0)

    def exhausted(self, now_ms: int, *, too_small: bool = False) -> BudgetExhausted:
        assert self.limit is not None
        end_ms = None if too_small else periods.end_ms(self.period, now_ms)
        return BudgetExhausted(
            owner=self.owner,
            meter=self.meter,
            period=self.period,
            limit=self.limit,
            used=self.used,
            retry_after_s=None if end_ms is None else max(0.0, (end_ms - now_ms) / 1000),
            too_small=too_small,
        )


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """An amount in every meter."""

    tokens: int = 0
    micros: int = 0
    ms: int = 0
    calls: int = 0

    def of(self, meter: str) -> int:
        return {TOKENS: self.tokens, COST: self.micros, SECONDS: self.ms, CALLS: self.calls}[meter]

    def __sub__(self, other: Hold) -> Hold:
        return Hold(
            tokens=self.tokens - other.tokens,
            micros=self.micros - other.micros,
            ms=self.ms - other.ms,
            calls=self.calls - other.calls,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What an ask wants to hold: `prompt_tokens` and `output_tokens` in any case, and up to `slice_tokens` more in each
    of `branches`. How long that takes nobody knows, so no time is held: it is charged as it passes, slice by slice."""

    rates: Rates = NO_RATES
    prompt_tokens: int
    output_tokens: int = 0
    branches: int = 0
    slice_tokens: int = 0

    def at(self, rates: Rates) -> Need:
        return replace(self, rates=rates)

    def hold(self, slice_tokens: int) -> Hold:
        output = self.output_tokens + self.branches * slice_tokens
        return Hold(
            tokens=self.prompt_tokens + output,
            micros=self.rates.bound_micros(prompt_tokens=self.prompt_tokens, output_tokens=output),
        )

    def fits(self, room: int, meter: str) -> int | None:
        """The largest slice that `room` pays for; None when not even what is needed in any case."""
        if meter == SECONDS:
            return self.slice_tokens if room > 0 else None
        wanted = self.output_tokens + self.branches * self.slice_tokens
        if meter == TOKENS:
            outputs = min(wanted, room - self.prompt_tokens)
        else:
            outputs = self.rates.outputs_for(room, prompt_tokens=self.prompt_tokens, most=wanted)
        rest = outputs - self.output_tokens
        if rest < 0:
            return None
        return rest // self.branches if self.branches else 0


def grant(chain: Sequence[Budget], need: Need, *, now_ms: int) -> int:
    """The slice that every budget of the chain pays for; at least one token in each branch. Pure.

    Raises: BudgetExhausted, of the one that is renewed last; Held when it would fit if no running ask held anything.
    """
    granted = need.slice_tokens
    least = min(1, need.slice_tokens)
    held: Budget | None = None
    exhausted: list[BudgetExhausted] = []
    for budget in chain:
        if budget.limit is None:
            continue
        fits = need.fits(budget.limit - budget.used - budget.reserved, budget.meter)
        if fits is not None and fits >= least:
            granted = min(granted, fits)
            continue
        alone = need.fits(budget.limit - budget.used, budget.meter)
        if alone is None or alone < least:
            whole = need.fits(budget.limit, budget.meter)
            exhausted.append(budget.exhausted(now_ms, too_small=whole is None or whole < least))
        held = held or budget
    if exhausted:
        raise max(exhausted, key=lambda one: math.inf if one.retry_after_s is None else one.retry_after_s)
    if held is not None:
        raise Held(held)
    return granted


def grant_more(chain: Sequence[Budget], need: Need, *, own: Hold, used: Hold) -> tuple[int, bool]:
    """(slice, wait) for an ask that runs: 0 where the budgets pay for nothing more, and whether that may change when
    other asks give back what they hold. `own`: what of `reserved` is this ask's; `used`: what it used of it since the
    budgets were told. Pure."""
    granted, wait = need.slice_tokens, True
    for budget in chain:
        if budget.limit is None:
            continue
        others = budget.reserved - own.of(budget.meter)
        room = budget.limit - budget.used - used.of(budget.meter)
        fits = need.fits(room - others, budget.meter) or 0
        if fits == 0 and (need.fits(room, budget.meter) or 0) == 0:
            wait = False
        granted = min(granted, fits)
    return granted, wait


def time_left_ms(chain: Sequence[Budget]) -> int | None:
    """Of the seconds that the chain has; None: no budget holds them. Pure."""
    left = [
        budget.limit - budget.used - budget.reserved
        for budget in chain
        if budget.meter == SECONDS and budget.limit is not None
    ]
    return max(0, min(left)) if left else None


def limited(chain: Sequence[Budget]) -> bool:
    return any(budget.limit is not None for budget in chain)


def charge(budget: Budget, *, reserved: Hold, used: Hold) -> Budget:
    """The budget after an ask changed what it holds and what it used by so much."""
    return msgspec.structs.replace(
        budget,
        reserved=budget.reserved + reserved.of(budget.meter),
        used=budget.used + used.of(budget.meter),
    )


_OWNED = or_(
    *(
        and_(budgets.c.owner_kind == literal_column(f"'{kind}'"), budgets.c.owner_id == bindparam(f"the_{kind}"))
        for kind in OWNER_KINDS
    )
)
_IN_ORDER = (budgets.c.depth, budgets.c.id)
_OF_ASKS = budgets.c.meter.in_([literal_column(f"'{meter}'") for meter in ASK_METERS])
_SELECT_CHAIN = Statement(select(budgets).where(_OWNED, _OF_ASKS).order_by(*_IN_ORDER).with_for_update())
_SELECT_ONE = Statement(select(budgets).where(budgets.c.id == bindparam("of")).with_for_update())
_UPDATE = Statement(
    update(budgets)
    .where(budgets.c.id == bindparam("of"))
    .values(period_start_ms=bindparam("start_ms"), reserved=bindparam("now_reserved"), used=bindparam("now_used"))
)


def _ancestry(_: Dialect) -> Executable:
    """Of a process: its own budgets and those of its parents, besides those of the other owners."""
    way = select(budgets.c.id, budgets.c.parent).where(_OWNED).cte("way", recursive=True)
    way = way.union(select(budgets.c.id, budgets.c.parent).join(way, budgets.c.id == way.c.parent))
    chain = select(budgets).where(budgets.c.id.in_(select(way.c.id)), _OF_ASKS)
    return chain.order_by(*_IN_ORDER).with_for_update()


_SELECT_ANCESTRY = Statement(_ancestry)


def lock_chain(owners: Owners, now_ms: int) -> Transaction[list[Budget]]:
    """All budgets that an ask of these owners is charged to, from the root."""
    select_chain = _SELECT_ANCESTRY if owners.process else _SELECT_CHAIN
    rows = yield select_chain(
        the_organisation=owners.organisation,
        the_project=owners.project,
        the_key=owners.key,
        the_process=owners.process,
        the_model=owners.model,
    )
    return [budget_of(row).at(now_ms) for row in rows]


def lock_ids(ids: Sequence[str], now_ms: int) -> Transaction[list[Budget]]:
    """Those of them that still exist; `ids` from the root."""
    found = []
    for budget_id in ids:
        rows = yield _SELECT_ONE(of=budget_id)
        found += [budget_of(row).at(now_ms) for row in rows]
    return found


def store(budget: Budget) -> Transaction[None]:
    yield _UPDATE(of=budget.id, start_ms=budget.period_start_ms, now_reserved=budget.reserved, now_used=budget.used)


def budget_of(row: Row) -> Budget:
    return Budget(**{name: row[name] for name in Budget.__struct_fields__})


def encode_ids(chain: Sequence[Budget]) -> str:
    return msgspec.json.encode([budget.id for budget in chain]).decode()


def decode_ids(text: str) -> list[str]:
    return msgspec.json.decode(text, type=list[str])

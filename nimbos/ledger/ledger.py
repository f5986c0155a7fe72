"""The ledger: what an ask may use, what it used, and what that costs. The only truth about tokens and money.

    reserve   before the engine sees the ask: limits, then budgets from the root, then the ask's row
    extend    while it streams: what is used moves from `reserved` to `used`, and the next slice is reserved
    settle    once, whatever ended it: the rest of `reserved` goes back, and rows and sums are written

Each is a transaction as a plain generator, so that others compose it with rows of their own. They decide by what the
rows say, never by what this process remembers: two servers on one database, and recovery after a death, take the same
way. Read `budgets.py` and `limits.py` for the rules, `desk.py` for who runs these.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from nimbos.db import Row, Transaction
from nimbos.ledger import alerts, budgets, limits, prices, rollups, rows
from nimbos.ledger.budgets import Budget, Hold, Need
from nimbos.ledger.limits import Passed
from nimbos.ledger.owners import Owners
from nimbos.ledger.prices import PriceTable, Rates
from nimbos.ledger.rows import Admitted, Settlement
from nimbos.types import Account, Ask, Kind, ModelCard, Origin, Usage

SLICE_TOKENS = 64  # reserved at once for each branch
NOWHERE = Origin()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """An ask that was let in. `allowance_tokens`: what is paid for in each branch, counted like `Ask.limit_tokens`;
    None: no budget holds it. `compute_ms`: of computing that is left for it; None: no budget holds that. `prices`: what
    was looked up, to be remembered once this is committed (`Ledger.remember`), here and below."""

    ask_id: str
    allowance_tokens: int | None
    passed: Passed
    compute_ms: int | None = None
    prices: PriceTable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a running ask has come. `usage`, `compute_ms`: its meter. `live`: branches that go on, each up to the
    allowance; `ended_output`: tokens of the others, less those that were there, or paid for, before the ask."""

    usage: Usage
    compute_ms: int = 0
    live: int
    ended_output: int
    allowance_tokens: int
    limit_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extended:
    """`allowance_tokens` None: no budget holds it any more. `last`: nothing follows. `wait`: nothing more now, but
    running asks may give something back. `compute_ms`: what its meter of computing may come to, None: no budget holds
    that. `fired`: alerts to tell."""

    allowance_tokens: int | None
    compute_ms: int | None = None
    last: bool = False
    wait: bool = False
    fired: tuple[alerts.Fired, ...] = ()
    prices: PriceTable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """`new` is False for an ask that was settled before, or never let in: nothing changed."""

    new: bool
    cost_micros: int = 0
    fired: tuple[alerts.Fired, ...] = ()
    prices: PriceTable | None = None


class Ledger:
    def __init__(self, *, server_id: str) -> None:
        """`server_id` stands in the rows of this server's asks, so that recovery knows whose they were."""
        self.server_id = server_id
        self._tables: dict[int, PriceTable] = {prices.NO_PRICES: PriceTable()}

    def remember(self, table: PriceTable | None) -> None:
        """A version that is committed never changes. One that was read in a transaction may not be: its number may come
        again with other prices, when the commit that should have made it was lost."""
        if table is not None:
            self._tables[table.version] = table

    def reserve(
        self, account: Account, ask: Ask, *, origin: Origin = NOWHERE, prompt_tokens: int, card: ModelCard
    ) -> Transaction[Reserved]:
        """Raises: Overloaded, BudgetExhausted; Held, where running asks may give something back."""
        now_ms = _now_ms()
        owners = Owners.of(account, origin, card.id)
        need = _first_need(ask, prompt_tokens)
        estimated_tokens = need.hold(need.slice_tokens).tokens
        passed = yield from limits.pass_limits(owners, tokens=estimated_tokens)
        version = yield from prices.current_version()
        chain = yield from budgets.lock_chain(owners, now_ms)
        hold, allowance_tokens, compute_ms, table = Hold(), None, budgets.time_left_ms(chain), None
        if budgets.limited(chain):
            table = yield from self._table(version)
            need = need.at(table.rates(card.id, ask.ask_class.value, ask.unpaid_pin_tokens))
            granted = budgets.grant(chain, need, now_ms=now_ms)
            hold = need.hold(granted)
            allowance_tokens = _already(ask) + granted if need.slice_tokens else None
            yield from _store(chain, reserved=hold, used=Hold())
        admitted = Admitted(
            server=self.server_id,
            prompt_tokens=prompt_tokens,
            price_version=version,
            chain=chain,
            passed=passed,
            estimated_tokens=estimated_tokens,
            hold=hold,
            now_ms=now_ms,
        )
        yield from rows.open_row(account, ask, origin, card, owners, admitted)
        return Reserved(
            ask_id=ask.id, allowance_tokens=allowance_tokens, passed=passed, compute_ms=compute_ms, prices=table
        )

    def extend(self, ask_id: str, progress: Progress) -> Transaction[Extended]:
        """What was used is charged in any case, and the next slice reserved, down to one token in each branch. A budget
        that was made since then holds the ask as if it had been there from the beginning."""
        now_ms = _now_ms()
        row = yield from rows.lock(ask_id)
        if row is None or row["state"] == rows.SETTLED:
            return Extended(allowance_tokens=progress.allowance_tokens, last=True)
        chain = yield from budgets.lock_chain(rows.owners(row), now_ms)
        if not budgets.limited(chain):
            return Extended(allowance_tokens=None)
        if row["state"] == rows.ABANDONED:  # what it held was given back
            return Extended(allowance_tokens=progress.allowance_tokens, last=True)
        table = yield from self._table(row["price_version"])
        rates = table.rates(row["model"], row["class"], row["pin_tokens"])
        own, before = rows.held(row), rows.charged(row)
        chain = _as_ever(chain, row)
        now_used = _used(progress.usage, rates, progress.compute_ms)
        need = _next_need(progress, row["prompt_tokens"], rates)
        granted, wait = budgets.grant_more(chain, need, own=own, used=now_used - before)
        hold = need.hold(granted)
        chain = yield from _store(chain, reserved=hold - own, used=now_used - before)
        yield from rows.extend_row(ask_id, hold=hold, charged=now_used, chain=chain)
        fired = yield from alerts.fire(chain, now_ms)
        left_ms = budgets.time_left_ms(chain)
        return Extended(
            allowance_tokens=progress.allowance_tokens + granted,
            compute_ms=None if left_ms is None else progress.compute_ms + left_ms,
            last=granted == 0 and not wait,
            wait=granted == 0 and wait,
            fired=tuple(fired),
            prices=table,
        )

    def settle(self, settlement: Settlement) -> Transaction[Settled]:
        """May be run again: an ask is settled once. All budgets that there are by now are charged, whenever they were
        made; `tree.py` sees to it that none is made between this and its sums."""
        now_ms = _now_ms()
        row = yield from rows.lock(settlement.ask_id)
        if row is None or row["state"] == rows.SETTLED:
            return Settled(new=False)
        table = yield from self._table(row["price_version"])
        rates = table.rates(row["model"], row["class"], row["pin_tokens"])
        used = _used(settlement.usage, rates, settlement.compute_ms)
        charged = limits.decode_charged(row["limits"])
        yield from limits.correct_tokens(charged, more=used.tokens - row["estimated_tokens"])
        chain = _as_ever((yield from budgets.lock_chain(rows.owners(row), now_ms)), row)
        chain = yield from _store(chain, reserved=Hold() - rows.held(row), used=used - rows.charged(row))
        fired = yield from alerts.fire(chain, now_ms)
        quantities = prices.quantities(settlement.usage, row["pin_tokens"])
        yield from rows.add_meters(settlement.ask_id, quantities, rates)
        yield from rows.settle_row(settlement, cost_micros=used.micros, now_ms=now_ms)
        yield from rollups.add(rows.line_of(row), quantities, cost_micros=used.micros, ended_ms=now_ms)
        return Settled(new=True, cost_micros=used.micros, fired=tuple(fired), prices=table)

    def abandon(self, ask_id: str) -> Transaction[bool]:
        """Gives back what the ask of a silent server holds. Should that server come back, it settles as ever."""
        row = yield from rows.lock(ask_id)
        if row is None or row["state"] != rows.OPEN:
            return False
        chain = yield from budgets.lock_ids(budgets.decode_ids(row["budgets"]), _now_ms())
        yield from _store(chain, reserved=Hold() - rows.held(row), used=Hold())
        yield from rows.abandon_row(ask_id)
        return True

    def _table(self, version: int) -> Transaction[PriceTable]:
        table = self._tables.get(version)
        return table if table is not None else (yield from prices.load_table(version))


def first_slice(ask: Ask) -> int:
    """How many tokens of answer are reserved at first in each branch, if the budgets have them."""
    if ask.kind is not Kind.GENERATE:
        return 0
    if ask.limit_tokens is None:
        return SLICE_TOKENS
    return max(0, min(SLICE_TOKENS, ask.limit_tokens - _already(ask)))


def _first_need(ask: Ask, prompt_tokens: int) -> Need:
    """Branches that begin with different lengths all get the same allowance, so the shorter ones need more."""
    live = [number for number in range(ask.n) if number not in ask.finished]
    behind = sum(_already(ask) - len(ask.emitted.get(number, ())) for number in live)
    slice_tokens = first_slice(ask)
    return Need(
        prompt_tokens=prompt_tokens,
        output_tokens=behind if slice_tokens else 0,
        branches=len(live) if slice_tokens else 0,
        slice_tokens=slice_tokens,
    )


def _next_need(progress: Progress, prompt_tokens: int, rates: Rates) -> Need:
    """What of the present allowance is not used yet, and a slice more."""
    usage, allowance_tokens = progress.usage, progress.allowance_tokens
    most = progress.live * allowance_tokens + progress.ended_output
    left = SLICE_TOKENS if progress.limit_tokens is None else progress.limit_tokens - allowance_tokens
    return Need(
        rates=rates,
        prompt_tokens=max(0, prompt_tokens - usage.input),
        output_tokens=max(0, most - usage.output),
        branches=progress.live,
        slice_tokens=max(0, min(SLICE_TOKENS, left)),
    )


def _already(ask: Ask) -> int:
    """Tokens of the longest branch that were there before this ask."""
    return max((len(ids) for number, ids in ask.emitted.items() if number not in ask.finished), default=0)


def _used(usage: Usage, rates: Rates, compute_ms: int) -> Hold:
    return Hold(tokens=prices.tokens_of(usage), micros=rates.cost_micros(usage), ms=compute_ms)


def _as_ever(chain: list[Budget], row: Row) -> list[Budget]:
    """A budget that was made since the ask was let in, as if it had been there from the beginning."""
    known, own, before = budgets.decode_ids(row["budgets"]), rows.held(row), rows.charged(row)
    return [one if one.id in known else budgets.charge(one, reserved=own, used=before) for one in chain]


def _store(chain: list[Budget], *, reserved: Hold, used: Hold) -> Transaction[list[Budget]]:
    after = [budgets.charge(budget, reserved=reserved, used=used) for budget in chain]
    for budget in after:
        yield from budgets.store(budget)
    return after


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

"""The asks' own rows: opened, extended, settled or abandoned, each by one statement. `ledger.py` decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import bindparam, select, update

from nimbos.db import ManyRows, Row, Statement, Transaction, Value, insert
from nimbos.db.tables.ledger import asks, meters
from nimbos.ledger import budgets, limits
from nimbos.ledger.budgets import Budget, Hold
from nimbos.ledger.limits import Passed
from nimbos.ledger.owners import Owners
from nimbos.ledger.prices import Rates, tokens_of
from nimbos.ledger.rollups import Line
from nimbos.types import Account, Ask, ModelCard, Origin, Usage

OPEN, ABANDONED, SETTLED = "open", "abandoned", "settled"

_INSERT = insert(asks)
_INSERT_METERS = ManyRows(meters)
_LOCK = Statement(select(asks).where(asks.c.id == bindparam("of")).with_for_update())
_EXTEND = Statement(
    update(asks)
    .where(asks.c.id == bindparam("of"))
    .values(
        reserved_tokens=bindparam("held_tokens"),
        reserved_micros=bindparam("held_micros"),
        charged_tokens=bindparam("used_tokens"),
        charged_micros=bindparam("used_micros"),
        charged_ms=bindparam("used_ms"),
        budgets=bindparam("chain"),
    )
)
_ABANDON = Statement(
    update(asks).where(asks.c.id == bindparam("of")).values(state=ABANDONED, reserved_tokens=0, reserved_micros=0)
)
_SETTLE = Statement(
    update(asks)
    .where(asks.c.id == bindparam("of"))
    .values(
        state=SETTLED,
        ended_ms=bindparam("now_ms"),
        queue_ms=bindparam("waited_ms"),
        compute_ms=bindparam("computed_ms"),
        outcome=bindparam("how"),
        finish=bindparam("reasons"),
        reserved_tokens=0,
        reserved_micros=0,
        charged_tokens=bindparam("tokens"),
        charged_micros=bindparam("micros"),
        cost_micros=bindparam("cost"),
        told_output=bindparam("told"),
        restarts=bindparam("again"),
        recomputed=bindparam("twice"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What ended an ask, and what its meter says."""

    ask_id: str
    usage: Usage
    outcome: str
    finish: str = ""
    told_output: int = 0
    queue_ms: int = 0
    compute_ms: int = 0
    restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """What was decided for an ask that is let in; its row keeps it."""

    server: str
    prompt_tokens: int
    price_version: int
    chain: Sequence[Budget]
    passed: Passed
    estimated_tokens: int
    hold: Hold
    now_ms: int


def open_row(
    account: Account, ask: Ask, origin: Origin, card: ModelCard, owners: Owners, admitted: Admitted
) -> Transaction[None]:
    ask_class: dict[str, str] = {"class": ask.ask_class.value}
    yield _INSERT(
        id=ask.id,
        organisation=owners.organisation,
        project=owners.project,
        key=owners.key,
        user=account.user,
        process=origin.process,
        batch=origin.batch,
        route=origin.route,
        model=card.id,
        model_hash=card.model_hash,
        kind=ask.kind.value,
        n=ask.n,
        state=OPEN,
        server=admitted.server,
        started_ms=admitted.now_ms,
        ended_ms=None,
        queue_ms=0,
        compute_ms=0,
        outcome="",
        finish="",
        price_version=admitted.price_version,
        prompt_tokens=admitted.prompt_tokens,
        pin_tokens=ask.unpaid_pin_tokens,
        budgets=budgets.encode_ids(admitted.chain),
        limits=limits.encode_charged(admitted.passed.charged),
        estimated_tokens=admitted.estimated_tokens,
        reserved_tokens=admitted.hold.tokens,
        reserved_micros=admitted.hold.micros,
        charged_tokens=0,
        charged_micros=0,
        charged_ms=0,
        cost_micros=0,
        told_output=0,
        restarts=0,
        recomputed=0,
        **ask_class,
    )


def lock(ask_id: str) -> Transaction[Row | None]:
    rows = yield _LOCK(of=ask_id)
    return rows[0] if rows else None


def owners(row: Row) -> Owners:
    return Owners(
        organisation=row["organisation"],
        project=row["project"],
        key=row["key"],
        process=row["process"],
        model=row["model"],
    )


def extend_row(ask_id: str, *, hold: Hold, charged: Hold, chain: Sequence[Budget]) -> Transaction[None]:
    yield _EXTEND(
        of=ask_id,
        chain=budgets.encode_ids(chain),
        held_tokens=hold.tokens,
        held_micros=hold.micros,
        used_tokens=charged.tokens,
        used_micros=charged.micros,
        used_ms=charged.ms,
    )


def abandon_row(ask_id: str) -> Transaction[None]:
    yield _ABANDON(of=ask_id)


def settle_row(settlement: Settlement, *, cost_micros: int, now_ms: int) -> Transaction[None]:
    yield _SETTLE(
        of=settlement.ask_id,
        now_ms=now_ms,
        waited_ms=settlement.queue_ms,
        computed_ms=settlement.compute_ms,
        how=settlement.outcome,
        reasons=settlement.finish,
        tokens=tokens_of(settlement.usage),
        micros=cost_micros,
        cost=cost_micros,
        told=settlement.told_output,
        again=settlement.restarts,
        twice=settlement.usage.recomputed,
    )


def add_meters(ask_id: str, quantities: dict[str, int], rates: Rates) -> Transaction[None]:
    rows: list[dict[str, Value]] = [
        {
            "ask": ask_id,
            "meter": meter,
            "quantity": quantity,
            "price_version": rates.version,
            "micros_per_million": rates.of(meter),
        }
        for meter, quantity in quantities.items()
    ]
    if rows:
        yield _INSERT_METERS(rows)


def line_of(row: Row) -> Line:
    return Line(
        project=row["project"],
        key=row["key"],
        model=row["model"],
        ask_class=row["class"],
        process=row["process"],
    )


def held(row: Row) -> Hold:
    """What the ask holds of its budgets now."""
    return Hold(tokens=row["reserved_tokens"], micros=row["reserved_micros"])


def charged(row: Row) -> Hold:
    """What of its use its budgets know."""
    return Hold(tokens=row["charged_tokens"], micros=row["charged_micros"], ms=row["charged_ms"])

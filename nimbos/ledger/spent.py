"""What one ask used in the end, for whoever goes on with its answer."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import bindparam, select

from nimbos.db import Statement, Transaction
from nimbos.db.tables.ledger import asks, meters
from nimbos.ledger.rows import SETTLED
from nimbos.types import Usage

_ASK = Statement(
    select(asks.c.state, asks.c.process, asks.c.cost_micros, asks.c.compute_ms).where(asks.c.id == bindparam("of"))
)
_METERS = Statement(select(meters.c.meter, meters.c.quantity).where(meters.c.ask == bindparam("of")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    process: str
    usage: Usage
    cost_micros: int
    compute_ms: int


def spent(ask_id: str) -> Transaction[Spent | None]:
    """None for an ask that is not settled, or was never let in."""
    rows = yield _ASK(of=ask_id)
    if not rows or rows[0]["state"] != SETTLED:
        return None
    found = {row["meter"]: row["quantity"] for row in (yield _METERS(of=ask_id))}
    cached = found.get("cached", 0) + found.get("cache_read", 0)
    thinking = found.get("thinking", 0)
    usage = Usage(
        input=found.get("input", 0) + found.get("cache_write", 0) + cached,
        cached=cached,
        output=found.get("output", 0) + thinking,
        thinking=thinking,
        recomputed=found.get("recomputed", 0),
    )
    return Spent(
        process=rows[0]["process"],
        usage=usage,
        cost_micros=rows[0]["cost_micros"],
        compute_ms=rows[0]["compute_ms"],
    )

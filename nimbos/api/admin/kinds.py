"""Whether a model makes vectors, moderates, or answers: its first ask in the time that is asked for tells.

The sums know the model of an ask and not its route. They do know where that ask is to be looked for: there is no index
of asks by model, and one that is rarely asked would be looked for in the whole ledger.
"""

from __future__ import annotations

from typing import Literal

from sqlalchemy import BigInteger, bindparam, func, select

from nimbos.db import Database, Statement
from nimbos.db.tables.ledger import asks, usage_hours

Kind = Literal["completions", "embeddings", "moderations"]
_HOUR_MS = 3_600_000  # of a row of the sums

_HOUR = Statement(
    select(func.min(usage_hours.c.hour_ms).label("hour_ms")).where(
        usage_hours.c.hour_ms >= bindparam("since_ms", type_=BigInteger),
        usage_hours.c.hour_ms < bindparam("until_ms", type_=BigInteger),
        usage_hours.c.model == bindparam("model"),
    )
)
_ONE_ASK = Statement(
    select(asks.c.kind, asks.c.route)
    .where(
        asks.c.model == bindparam("model"),
        asks.c.ended_ms >= bindparam("since_ms", type_=BigInteger),
        asks.c.ended_ms < bindparam("until_ms", type_=BigInteger),
    )
    .order_by(asks.c.ended_ms)
    .limit(1)
)


class Kinds:
    def __init__(self, database: Database, *, width_ms: int) -> None:
        """`width_ms`: of the buckets that `of` is told."""
        self._database = database
        self._width_ms = width_ms
        self._known: dict[str, Kind] = {}

    async def of(self, model: str, start_ms: int) -> Kind:
        """`start_ms`: of the first bucket that has an ask of the model."""
        if model not in self._known:
            self._known[model] = await self._find(model, start_ms)
        return self._known[model]

    async def _find(self, model: str, start_ms: int) -> Kind:
        until_ms = start_ms + self._width_ms
        if self._width_ms > _HOUR_MS:
            (row,) = await self._database.read(_HOUR(model=model, since_ms=start_ms, until_ms=until_ms))
            start_ms = start_ms if row["hour_ms"] is None else int(row["hour_ms"])
            until_ms = start_ms + _HOUR_MS
        rows = await self._database.read(_ONE_ASK(model=model, since_ms=start_ms, until_ms=until_ms))
        return _kind(rows[0]["kind"], rows[0]["route"]) if rows else "completions"


def _kind(kind: str, route: str) -> Kind:
    if route == "/v1/moderations":
        return "moderations"
    return "embeddings" if kind == "embed" else "completions"

"""What was used and by whom: asks, their meters, budgets, limits, prices, and the sums that reports read.

`asks` has one row for each ask, made before the engine sees it and settled once. `meters` has one row for each kind of
token that the ask used; the kinds are disjoint: `input` is what was computed of the prompt, `cached` what was found in
memory, `cache_write` and `cache_read` the same of a prefix that the ask wanted to be kept, `output` the answer without
its thinking, `thinking` the rest, `recomputed` what an engine's death cost (never billed). `usage_hours` are sums of
both, kept in the transaction that settles; `usage_days` and `usage_months` are those, added up before somebody reads
them (`ledger/rollups.py`).
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, Table, Text, UniqueConstraint, text

from nimbos.db.tables.metadata import metadata

asks = Table(
    "asks",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("user", Text, nullable=False),
    Column("process", Text, nullable=False),
    Column("batch", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("model_hash", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("class", Text, nullable=False),
    Column("n", Integer, nullable=False),
    Column("state", Text, nullable=False),  # open, abandoned (its server is silent), settled
    Column("server", Text, nullable=False),
    Column("started_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger),
    Column("queue_ms", BigInteger, nullable=False),
    Column("compute_ms", BigInteger, nullable=False),
    Column("outcome", Text, nullable=False),  # "" while open; done, cancelled, an error's code, or recovered
    Column("finish", Text, nullable=False),  # the branches' reasons; "budget" where a budget ended one
    Column("price_version", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),  # as counted before admission
    Column("pin_tokens", BigInteger, nullable=False),  # of them, which the ask wants to be kept
    Column("budgets", Text, nullable=False),  # JSON array: ids of the budgets it is charged to, from the root
    Column("limits", Text, nullable=False),  # JSON array: [owner kind, owner id, model] of the buckets it is charged to
    Column("estimated_tokens", BigInteger, nullable=False),  # what those buckets were charged
    Column("reserved_tokens", BigInteger, nullable=False),
    Column("reserved_micros", BigInteger, nullable=False),
    Column("charged_tokens", BigInteger, nullable=False),  # already moved from reserved to used
    Column("charged_micros", BigInteger, nullable=False),
    Column("charged_ms", BigInteger, nullable=False),
    Column("cost_micros", BigInteger, nullable=False),
    Column("told_output", BigInteger, nullable=False),
    Column("restarts", Integer, nullable=False),
    Column("recomputed", BigInteger, nullable=False),
)
Index("ix_asks_ended", asks.c.ended_ms)
Index(
    "ix_asks_open",
    asks.c.server,
    asks.c.key,
    asks.c.project,
    asks.c.model,
    sqlite_where=text("state = 'open'"),
    postgresql_where=text("state = 'open'"),
)

Index(
    "ix_asks_process",
    asks.c.process,
    sqlite_where=text("process <> ''"),
    postgresql_where=text("process <> ''"),
)

meters = Table(
    "meters",
    metadata,
    Column("ask", Text, primary_key=True),
    Column("meter", Text, primary_key=True),
    Column("quantity", BigInteger, nullable=False),
    Column("price_version", BigInteger, nullable=False),
    Column("micros_per_million", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

budgets = Table(
    "budgets",
    metadata,
    Column("id", Text, primary_key=True),
    Column("parent", Text, index=True),
    Column("depth", Integer, nullable=False),  # the lock's order: the root is 0
    Column("owner_kind", Text, nullable=False),
    Column("owner_id", Text, nullable=False),
    Column("owner_name", Text, nullable=False),
    Column("meter", Text, nullable=False),  # tokens, cost_micros, seconds_ms, calls
    Column("period", Text, nullable=False),  # day, month, total
    Column("limit", BigInteger),  # NULL: it counts, and holds nothing
    Column("period_start_ms", BigInteger, nullable=False),
    Column("reserved", BigInteger, nullable=False),
    Column("used", BigInteger, nullable=False),
    Column("alert_at", BigInteger),  # the lowest threshold of its alerts
    UniqueConstraint("owner_kind", "owner_id", "meter", "period"),
)

alerts = Table(
    "alerts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("budget", Text, nullable=False, index=True),
    Column("threshold", BigInteger, nullable=False),
    Column("details", Text, nullable=False),  # JSON of whoever asked for it; the ledger does not read it
    Column("fired_ms", BigInteger),
    Column("fired_period_ms", BigInteger),  # the start of the period in which it fired last
    Column("fired_used", BigInteger),
)

limits = Table(
    "limits",
    metadata,
    Column("owner_kind", Text, primary_key=True),
    Column("owner_id", Text, primary_key=True),
    Column("model", Text, primary_key=True),  # a model's id, or * for all together
    Column("owner_name", Text, nullable=False),
    Column("requests_per_min", BigInteger),
    Column("requests_burst", BigInteger),
    Column("requests_due_ns", BigInteger, nullable=False),
    Column("tokens_per_min", BigInteger),
    Column("tokens_burst", BigInteger),
    Column("tokens_due_ns", BigInteger, nullable=False),
    Column("concurrent", BigInteger),
)

prices = Table(
    "prices",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("model", Text, primary_key=True),
    Column("meter", Text, primary_key=True),
    Column("class", Text, primary_key=True),
    Column("micros_per_million", BigInteger, nullable=False),
)

price_versions = Table(
    "price_versions",
    metadata,
    Column("name", Text, primary_key=True),  # one row, "current": whoever changes prices takes its lock
    Column("version", BigInteger, nullable=False),
    Column("changed_ms", BigInteger, nullable=False),
)


def _usage_columns(start: str) -> list[Column[int] | Column[str]]:
    """`meter` is also "asks", whose quantity is their number; the cost, rounded once for each ask, stands there."""
    return [
        Column(start, BigInteger, primary_key=True, autoincrement=False),
        Column("project", Text, primary_key=True),
        Column("key", Text, primary_key=True),
        Column("model", Text, primary_key=True),
        Column("class", Text, primary_key=True),
        Column("process", Text, primary_key=True),
        Column("meter", Text, primary_key=True),
        Column("quantity", BigInteger, nullable=False),
        Column("cost_micros", BigInteger, nullable=False),
    ]


usage_hours = Table(
    "usage_hours",
    metadata,
    *_usage_columns("hour_ms"),
    Column("folded_quantity", BigInteger, nullable=False),  # what of it the days and months have
    Column("folded_cost_micros", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
Index(
    "ix_usage_hours_unfolded",
    usage_hours.c.hour_ms,
    sqlite_where=text("quantity <> folded_quantity"),
    postgresql_where=text("quantity <> folded_quantity"),
)
usage_days = Table("usage_days", metadata, *_usage_columns("day_ms"), sqlite_with_rowid=False)
usage_months = Table("usage_months", metadata, *_usage_columns("month_ms"), sqlite_with_rowid=False)

servers = Table(
    "servers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("home", Text, nullable=False),
    Column("seen_ms", BigInteger, nullable=False),
)

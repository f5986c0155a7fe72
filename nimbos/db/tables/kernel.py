"""The logs of processes, their small segments and the keys of their effects. Heads and mailboxes are in `processes.py`.

A row of `process_events` is never changed. The rows of a fork begin behind the event of its parent that they are
chained to; what was before is the parent's. `nimbos/kernel/log.py` writes them, `nimbos/kernel/chain.py` says what
`hash` is made of.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Table, Text

from nimbos.db.tables.metadata import metadata

process_events = Table(
    "process_events",
    metadata,
    Column("pid", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("ts_ms", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("cause", BigInteger),
    Column("call_id", Text, nullable=False),  # "" where it is about none
    Column("actor", Text, nullable=False),
    Column("label", Text, nullable=False),  # JSON: [origin, secrecy]
    Column("body", LargeBinary, nullable=False),  # the very bytes that were hashed
    Column("blob", Text),
    Column("usage", Text),  # JSON, as it was hashed
    Column("version", Integer, nullable=False),
    Column("prev_hash", Text, nullable=False),
    Column("hash", Text, nullable=False),
)

process_effects = Table(
    "process_effects",
    metadata,
    Column("key", Text, primary_key=True),  # which a driver is given: the same at each try, another in a fork
    Column("pid", Text, nullable=False),
    Column("call_id", Text, nullable=False),
    Column("intended_ms", BigInteger, nullable=False),
    Index(None, "pid"),
)

process_segments = Table(
    "process_segments",
    metadata,
    Column("hash", Text, primary_key=True),  # of the content
    Column("content", LargeBinary, nullable=False),  # a small one; large ones are in `blobs`
)

"""Work that must be done once, whoever does it. `nimbos/work.py` says what a claim is.

`free_at_ms` is when anyone may claim the row: for waiting work the moment it may begin, for claimed work the end of the
lease. It counts by `clock`: "" is the database's own (PostgreSQL), otherwise the boot whose monotonic time it is.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, LargeBinary, Table, Text

from nimbos.db.tables.metadata import metadata

work = Table(
    "work",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("ref", Text, primary_key=True),
    Column("payload", LargeBinary, nullable=False),
    Column("owner", Text),  # null: nobody's
    Column("epoch", BigInteger, nullable=False),
    Column("lapses", BigInteger, nullable=False),
    Column("clock", Text, nullable=False),
    Column("free_at_ms", BigInteger, nullable=False),
    Index(None, "kind", "free_at_ms", "ref"),
    Index(None, "owner"),
)

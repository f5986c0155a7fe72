"""Which programs a project has. What they are is in `blobs`, under their hash; parts of programs have no row."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, Table, Text, UniqueConstraint

from nimbos.db.tables.metadata import metadata

programs = Table(
    "programs",
    metadata,
    Column("account", Text, primary_key=True),
    Column("hash", Text, primary_key=True),
    Column("put_id", Text, nullable=False),  # of the last upload: in their order
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("python", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    UniqueConstraint("put_id"),
    Index(None, "account", "put_id"),
    Index(None, "account", "name", "put_id"),
)

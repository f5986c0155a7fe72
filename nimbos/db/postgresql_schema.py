"""Makes the tables on PostgreSQL; one server at a time, however many start at once."""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.schema import CreateIndex, CreateTable

from nimbos.db.tables.metadata import all_tables

_LOCK = 0x6E696D626F73  # "nimbos"


async def make_tables(connection: Any) -> None:
    own = dialect()  # type: ignore[no-untyped-call]
    async with connection.transaction():
        await connection.execute(f"SELECT pg_advisory_xact_lock({_LOCK})")
        for table in all_tables().sorted_tables:
            await connection.execute(str(CreateTable(table, if_not_exists=True).compile(dialect=own)))
            for index in sorted(table.indexes, key=lambda index: str(index.name)):
                await connection.execute(str(CreateIndex(index, if_not_exists=True).compile(dialect=own)))

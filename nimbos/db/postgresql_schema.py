"""Brings a PostgreSQL database's tables up to date, in one transaction; one server at a time, however many start."""

from __future__ import annotations

import asyncpg

from nimbos.db.schema import READ_VERSION, VERSION_TABLE, steps

_LOCK = 0x6E696D626F73  # "nimbos" in ASCII


async def bring_up_to_date(connection: asyncpg.Connection, *, where: str) -> None:
    """Raises: StorageUnavailable, and what asyncpg raises; the database is then as it was."""
    async with connection.transaction():
        await connection.execute(f"SELECT pg_advisory_xact_lock({_LOCK})")
        statements = steps(await version(connection), "postgresql", where=where)
        if statements:
            await connection.execute(";\n".join(statements))  # one way there and back


async def version(connection: asyncpg.Connection) -> str | None:
    """Of the tables; None where there are none."""
    if await connection.fetchval("SELECT to_regclass($1)", VERSION_TABLE) is None:
        return None
    found = await connection.fetchval(READ_VERSION)
    return "unknown" if found is None else str(found)

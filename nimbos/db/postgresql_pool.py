"""Connections to PostgreSQL that wait for the next transaction.

asyncpg's own pool takes a connection away from whoever uses it when it breaks; this one leaves it there, so that the
user can tell what that meant.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

POOL_SIZE = 10
_CONNECT_PATIENCE_S = 5.0
_POOL_PATIENCE_S = 30.0
_QUERY_PATIENCE_S = 120.0
_CACHED_STATEMENTS = 1024
_SETTINGS = {"application_name": "nimbos", "lock_timeout": "5000", "idle_in_transaction_session_timeout": "60000"}


class Pool:
    """At most `POOL_SIZE` connections, made when they are needed; one that broke is forgotten."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._idle: list[asyncpg.Connection] = []
        self._free = asyncio.Semaphore(POOL_SIZE)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """For one transaction or query, after which it must not be in one.

        Raises: TimeoutError when none is free for long; what `connect` raises.
        """
        async with asyncio.timeout(_POOL_PATIENCE_S):
            await self._free.acquire()
        try:
            connection = self._take() or await connect(self._url)
            try:
                yield connection
            finally:
                if connection.is_closed() or connection.is_in_transaction():
                    connection.terminate()
                else:
                    self._idle.append(connection)
        finally:
            self._free.release()

    def close(self) -> None:
        """Of those that nobody uses."""
        while self._idle:
            self._idle.pop().terminate()

    def _take(self) -> asyncpg.Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return None


async def connect(url: str, **settings: str) -> asyncpg.Connection:
    """Raises: OSError, TimeoutError, asyncpg's errors."""
    connection = await asyncpg.connect(
        url,
        timeout=_CONNECT_PATIENCE_S,
        command_timeout=_QUERY_PATIENCE_S,
        statement_cache_size=_CACHED_STATEMENTS,
        server_settings={**_SETTINGS, **settings},
    )
    # A sum of BIGINTs is NUMERIC there; here it is an integer, as in SQLite.
    await connection.set_type_codec("numeric", schema="pg_catalog", encoder=str, decoder=_number, format="text")
    return connection


def _number(text: str) -> Any:
    return float(text) if "." in text or "N" in text else int(text)

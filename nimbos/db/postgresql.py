"""PostgreSQL behind the `Store` protocol: a pool of asyncpg connections that drive the same generators.

A transaction runs in a task of its own, so that a caller who is cancelled neither breaks a connection nor leaves half a
transaction. What the server undoes because of others (deadlock, serialisation) runs again. A connection that is
lost before the commit runs it again on another. The errors' meaning is in `postgresql_errors.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import asyncpg

from nimbos.db.postgresql_errors import TRANSPORT, Meaning, bad_url, is_collision, is_loss
from nimbos.db.postgresql_pool import POOL_SIZE, Pool, connect
from nimbos.db.postgresql_schema import bring_up_to_date
from nimbos.db.statements import Bound, Row, Transaction
from nimbos.errors import ConfigError, StorageUnavailable

T = TypeVar("T")

_COLLISIONS_MAX = 12
_LOSSES_MAX = POOL_SIZE + 1  # a server that was restarted leaves a pool full of dead connections
_BACKOFF_S, _BACKOFF_MAX_S = 0.005, 0.5

_BEGIN_DURABLE = "BEGIN ISOLATION LEVEL READ COMMITTED"
_BEGIN = f"{_BEGIN_DURABLE}; SET LOCAL synchronous_commit TO off"

_FAILURES = (asyncpg.PostgresError, *TRANSPORT)


class _Collision(Exception):
    """Others changed the same rows: the transaction is undone and may be tried again."""


class _Lost(Exception):
    """The connection ended before a commit was sent: nothing is written, and it may be tried again."""


class PostgresqlStore:
    def __init__(self, url: str, pool: Pool, meaning: Meaning) -> None:
        """`open` makes one."""
        self._url = url
        self._pool = pool
        self._meaning = meaning
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False

    @classmethod
    async def open(cls, url: str) -> PostgresqlStore:
        meaning = Meaning.of(url)
        try:
            connection = await connect(url, lock_timeout="0")
            try:
                await bring_up_to_date(connection, where=meaning.where)
            finally:
                connection.terminate()
        except asyncpg.exceptions.ClientConfigurationError as error:
            raise bad_url() from error
        except _FAILURES as error:
            raise meaning(error) from error
        return cls(url, Pool(url), meaning)

    async def run(self, begin: Callable[[], Transaction[T]], *, durable: bool, quick: bool) -> T:
        return await self._to_the_end(lambda: self._attempt(begin, durable=durable))

    async def read(self, query: Bound) -> list[Row]:
        text, parameters = query.prepared("postgresql")

        async def attempt() -> list[Row]:
            async with self._connection() as connection:
                try:
                    return cast("list[Row]", await connection.fetch(text, *parameters))
                except _FAILURES as error:
                    raise self._after(error, connection) from error

        return await self._to_the_end(attempt)

    async def stream(self, query: Bound, *, batch: int) -> AsyncIterator[Row]:
        text, parameters = query.prepared("postgresql")
        try:
            connection = await connect(self._url)  # of its own: an export takes no transaction's connection
            try:
                async with connection.transaction(isolation="repeatable_read", readonly=True):
                    async for row in connection.cursor(text, *parameters, prefetch=batch):
                        yield cast("Row", row)
            finally:
                connection.terminate()
        except _FAILURES as error:
            raise self._meaning(error) from error

    async def backup(self, target: Path) -> None:
        raise no_copy(self._url, target)

    async def close(self) -> None:
        self._closed = True
        if self._running:
            await asyncio.wait(self._running)
        self._pool.close()

    async def _to_the_end(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """In a task of its own, which a caller that is cancelled leaves behind: cancelling a query would cost a new
        connection to tell the server, and leave open whether it was done."""
        if self._closed:
            raise StorageUnavailable(self._meaning.where, reason="it is closed.")
        task = asyncio.create_task(self._repeat(attempt))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # marked as seen: its caller may be gone

    async def _repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        collisions = losses = 0
        while True:
            try:
                return await attempt()
            except _Collision as collision:
                collisions += 1
                if collisions > _COLLISIONS_MAX:
                    raise self._meaning(_cause(collision)) from collision
                await asyncio.sleep(_backoff_s(collisions))
            except _Lost as lost:
                losses += 1
                if losses > _LOSSES_MAX:
                    raise self._meaning(_cause(lost)) from lost

    async def _attempt(self, begin: Callable[[], Transaction[T]], *, durable: bool) -> T:
        async with self._connection() as connection:
            try:
                await connection.execute(_BEGIN_DURABLE if durable else _BEGIN)
                result = await _drive(begin(), connection)
            except _FAILURES as error:
                await _roll_back(connection)
                raise self._after(error, connection) from error
            except BaseException:
                await _roll_back(connection)
                raise
            try:
                await connection.execute("COMMIT")
            except _FAILURES as error:
                raise _Collision if is_collision(error) else self._meaning(error, committing=True) from error
            return result

    def _after(self, error: Exception, connection: asyncpg.Connection) -> Exception:
        """What to raise for a failure before the commit."""
        if is_collision(error):
            return _Collision()
        return _Lost() if connection.is_closed() or is_loss(error) else self._meaning(error)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[asyncpg.Connection]:
        try:
            async with self._pool.connection() as connection:
                yield connection
        except _FAILURES as error:
            raise self._meaning(error) from error


def no_copy(url: str, target: Path) -> ConfigError:
    """PostgreSQL has a better way to copy a database than we."""
    command = f"pg_dump --format=custom --file={target} URL"
    return ConfigError(f"The database {Meaning.of(url).where} is PostgreSQL's: copy it with `{command}`.")


async def _drive(generator: Transaction[T], connection: asyncpg.Connection) -> T:
    try:
        bound = next(generator)
        while True:
            text, parameters = bound.prepared("postgresql")
            rows = await connection.fetch(text, *parameters)
            bound = generator.send(cast("list[Row]", rows))
    except StopIteration as stop:
        return cast("T", stop.value)
    finally:
        generator.close()


async def _roll_back(connection: asyncpg.Connection) -> None:
    if connection.is_closed():
        return
    try:
        await connection.execute("ROLLBACK")
    except _FAILURES:
        connection.terminate()


def _cause(error: Exception) -> BaseException:
    assert error.__cause__ is not None
    return error.__cause__


def _backoff_s(tries: int) -> float:
    return random.uniform(0.5, 1.0) * min(_BACKOFF_MAX_S, _BACKOFF_S * 2.0**tries)

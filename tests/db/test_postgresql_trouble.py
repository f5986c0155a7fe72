"""Trouble with the server: each has its reason, nothing is half written, and work goes on when the cause is gone."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database, Transaction
from nimbos.errors import ConfigError, InvalidRequest, StorageUnavailable
from tests.databases import Postgres, name_of
from tests.db.tables import ADD, ALL, count, everything, make


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    made = postgres.with_tables()
    yield made
    postgres.start()  # where a test left it stopped
    postgres.drop(made)


def settings_of(url: str, home: Path) -> Settings:
    return Settings(home=str(home), storage=StorageSettings(database_url=url))


@pytest.fixture
async def database(url: str, tmp_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(settings_of(url, tmp_path))
    await opened.run(make)
    yield opened
    await opened.close()


async def test_a_server_that_goes_and_comes_back_is_used_again(database: Database, postgres: Postgres) -> None:
    await asyncio.gather(*(database.run(lambda: count("a")) for _ in range(30)))  # several connections
    await asyncio.to_thread(postgres.stop)
    for call in (database.run(lambda: count("a")), database.read(ALL()), first(database)):
        with pytest.raises(StorageUnavailable, match=r"cannot be reached|lost|starting or stopping"):
            await call
    await asyncio.to_thread(postgres.start)
    assert await database.run(lambda: count("a")) == 31
    assert await everything(database) == {"a": 31}


async def first(database: Database) -> Any:
    return [row async for row in database.stream(ALL())]


async def test_a_restart_between_two_transactions_is_not_noticed(database: Database, postgres: Postgres) -> None:
    await asyncio.gather(*(database.run(lambda: count("a")) for _ in range(30)))
    await asyncio.to_thread(postgres.stop)
    await asyncio.to_thread(postgres.start)
    outcomes = await asyncio.gather(*(database.run(lambda: count("a")) for _ in range(30)))
    assert sorted(outcomes) == list(range(31, 61))


async def test_a_connection_that_is_ended_in_a_transaction_runs_it_again(
    database: Database, postgres: Postgres
) -> None:
    begun = 0

    def ended() -> Transaction[int]:
        nonlocal begun
        begun += 1
        yield ADD(id=f"try-{begun}", n=1, content=None)
        if begun == 1:
            postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'nimbos'")
        return (yield from count("a"))

    assert await database.run(ended) == 1
    assert await everything(database) == {"a": 1, "try-2": 1}


async def test_transactions_while_the_server_restarts_are_whole_and_told(
    database: Database, postgres: Postgres
) -> None:
    """What a caller was told to be done is there; a caller who was told nothing else may find it done or not."""
    stopping = asyncio.Event()
    told: list[str] = []

    def three(name: str) -> Transaction[None]:
        for letter in "abc":
            yield from count(f"{name}-{letter}")

    async def work(worker: int) -> None:
        number = 0
        while not stopping.is_set():
            number += 1
            name = f"{worker}-{number}"
            try:
                await database.run(lambda name=name: three(name), durable=True)  # type: ignore[misc]
                told.append(name)
            except StorageUnavailable:
                await asyncio.sleep(0.01)

    workers = [asyncio.create_task(work(worker)) for worker in range(4)]
    for _ in range(2):
        before = len(told)
        while len(told) < before + 20:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(postgres.stop)
        await asyncio.to_thread(postgres.start)
    before = len(told)
    while len(told) < before + 20:
        await asyncio.sleep(0.005)
    stopping.set()
    await asyncio.gather(*workers)
    found = await everything(database)
    assert set(found.values()) == {1}
    names = {name.rpartition("-")[0] for name in found}
    assert found.keys() == {f"{name}-{letter}" for name in names for letter in "abc"}
    assert set(told) <= names


async def test_a_read_only_database_is_told_and_used_when_it_can_be_written(
    database: Database, postgres: Postgres, url: str
) -> None:
    name = name_of(url)
    postgres.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    _end_connections(postgres)
    with pytest.raises(StorageUnavailable, match="read-only"):
        await database.run(lambda: count("a"))
    assert await database.read(ALL()) == []
    postgres.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    _end_connections(postgres)
    assert await database.run(lambda: count("a")) == 1


def _end_connections(postgres: Postgres) -> None:
    postgres.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'nimbos'")


async def test_a_lock_that_is_held_for_long_is_told(
    database: Database, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_settings(), "lock_timeout", "50")
    await database.run(lambda: count("a"))
    await database.close()
    impatient = await Database.open(settings_of(url, Path()))
    other = await asyncpg.connect(url)
    async with other.transaction():
        await other.execute("LOCK TABLE test_things IN EXCLUSIVE MODE")
        with pytest.raises(StorageUnavailable, match="locked"):
            await impatient.run(lambda: count("a"))
    await other.close()
    assert await impatient.run(lambda: count("a")) == 2
    await impatient.close()


def _settings() -> dict[str, str]:
    from nimbos.db import postgresql_pool

    return postgresql_pool._SETTINGS


async def test_no_connection_to_spare_is_told(database: Database, url: str) -> None:
    limit = int((await database.read(_limit()))[0]["limit"])
    others = [await asyncpg.connect(url)]
    with pytest.raises(StorageUnavailable, match="out of connections"):
        for _ in range(limit):
            others.append(await asyncpg.connect(url))
            await _opened(url)
    for other in others:
        await other.close()
    await (await Database.open(settings_of(url, Path()))).close()


async def _opened(url: str) -> None:
    await (await Database.open(settings_of(url, Path()))).close()


def _limit() -> Any:
    from sqlalchemy import text

    from nimbos.db import Statement

    return Statement(text("SELECT current_setting('max_connections') AS limit"))()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda url: url.replace("/test_", "/nowhere_"), "no such database"),
        (lambda url: "postgresql://nobody@127.0.0.1:1/nimbos", "cannot be reached"),
        (lambda url: "postgresql://nobody@no-such-host.invalid/nimbos", "cannot be reached"),
    ],
    ids=["database", "port", "host"],
)
async def test_a_server_that_cannot_be_used_is_told_at_the_start(
    url: str, tmp_path: Path, change: Any, reason: str
) -> None:
    with pytest.raises(StorageUnavailable, match=reason):
        await Database.open(settings_of(change(url), tmp_path))


@pytest.mark.parametrize("wrong", ["mysql://host/name", "nimbos.db", "postgresql://host:port/name"])
async def test_what_is_no_url_is_an_error_of_the_settings(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError):
        await Database.open(settings_of(wrong, tmp_path))


async def test_no_error_names_the_password_and_only_the_operator_is_told_the_place(tmp_path: Path) -> None:
    url = "postgresql://user:pa55word@127.0.0.1:1/nimbos"
    with pytest.raises(StorageUnavailable) as refused:
        await Database.open(settings_of(url, tmp_path))
    with pytest.raises(ConfigError) as no_copy:
        await Database.copy(settings_of(url, tmp_path), tmp_path / "copy")
    assert "127.0.0.1" in refused.value.where
    assert "127.0.0.1" not in str(refused.value)
    assert "pg_dump" in str(no_copy.value)
    assert "pa55word" not in f"{refused.value}{refused.value.where}{no_copy.value}"


async def test_a_text_with_nul_is_the_callers_error(database: Database) -> None:
    def odd() -> Transaction[None]:
        yield ADD(id="nul \0", n=1, content=None)

    with pytest.raises(InvalidRequest, match="NUL"):
        await database.run(odd)
    assert await everything(database) == {}


def test_pg_control_is_there(postgres: Postgres) -> None:
    assert isinstance(postgres.execute("SELECT 1"), list)
    with pytest.raises(subprocess.CalledProcessError):
        postgres.stop()
        postgres.stop()
    postgres.start()

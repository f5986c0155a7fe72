"""Versions of the tables: made, brought up to date by one of many, kept when that fails, refused when newer."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database, Statement, Transaction, schema
from nimbos.errors import StorageUnavailable
from tests.databases import Postgres
from tests.db.tables import count, everything, make

HEAD, NEXT = schema.HEAD, f"{int(schema.HEAD) + 1:04}"  # before a test changes what this program knows
MORE_OF_IT = '''"""One more."""
import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{before}"

def upgrade() -> None:
    op.add_column("test_things", sa.Column("more", sa.Text(), nullable=False, server_default="old"))
    op.execute("UPDATE test_things SET n = n + 1")
    {more}
'''
MORE = Statement(text("SELECT id, n, more FROM test_things"))
VERSION = Statement(text("SELECT version_num FROM nimbos_version"))

Revise = Callable[[str], None]


@pytest.fixture
def revise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Revise:
    """Makes this program one that knows one version more; called again, another one of it."""
    folder = tmp_path / "migrations"

    def write(more: str) -> None:
        if not folder.exists():
            shutil.copytree(schema._MIGRATIONS / "versions", folder / "versions")
        written = MORE_OF_IT.format(more=more, revision=NEXT, before=HEAD)
        (folder / "versions" / f"{NEXT}_more.py").write_text(written)
        shutil.rmtree(folder / "versions" / "__pycache__", ignore_errors=True)
        monkeypatch.setattr(schema, "HEAD", NEXT)
        monkeypatch.setattr(schema, "_MIGRATIONS", folder)

    return write


async def fill(settings: Settings) -> None:
    database = await Database.open(settings)
    await database.run(make)
    await database.run(lambda: count("a", 5))
    await database.close()


def test_the_head_is_the_last_revision_and_there_is_one_line_of_them() -> None:
    config = Config()
    config.set_main_option("script_location", str(schema._MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [schema.HEAD]
    assert [revision.revision for revision in script.walk_revisions()][-1] == "0001"


def test_the_revisions_lead_to_the_tables_as_declared_on_sqlite(tmp_path: Path) -> None:
    """What fails here asks for a revision: `python -m nimbos.db.migrations.revise WHAT_CHANGES`."""
    found = []
    for statements in (schema.upgrade(None, "sqlite"), schema.steps(None, "sqlite", where="")):
        with closing(sqlite3.connect(":memory:")) as connection:
            for statement in statements:
                connection.execute(statement)
            found.append(sqlite_schema_of(connection))
    assert found[0] == found[1]
    assert {name for kind, name, *_ in found[0] if kind == "table"} > {"asks", "budgets", "api_keys", "blobs"}


def sqlite_schema_of(connection: sqlite3.Connection) -> set[tuple[Any, ...]]:
    found: set[tuple[Any, ...]] = set()
    for _, name, *facts in connection.execute("PRAGMA table_list").fetchall():
        if name.startswith(("sqlite_", schema.VERSION_TABLE)):
            continue
        found.add(("table", name, *facts))
        found |= {("column", name, *column) for column in connection.execute(f"PRAGMA table_xinfo({name})")}
        for _, index, *index_facts in connection.execute(f"PRAGMA index_list({name})").fetchall():
            columns = tuple(tuple(row)[1:] for row in connection.execute(f"PRAGMA index_xinfo({index})"))
            made = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (index,)).fetchone() or ("",)
            condition = (made[0] or "").partition(" WHERE ")[2]
            found.add(("index", name, index, *index_facts, columns, condition))
    return found


def test_the_revisions_lead_to_the_tables_as_declared_on_postgresql(postgres: Postgres) -> None:
    found = []
    for statements in (schema.upgrade(None, "postgresql"), schema.steps(None, "postgresql", where="")):
        url = postgres.fresh()
        found.append(asyncio.run(postgresql_schema_of(url, statements)))
        postgres.drop(url)
    assert found[0] == found[1]
    assert {row[1] for row in found[0] if row[0] == "column"} > {"asks", "budgets", "api_keys", "blobs"}


async def postgresql_schema_of(url: str, statements: tuple[str, ...]) -> set[tuple[Any, ...]]:
    connection = await asyncpg.connect(url)
    await connection.execute(";\n".join(statements))
    queries = {
        "column": "SELECT table_name, column_name, ordinal_position, data_type, is_nullable, column_default, "
        "collation_name FROM information_schema.columns WHERE table_schema = 'public'",
        "index": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
        "constraint": "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = 'public'::regnamespace AND contype <> 'n'",
    }
    found = {(kind, *row) for kind, query in queries.items() for row in await connection.fetch(query)}
    await connection.close()
    return {row for row in found if not str(row[1]).startswith(schema.VERSION_TABLE)}


async def test_a_new_database_has_the_version_and_opens_again_unchanged(database_settings: Settings) -> None:
    await fill(database_settings)
    database = await Database.open(database_settings)
    assert [row["version_num"] for row in await database.read(VERSION())] == [schema.HEAD]
    assert await everything(database) == {"a": 5}
    await database.close()
    assert not (Path(database_settings.home) / "backups").exists()


async def test_an_older_database_is_brought_up_to_date_by_one_of_many(
    database_settings: Settings, revise: Revise
) -> None:
    await fill(database_settings)
    revise("")
    opened = await asyncio.gather(*(Database.open(database_settings) for _ in range(5)))
    for database in opened:
        assert [tuple(row) for row in await database.read(MORE())] == [("a", 6, "old")]
        assert [row["version_num"] for row in await database.read(VERSION())] == [NEXT]
        await database.close()
    backups = list((Path(database_settings.home) / "backups").glob("*"))
    if database_settings.storage.database_url:
        assert backups == []
        return
    (backup,) = backups
    assert backup.name.startswith(f"nimbos-{HEAD}-")
    with closing(sqlite3.connect(backup)) as before:
        assert before.execute("SELECT id, n FROM test_things").fetchall() == [("a", 5)]
        assert before.execute("SELECT version_num FROM nimbos_version").fetchall() == [(HEAD,)]


async def test_a_revision_that_fails_leaves_the_database_as_it_was(database_settings: Settings, revise: Revise) -> None:
    await fill(database_settings)
    revise('op.execute("UPDATE nowhere SET n = 1")')
    with pytest.raises((sqlite3.OperationalError, asyncpg.PostgresError), match="nowhere"):
        await Database.open(database_settings)
    await read_as_before(database_settings)
    assert list((Path(database_settings.home) / "backups").glob("*")) == []
    revise("")
    database = await Database.open(database_settings)
    assert [tuple(row) for row in await database.read(MORE())] == [("a", 6, "old")]
    await database.close()


async def read_as_before(settings: Settings) -> None:
    url = settings.storage.database_url
    if url:
        connection = await asyncpg.connect(url)
        assert [tuple(row) for row in await connection.fetch("SELECT * FROM test_things")] == [("a", 5, None)]
        assert await connection.fetchval("SELECT version_num FROM nimbos_version") == HEAD
        await connection.close()
        return
    with closing(sqlite3.connect(Path(settings.home) / "nimbos.db")) as found:
        assert found.execute("SELECT * FROM test_things").fetchall() == [("a", 5, None)]
        assert found.execute("SELECT version_num FROM nimbos_version").fetchall() == [(HEAD,)]


@pytest.mark.parametrize("version", [NEXT, "9999", "a-branch"])
async def test_a_newer_database_is_refused_with_both_versions_and_left_alone(
    database_settings: Settings, version: str
) -> None:
    def become_newer() -> Transaction[None]:
        yield Statement(text(f"UPDATE nimbos_version SET version_num = '{version}'"))()

    await fill(database_settings)
    database = await Database.open(database_settings)
    await database.run(become_newer)
    await database.close()
    with pytest.raises(StorageUnavailable) as refused:
        await Database.open(database_settings)
    assert version in refused.value.reason
    assert schema.HEAD in refused.value.reason
    assert not (Path(database_settings.home) / "backups").exists()


_OPEN = """
import asyncio, sys
import msgspec
from nimbos.config import Settings
from nimbos.db import Database
async def main():
    database = await Database.open(msgspec.json.decode(sys.argv[1], type=Settings))
    await database.close()
sys.stdin.read()
asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_processes_that_start_at_once_make_one_database(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres").fresh() if kind == "postgresql" else ""
    settings = Settings(home=str(tmp_path), storage=StorageSettings(database_url=url))
    arguments = [sys.executable, "-c", _OPEN, msgspec.json.encode(settings).decode()]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    started = [
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) for _ in range(3)
    ]
    outcomes = []
    for process in started:  # all wait for the end of their input
        assert process.stdin is not None
        process.stdin.close()
    for process in started:
        assert process.stderr is not None
        outcomes.append((process.stderr.read(), process.wait(60)))
        process.stderr.close()
    assert outcomes == [(b"", 0)] * 3

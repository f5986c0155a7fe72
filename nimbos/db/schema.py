"""What the tables must look like, and the statements that bring a database there.

A new database is made from the tables as they are declared, at version `HEAD`. An older one goes through the revisions
in `migrations/versions`, which alembic turns into statements before the database is touched. Both ends are the same,
which a test holds. Everything happens in one transaction. Knows no driver.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Column, MetaData, Table, Text
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect
from sqlalchemy.dialects.postgresql.base import PGTypeCompiler
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.engine.interfaces import Dialect as SqlDialect
from sqlalchemy.schema import CreateIndex, CreateTable

from nimbos.db.statements import Dialect
from nimbos.db.tables.metadata import all_tables
from nimbos.errors import StorageUnavailable

HEAD = "0002"
VERSION_TABLE = "nimbos_version"
READ_VERSION = f"SELECT version_num FROM {VERSION_TABLE}"  # noqa: S608 - a constant

_MIGRATIONS = Path(__file__).parent / "migrations"


def steps(found: str | None, dialect: Dialect, *, where: str) -> tuple[str, ...]:
    """Statements that bring a database from version `found` (None: empty) to `HEAD`; none where it is there.

    Raises: StorageUnavailable when a newer program has been there.
    """
    if found is None:
        return _creation(dialect)
    if found == HEAD:
        return ()
    if found > HEAD or not found.isdigit():
        raise StorageUnavailable(
            where,
            reason=f"its tables have version {found[:20]}, and this program knows {HEAD}. "
            "Install the newer Nimbos, or restore the backup made before it.",
        )
    return upgrade(found, dialect)


def upgrade(start: str | None, dialect: Dialect) -> tuple[str, ...]:
    """The statements of every revision after `start` (None: of all). One at a time in a process: alembic keeps what it
    works on in a global."""
    # Here, as it costs a second that only an upgrade has to spend.
    from alembic.config import Config
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    written = _Statements()
    context = MigrationContext.configure(
        dialect=_schema_dialect(dialect),
        opts={
            "as_sql": True,
            "output_buffer": written,
            "starting_rev": start,
            "version_table": VERSION_TABLE,
            "fn": lambda revision, _: script._upgrade_revs("head", revision),
        },
    )
    with Operations.context(context):
        context.run_migrations()
    return tuple(written.all)


class _Statements:
    """What alembic would print, a statement at a time."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def write(self, text: str) -> None:
        statement = text.strip()
        if not statement.startswith("--"):
            self.all.append(statement.removesuffix(";"))

    def flush(self) -> None:
        """Nothing waits."""


@cache
def _creation(dialect: Dialect) -> tuple[str, ...]:
    own = _schema_dialect(dialect)
    version = Table(VERSION_TABLE, MetaData(), Column("version_num", Text, primary_key=True))
    made = []
    for table in (version, *all_tables().sorted_tables):
        made.append(str(CreateTable(table).compile(dialect=own)))
        indexes = sorted(table.indexes, key=lambda index: str(index.name))
        made.extend(str(CreateIndex(index).compile(dialect=own)) for index in indexes)
    made.append(f"INSERT INTO {VERSION_TABLE} VALUES ('{HEAD}')")  # noqa: S608 - a constant
    return tuple(made)


class _ByteOrder(PGTypeCompiler):
    """Text is ordered by its bytes, as in SQLite, whatever the server's locale; comparing it is faster, too."""

    def visit_TEXT(self, type_: Any, **keywords: Any) -> str:  # noqa: N802 - SQLAlchemy's name
        return f'{super().visit_TEXT(type_, **keywords)} COLLATE "C"'

    def visit_VARCHAR(self, type_: Any, **keywords: Any) -> str:  # noqa: N802 - SQLAlchemy's name
        return f'{super().visit_VARCHAR(type_, **keywords)} COLLATE "C"'


def _schema_dialect(dialect: Dialect) -> SqlDialect:
    if dialect == "sqlite":
        return sqlite_dialect()
    own: SqlDialect = asyncpg_dialect()  # type: ignore[no-untyped-call]
    own.type_compiler_instance = _ByteOrder(own)
    return own

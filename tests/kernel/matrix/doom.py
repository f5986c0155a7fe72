"""`nimbos`, but doomed: `python -m tests.kernel.matrix.doom up …` is the real server, whose database does what the file
at `DOOM` says. The file is taken at the first commit after it appears, and commits are counted from then on; a file
beside it says that it was done.

    kill     SIGKILL right after commit n
    power    SIGKILL right before commit n, after the files of the database were copied at each commit that was synced
    full, locked, io    commit n and the next few fail as SQLite's would
    gone     (PostgreSQL) every connection of the server is ended right before transaction n
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import sqlite3
from pathlib import Path
from typing import Any, Literal

import asyncpg
import msgspec

from nimbos.cli import main
from nimbos.db.postgresql import PostgresqlStore
from nimbos.db.sqlite_file import SqliteFile
from nimbos.work import claims, crew

FAILURES = 3  # one on the loop's thread, one for the group, one alone
RETRY_S = 0.05

Deed = Literal["kill", "power", "full", "locked", "io", "gone"]
CODES = {"full": sqlite3.SQLITE_FULL, "locked": sqlite3.SQLITE_BUSY, "io": sqlite3.SQLITE_IOERR}


class Doom(msgspec.Struct, kw_only=True):
    """`at`: the commit that it is done at, from 1. `copy`: where the last synced files are kept."""

    at: int
    deed: Deed
    copy: str = ""


class Fate:
    """What was told, and how many commits there were since."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.doom: Doom | None = None
        self.commits = 0

    def next(self) -> Doom | None:
        """A commit is about to be made; what is told for now."""
        if self._file.exists():
            self.doom = msgspec.json.decode(self._file.read_bytes(), type=Doom)
            self._file.unlink()
            self.commits = 0
        if self.doom is not None:
            self.commits += 1
        return self.doom

    def strike(self) -> None:
        self._file.with_suffix(".done").touch()

    def die(self) -> None:
        self.strike()
        os.kill(os.getpid(), signal.SIGKILL)


FATE = Fate(Path(os.environ.get("DOOM", "/nonexistent/doom")))


class DoomedConnection(sqlite3.Connection):
    synced = False

    def cursor(self, *arguments: Any) -> Any:
        return super().cursor(DoomedCursor)

    def execute(self, statement: str, parameters: Any = ()) -> sqlite3.Cursor:
        cursor: DoomedCursor = self.cursor()
        return cursor.execute(statement, parameters)


class DoomedCursor(sqlite3.Cursor):
    def execute(self, statement: str, parameters: Any = ()) -> DoomedCursor:
        connection = self.connection
        assert isinstance(connection, DoomedConnection)
        if statement.startswith("PRAGMA synchronous"):
            connection.synced = statement.endswith("FULL")
        if statement != "COMMIT":
            return super().execute(statement, parameters)
        doom = FATE.next()
        if doom is None:
            return super().execute(statement)
        return self._commit(connection, doom)

    def _commit(self, connection: DoomedConnection, doom: Doom) -> DoomedCursor:
        if doom.deed == "power" and FATE.commits == doom.at:
            FATE.die()
        if doom.deed in CODES and doom.at <= FATE.commits < doom.at + FAILURES:
            FATE.strike()
            error = sqlite3.OperationalError(doom.deed)
            error.sqlite_errorcode = CODES[doom.deed]
            raise error
        super().execute("COMMIT")
        if doom.deed == "kill" and FATE.commits == doom.at:
            FATE.die()
        if doom.deed == "power" and connection.synced:
            _copy(connection, Path(doom.copy))
        return self


def _copy(connection: sqlite3.Connection, target: Path) -> None:
    """The database's file and its log: what a disk is sure to have now."""
    (_, _, path), *_ = sqlite3.Connection.execute(connection, "PRAGMA database_list").fetchall()
    making = target.with_name(f"{target.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    for suffix in ("", "-wal"):
        if os.path.exists(f"{path}{suffix}"):
            shutil.copy(f"{path}{suffix}", making)
    shutil.rmtree(target, ignore_errors=True)
    making.rename(target)


async def _doomed_run(self: PostgresqlStore, begin: Any, *, durable: bool, quick: bool) -> Any:
    doom = FATE.next()
    number = FATE.commits
    if doom is not None and doom.deed == "gone" and number == doom.at:
        FATE.strike()
        await _cut(self._url)
    result = await _run(self, begin, durable=durable, quick=quick)
    if doom is not None and doom.deed == "kill" and number == doom.at:
        FATE.die()
    return result


async def _cut(url: str) -> None:
    connection: Any = await asyncpg.connect(url)
    try:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    finally:
        await connection.close()


_run = PostgresqlStore.run


def doom() -> None:
    """What is made from now on is doomed."""
    defaults = SqliteFile.__init__.__kwdefaults__
    assert defaults is not None
    defaults["connection_class"] = DoomedConnection
    PostgresqlStore.run = _doomed_run  # type: ignore[method-assign]
    crew.RETRY_S = RETRY_S
    boot = os.environ.get("DOOM_BOOT", "")
    if boot:
        claims.boot = lambda: boot


if __name__ == "__main__":
    faulthandler.enable()
    doom()
    main()

"""Brings a SQLite file's tables up to date, in one transaction, with a copy of the file kept before."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from nimbos.db import schema
from nimbos.db.sqlite_file import SqliteFile
from nimbos.errors import Conflict, NotFound, StorageUnavailable

_MIGRATION_PATIENCE_S = 60.0  # while another server migrates the same file


def bring_up_to_date(file: SqliteFile) -> None:
    """Makes the file if there is none. Of several programs that start at once, one does the work and the others wait.

    Raises: StorageUnavailable; the file is then as it was.
    """
    file.create()
    with closing(file.connect(patience_s=_MIGRATION_PATIENCE_S)) as connection:
        if file.version(connection) == schema.HEAD:
            return
        try:
            connection.execute("BEGIN IMMEDIATE")
            _migrate(file, connection)
        except sqlite3.Error as error:
            raise file.meaning(error) from error


def _migrate(file: SqliteFile, connection: sqlite3.Connection) -> None:
    """Ends the transaction well; closing the connection undoes what is not."""
    found = file.version(connection)  # again: it may have been done while we waited for the lock
    statements = schema.steps(found, "sqlite", where=str(file.path))
    kept = _keep(file, found) if statements and found is not None else None
    try:
        for statement in statements:
            connection.execute(statement)
        connection.execute("COMMIT")
    except sqlite3.Error:
        if kept is not None:
            kept.unlink()  # of the file as it still is; a server that is restarted again and again would fill the disk
        raise


def _keep(file: SqliteFile, version: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    target = file.path.parent / "backups" / f"{file.path.stem}-{version}-{stamp}.db"
    try:
        target.parent.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageUnavailable(str(target.parent), reason=f"{error.strerror}.") from error
    copy(file, target)
    return target


def copy(file: SqliteFile, target: Path) -> None:
    """A whole copy of what is committed now, also while others write. It is one file, readable by its owner only.

    Raises: StorageUnavailable, NotFound where its folder does not exist, and Conflict where `target` does; nothing is
    left then.
    """
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        _check_place(target)
        try:
            _copy_into(file, partial)
            _name(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageUnavailable(str(target), reason=f"{error.strerror}.") from error
    except sqlite3.Error as error:
        meaning = SqliteFile(target).meaning(error)
        raise meaning from error


def _copy_into(file: SqliteFile, partial: Path) -> None:
    os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    with closing(file.connect()) as source, closing(sqlite3.connect(partial, isolation_level=None)) as made:
        source.backup(made)  # in one step: of one moment, and writers do not wait for it
        made.execute("PRAGMA journal_mode=DELETE").fetchall()  # one file, without a log beside it
    with partial.open("rb") as written:
        os.fsync(written.fileno())


def _name(partial: Path, target: Path) -> None:
    """As a link and not a renaming: that would go over what another has put there meanwhile."""
    try:
        os.link(partial, target)
    except FileExistsError as error:
        raise _exists(target) from error


def _check_place(target: Path) -> None:
    """No folder is made on the way: one that is missing is a typing error, or a disk that is not mounted.

    Raises: NotFound, Conflict, OSError.
    """
    if target.is_dir():
        raise Conflict(f"{target} is a folder. Name a file in it that does not exist yet.")
    if target.exists() or target.is_symlink():
        raise _exists(target)
    if not target.parent.exists():
        raise NotFound(f"There is no folder {target.parent}. Make it first, or mount what belongs there.")
    if not target.parent.is_dir():
        raise NotFound(f"{target.parent} is not a folder. Choose another place.")


def _exists(target: Path) -> Conflict:
    return Conflict(f"{target} exists already. Choose another name, or remove it first.")

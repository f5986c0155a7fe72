"""A SQLite file: how its connections are set up, whether it is still the same file, and what its errors mean."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from nimbos.db.schema import READ_VERSION
from nimbos.errors import Conflict, InvalidRequest, StorageUnavailable

LOCK_PATIENCE_S = 5.0
_CACHE_KIB = 8 * 1024
_CACHED_STATEMENTS = 512
_WAL_KEPT_BYTES = 64 * 2**20  # of a log that grew under a long read

_REASONS = {
    sqlite3.SQLITE_FULL: "the disk is full. Free some space; the service then goes on by itself.",
    sqlite3.SQLITE_READONLY: "it is read-only. Make the file and its folder writable.",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened. Check that its folder is there and writable.",
    sqlite3.SQLITE_IOERR: "reading or writing the disk failed.",
    sqlite3.SQLITE_CORRUPT: "the file is damaged. Restore a backup.",
    sqlite3.SQLITE_NOTADB: "the file is not a SQLite database.",
    sqlite3.SQLITE_NOMEM: "there is no memory left.",
    sqlite3.SQLITE_PERM: "access to the file is not allowed.",
    sqlite3.SQLITE_AUTH: "access to the file is not allowed.",
    sqlite3.SQLITE_PROTOCOL: "another program holds its lock.",
}
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_GONE = "the file is gone. Put it back, or restore a backup and start the server again."
_REPLACED = "another file is in its place. Put the first one back, or start the server again to use the new one."


class SqliteFile:
    def __init__(
        self,
        path: Path,
        *,
        lock_patience_s: float = LOCK_PATIENCE_S,
        connection_class: type[sqlite3.Connection] = sqlite3.Connection,
    ) -> None:
        self.path = path
        self._path = str(path)
        self._connection_class = connection_class
        self._identity: tuple[int, int] | None = None  # device and inode, once known
        self.lock_patience_s = lock_patience_s

    def check_place(self) -> None:
        """That the path still names the file that was opened first. With another one there, SQLite would apply the log
        of the first to it, so nothing may be read or written until the first is back.

        Raises: StorageUnavailable.
        """
        try:
            found = os.stat(self._path)  # noqa: PTH116 - before every commit: a Path costs three times as much
        except OSError as error:
            reason = _GONE if isinstance(error, FileNotFoundError) else f"{error.strerror}."
            raise StorageUnavailable(self._path, reason=reason) from error
        identity = found.st_dev, found.st_ino
        if self._identity is None:
            self._identity = identity
        elif self._identity != identity:
            raise StorageUnavailable(self._path, reason=_REPLACED)

    def create(self) -> None:
        """Makes an empty file that only its owner can read, if there is none."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise StorageUnavailable(str(self.path), reason=f"{error.strerror}.") from error

    def connect(self, *, patience_s: float | None = None) -> sqlite3.Connection:
        """A connection that any thread may use, one at a time; the caller closes it. Never makes a file.

        Raises: StorageUnavailable.
        """
        self.check_place()
        try:
            connection = sqlite3.connect(
                f"file:{quote(str(self.path))}?mode=rw",
                uri=True,
                timeout=self.lock_patience_s if patience_s is None else patience_s,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=_CACHED_STATEMENTS,
                factory=self._connection_class,
            )
        except sqlite3.Error as error:
            raise self.meaning(error) from error
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode=WAL").fetchall()
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            connection.execute(f"PRAGMA journal_size_limit={_WAL_KEPT_BYTES}").fetchall()
        except sqlite3.Error as error:
            connection.close()
            raise self.meaning(error) from error
        return connection

    def version(self, connection: sqlite3.Connection) -> str | None:
        """Of the tables in the file; None where there are none.

        Raises: StorageUnavailable, also for a database that holds other tables.
        """
        try:
            names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not names:
                return None
            row = connection.execute(READ_VERSION).fetchone()
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR:  # no such table
                reason = "the file is a database of another program."
                raise StorageUnavailable(str(self.path), reason=reason) from error
            raise self.meaning(error) from error
        return str(row[0]) if row else "unknown"

    def meaning(self, error: Exception) -> Exception:
        """What to raise for the driver's error; itself, when it is a bug of ours."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _LOCKED:
            reason = f"another program has locked it for more than {self.lock_patience_s:.0f} s. End that program."
            return StorageUnavailable(str(self.path), reason=reason)
        if code in _REASONS:
            return StorageUnavailable(str(self.path), reason=_REASONS[code])
        if isinstance(error, sqlite3.IntegrityError):
            return Conflict("There is a row already that does not allow this one.")
        if isinstance(error, sqlite3.DataError | OverflowError | UnicodeEncodeError):
            return InvalidRequest("A value cannot be stored: too large, or a text with half a character.")
        return error

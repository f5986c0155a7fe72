"""A SQLite file: how its connections are set up, whether it is still the same file, and what its errors mean."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from nimbos.errors import Conflict, InvalidRequest, StorageUnavailable

LOCK_PATIENCE_S = 5.0
_CACHE_KIB = 8 * 1024
_CACHED_STATEMENTS = 512

_REASONS = {
    sqlite3.SQLITE_FULL: "the disk is full. Free some space; the service then goes on by itself.",
    sqlite3.SQLITE_READONLY: "it is read-only. Make the file and its folder writable.",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened. Check that its folder exists and is writable.",
    sqlite3.SQLITE_IOERR: "reading or writing the disk failed.",
    sqlite3.SQLITE_CORRUPT: "the file is damaged. Restore a backup.",
    sqlite3.SQLITE_NOTADB: "the file is not a SQLite database.",
    sqlite3.SQLITE_NOMEM: "there is no memory left.",
    sqlite3.SQLITE_PERM: "access to the file is not allowed.",
    sqlite3.SQLITE_PROTOCOL: "another program holds its lock.",
}
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class SqliteFile:
    def __init__(self, path: Path, *, lock_patience_s: float = LOCK_PATIENCE_S) -> None:
        self.path = path
        self._lock_patience_s = lock_patience_s

    def connect(self, *, read_only: bool = False) -> sqlite3.Connection:
        """A connection that any thread may use, one at a time; the caller closes it.

        Raises: StorageUnavailable.
        """
        try:
            if not read_only:
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            connection = sqlite3.connect(
                self.path,
                timeout=self._lock_patience_s,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=_CACHED_STATEMENTS,
            )
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode=WAL").fetchall()
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            if read_only:
                connection.execute("PRAGMA query_only=1")
        except sqlite3.Error as error:
            raise self.meaning(error) from error
        except OSError as error:
            raise StorageUnavailable(str(self.path), reason=f"{error.strerror}.") from error
        return connection

    def meaning(self, error: sqlite3.Error) -> Exception:
        """What to raise for the driver's error; itself, when it is a bug of ours."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _LOCKED:
            patience = f"{self._lock_patience_s:.0f} s"
            return StorageUnavailable(
                str(self.path), reason=f"another program has locked it for more than {patience}. End that program."
            )
        if code in _REASONS:
            return StorageUnavailable(str(self.path), reason=_REASONS[code])
        if isinstance(error, sqlite3.IntegrityError):
            return Conflict("There is a row already that does not allow this one.")
        if isinstance(error, sqlite3.DataError):
            return InvalidRequest("A value is too large to be stored.")
        return error

"""Storage that goes away and comes back: a SQLite file that another program locks for a while."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

from nimbos.db import Database
from nimbos.db.database import FILE_NAME
from nimbos.db.sqlite import SqliteStore
from nimbos.db.sqlite_file import SqliteFile


@asynccontextmanager
async def impatient(home: Path) -> AsyncIterator[Database]:
    """A database that waits for locks only briefly."""
    opened = Database(await SqliteStore.open(SqliteFile(home / FILE_NAME, lock_patience_s=0.02)), dialect="sqlite")
    try:
        yield opened
    finally:
        await opened.close()


@contextmanager
def away(home: Path) -> Iterator[None]:
    """Nothing can be written meanwhile."""
    with closing(sqlite3.connect(home / FILE_NAME, isolation_level=None, timeout=60)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")

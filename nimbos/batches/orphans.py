"""Contents of files that have no row: of a server that died between the two, or whose removal was lost.

A content that has no row may be about to get one, however unlikely that is after a day: the file's id, with which its
content begins, is taken first, by a row that is nobody's file. Whoever comes with the row then is refused it, as ids
are unique, and nobody names what is removed. That is a week later: an older copy of the database that is put in place
knows no files that are newer, and whoever puts the right one back finds them all.

What is older than this database was never its own: a folder of contents may have served another one before.

Other contents are not looked at: segments of responses have rows before they have bytes and are swept by these
(`nimbos/responses/segments.py`); those of processes and programs stay.
"""

from __future__ import annotations

import re
import time

from sqlalchemy import Text, bindparam, delete, func, select

from nimbos.batches.contents import Contents
from nimbos.db import Database, Statement, Transaction, insert, upsert
from nimbos.db.tables.accounts import users
from nimbos.db.tables.batches import file_totals, files
from nimbos.errors import Conflict

LEAST_AGE_S = 24 * 3600.0
GRACE_S = 7 * 24 * 3600.0
NOBODY = ""
_UPLOAD_MOST_MS = 7 * 24 * 3600 * 1000  # between a file's id and the last of its bytes
_CLOCKS_MS = 3_600_000  # of another machine
_TAKEN_MS = 30 * 24 * 3600 * 1000  # then the row that takes the id goes, as files do whose time is over
_HEAD = re.compile(rb"(file_([0-9a-f]{12})[0-9a-f]{20})\n")
HEAD_BYTES = 38

_GET = Statement(select(files.c.project, files.c.created_ms).where(files.c.id == bindparam("id", type_=Text)))
_TAKE = insert(files)
_GIVE_BACK = Statement(
    delete(files).where(files.c.id == bindparam("of", type_=Text), files.c.project == NOBODY).returning(files.c.id)
)
_BORN = Statement(select(func.min(users.c.created_ms).label("born_ms")))  # the owner comes with the database
_COUNT = upsert(file_totals, key=("project",), add=("size_bytes", "files"))


class Orphans:
    def __init__(self, database: Database, contents: Contents) -> None:
        self._database = database
        self._contents = contents

    async def sweep(self, *, least_age_s: float = LEAST_AGE_S, grace_s: float = GRACE_S) -> int:
        """Takes the ids of those that have been there for so long, and removes those whose id was taken before the
        grace; how many. Raises: StorageUnavailable."""
        removed = 0
        (row,) = await self._database.read(_BORN())
        born_ms = row["born_ms"] or 0
        before_ms = _now_ms() - int(least_age_s * 1000)
        async for found in self._contents.aged(before_ms=before_ms, head_bytes=HEAD_BYTES):
            file_id = file_of(found.head, found.stored_ms)
            if file_id is None or begun_ms(file_id) < born_ms - _CLOCKS_MS or await self._named(file_id):
                continue
            taken_ms = await self._taken(file_id, found.hash)
            if taken_ms is not None and taken_ms <= _now_ms() - int(grace_s * 1000):
                await self._contents.remove(found.hash)
                removed += 1
        return removed

    async def _taken(self, file_id: str, blob: str) -> int | None:
        """Since when, None if somebody else has it."""
        try:
            return await self._database.run(lambda: _take(file_id, blob), durable=True)
        except Conflict:  # whoever has stored it was faster
            return None

    async def _named(self, file_id: str) -> bool:
        """Nearly all are, so the rest is looked at twice."""
        rows = await self._database.read(_GET(id=file_id))
        return bool(rows) and rows[0]["project"] != NOBODY


def file_of(head: bytes, stored_ms: int) -> str | None:
    """The file whose content begins so, if one can: ids begin with their time."""
    match = _HEAD.fullmatch(head)
    if match is None or not -_CLOCKS_MS <= stored_ms - int(match[2], 16) <= _UPLOAD_MOST_MS:
        return None
    return match[1].decode()


def begun_ms(file_id: str) -> int:
    return int(file_id.removeprefix("file_")[:12], 16)


def given_back(file_id: str) -> Transaction[None]:
    """An id that was taken, to whoever has just stored its content and is about to write its row."""
    if (yield _GIVE_BACK(of=file_id)):
        yield _COUNT(project=NOBODY, size_bytes=0, files=-1)


def _take(file_id: str, blob: str) -> Transaction[int | None]:
    """The id is nobody's file from now on, or has been for a while; None where it is somebody's."""
    rows = yield _GET(id=file_id)
    if rows:
        return int(rows[0]["created_ms"]) if rows[0]["project"] == NOBODY else None
    now_ms = _now_ms()
    yield _TAKE(
        id=file_id,
        project=NOBODY,
        key="",
        purpose="",
        filename="",
        size_bytes=0,
        blob=blob,
        created_ms=now_ms,
        expires_ms=now_ms + _TAKEN_MS,
    )
    yield _COUNT(project=NOBODY, size_bytes=0, files=1)
    return now_ms


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

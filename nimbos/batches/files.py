"""Files that clients keep here: their rows, their contents in `blobs`, and a quota for each project.

A file whose time is over is not found any more, and swept away later. One that a running batch reads is refused its
deletion, and outlives its time until the batch is over.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from sqlalchemy import BigInteger, Integer, Text, and_, bindparam, delete, or_, select
from sqlalchemy.sql.elements import ColumnElement

from nimbos.batches.contents import Contents, Received
from nimbos.batches.words import OVER, File, State, file_of
from nimbos.config import BatchSettings
from nimbos.db import Database, Statement, Transaction, insert, upsert
from nimbos.db.tables.batches import batches, file_totals, files
from nimbos.errors import Conflict, NimbosError, NotFound, PayloadTooLarge, StorageUnavailable
from nimbos.types import Account, new_id

_SWEPT_AT_ONCE = 100


class Files:
    def __init__(self, database: Database, contents: Contents, settings: BatchSettings) -> None:
        self._database = database
        self._contents = contents
        self._settings = settings

    async def receive(self, pieces: AsyncIterator[bytes], *, limit_bytes: int | None = None) -> Received:
        """Stores what comes, without holding it in memory; `keep` it or `forget` it. `limit_bytes`: the setting's
        where None. Raises: PayloadTooLarge, and nothing is stored then."""
        limit = self._settings.file_bytes if limit_bytes is None else limit_bytes
        return await self._contents.store(new_id("file"), pieces, limit_bytes=limit)

    async def keep(
        self, account: Account, received: Received, *, filename: str, purpose: str, expires_s: int | None = None
    ) -> File:
        """Raises: PayloadTooLarge, Conflict where the project's files together are too many; forget it then."""
        file = made(account, received, filename=filename, purpose=purpose, expires_s=expires_s)
        await self._database.run(lambda: self.record(account, file, within_quota=True), durable=True)
        return file

    async def forget(self, received: Received, *, after: NimbosError) -> None:
        """What was received and not kept, because of `after`. Where that leaves in doubt whether its row is there, a
        content without a row is better than a row without its content."""
        if not (isinstance(after, StorageUnavailable) and after.in_doubt):
            await self._contents.remove(received.blob)

    def record(self, account: Account, file: File, *, within_quota: bool) -> Transaction[None]:
        """A file's row. What a batch brought about is kept also beyond the quota: it was paid for."""
        yield _ADD(
            id=file.id,
            project=file.project,
            key=account.key,
            purpose=file.purpose,
            filename=file.filename,
            size_bytes=file.size_bytes,
            blob=file.blob,
            created_ms=file.created_ms,
            expires_ms=file.expires_ms,
        )
        yield from self.charge(file.project, size_bytes=file.size_bytes, files=1, within_quota=within_quota)

    def charge(self, project: str, *, size_bytes: int, files: int, within_quota: bool) -> Transaction[None]:
        """So much more, or less, of the project's quota; a part of an upload is a file, too, as even an empty one has
        its place on the disk. Raises: PayloadTooLarge, Conflict."""
        yield _COUNT(project=project, size_bytes=size_bytes, files=files)
        (row,) = yield _TOTAL(project=project)
        if within_quota and row["size_bytes"] > self._settings.project_bytes:
            raise PayloadTooLarge(have=row["size_bytes"], limit=self._settings.project_bytes, what="project's files")
        if within_quota and row["files"] > self._settings.project_files:
            most = self._settings.project_files
            raise Conflict(f"The project may have {most:,} files, parts of uploads included. Delete some first.")

    async def get(self, project: str, file_id: str) -> File:
        """Raises: NotFound, also for another project's file and for one whose time is over."""
        rows = await self._database.read(_GET(project=project, id=file_id, now_ms=_now_ms()))
        if not rows:
            raise missing(file_id)
        return file_of(rows[0])

    async def list(self, project: str, *, after: str, limit: int, newest_first: bool, purpose: str) -> list[File]:
        """`after`: the id of the last one of the page before, "" for the first page. `purpose`: "" for all."""
        query = _LIST_DOWN if newest_first else _LIST_UP
        rows = await self._database.read(
            query(project=project, after=after, limit=limit, purpose=purpose, now_ms=_now_ms())
        )
        return [file_of(row) for row in rows]

    def read(self, file: File, *, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        return self._contents.read(file.id, file.blob, start=start, end=end)

    async def delete(self, project: str, file_id: str) -> None:
        """Raises: NotFound; Conflict while a batch reads it."""
        blob = await self._database.run(lambda: self._delete(project, file_id), durable=True)
        await self._contents.remove(blob)

    async def sweep(self) -> int:
        """Deletes files whose time is over; how many."""
        rows = await self._database.read(_LAPSED(now_ms=_now_ms(), limit=_SWEPT_AT_ONCE))
        for row in rows:
            project, file_id = row["project"], row["id"]
            try:
                await self.delete(project, file_id)
            except (Conflict, NotFound):
                continue  # a batch, or another server, was faster
        return len(rows)

    async def size_bytes(self, file_id: str) -> int:
        """Of any project's file, also one whose time is over; 0 where there is none."""
        rows = await self._database.read(_SIZE(id=file_id))
        return int(rows[0]["size_bytes"]) if rows else 0

    def lock(self, project: str, file_id: str) -> Transaction[bool]:
        """Whether it is there; if so, it stays until the transaction ends."""
        rows = yield _FIND(project=project, id=file_id)
        return bool(rows)

    def lock_all(self, project: str) -> Transaction[None]:
        """Until the transaction ends, no other counts what this project has."""
        yield _LOCK_TOTAL(project=project)

    def _delete(self, project: str, file_id: str) -> Transaction[str]:
        rows = yield _FIND(project=project, id=file_id)
        if not rows:
            raise missing(file_id)
        using = yield _USING(file=file_id)
        if using:
            raise Conflict(
                f"The file {file_id} is being read by the batch {using[0]['id']}. Cancel it, or wait until it is over."
            )
        yield _DELETE(id=file_id)
        yield _COUNT(project=project, size_bytes=-rows[0]["size_bytes"], files=-1)
        return str(rows[0]["blob"])


def made(account: Account, received: Received, *, filename: str, purpose: str, expires_s: int | None) -> File:
    """A file that is not recorded yet."""
    now_ms = _now_ms()
    return File(
        id=received.file_id,
        project=account.id,
        purpose=purpose,
        filename=filename,
        size_bytes=received.size_bytes,
        blob=received.blob,
        created_ms=now_ms,
        expires_ms=now_ms + expires_s * 1000 if expires_s is not None else None,
    )


def missing(file_id: str) -> NotFound:
    return NotFound(f"There is no file {file_id[:100]!r} in this project.", param="file_id")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _is(name: str) -> ColumnElement[bool]:
    return files.c[name] == bindparam(name, type_=files.c[name].type)


def _in_time() -> ColumnElement[bool]:
    return or_(files.c.expires_ms.is_(None), files.c.expires_ms > bindparam("now_ms", type_=BigInteger))


def _page(*, newest_first: bool) -> Statement:
    after = bindparam("after", type_=Text)
    beyond = files.c.id < after if newest_first else files.c.id > after
    purpose = bindparam("purpose", type_=Text)
    return Statement(
        select(files)
        .where(_is("project"), or_(after == "", beyond), or_(purpose == "", files.c.purpose == purpose), _in_time())
        .order_by(files.c.id.desc() if newest_first else files.c.id)
        .limit(bindparam("limit", type_=Integer))
    )


_ADD = insert(files)
_COUNT = upsert(file_totals, key=("project",), add=("size_bytes", "files"))
_TOTAL = Statement(select(file_totals).where(file_totals.c.project == bindparam("project", type_=Text)))
_LOCK_TOTAL = Statement(
    select(file_totals.c.project).where(file_totals.c.project == bindparam("project", type_=Text)).with_for_update()
)
_GET = Statement(select(files).where(_is("project"), _is("id"), _in_time()))
_FIND = Statement(select(files).where(_is("project"), _is("id")).with_for_update())
_SIZE = Statement(select(files.c.size_bytes).where(_is("id")))
_LIST_DOWN = _page(newest_first=True)
_LIST_UP = _page(newest_first=False)
_DELETE = Statement(delete(files).where(_is("id")))
_READING = and_(*[batches.c.state != state.value for state in State if state in OVER])
_USING = Statement(select(batches.c.id).where(batches.c.input_file == bindparam("file", type_=Text), _READING).limit(1))
_LAPSED = Statement(
    select(files.c.id, files.c.project)
    .where(
        files.c.expires_ms <= bindparam("now_ms", type_=BigInteger),
        files.c.id.not_in(select(batches.c.input_file).where(_READING)),
    )
    .limit(bindparam("limit", type_=Integer))
)

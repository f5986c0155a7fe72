"""Uploads: files that come in parts, within an hour. Each part is a content of its own; one file is made of them.

A part begins as a file's content does (`contents.py`), with an id that no file gets, so what a server that died leaves
of it is swept as any content without a row (`orphans.py`). Its bytes count in the project's quota until the file takes
its place.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import StrEnum

import structlog
from sqlalchemy import BigInteger, Integer, Text, bindparam, delete, func, select, update

from nimbos.batches.contents import Contents, Received
from nimbos.batches.files import Files, made
from nimbos.batches.words import File
from nimbos.config import BatchSettings
from nimbos.db import Database, Row, Statement, Transaction, insert
from nimbos.db.tables.batches import upload_parts, uploads
from nimbos.errors import Conflict, InvalidRequest, NimbosError, NotFound, PayloadTooLarge, StorageUnavailable
from nimbos.types import Account, new_id

LIFE_S = 3_600
PART_BYTES_MAX = 64 * 1024 * 1024
PARTS_MAX = 10_000
_SWEPT_AT_ONCE = 100

_log = structlog.get_logger(__name__)


class UploadState(StrEnum):
    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """`size_bytes`: as its client has announced them. `file`: the id, once it is completed."""

    id: str
    project: str
    purpose: str
    filename: str
    size_bytes: int
    file_expires_s: int | None
    state: UploadState
    created_ms: int
    expires_ms: int
    file: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    id: str
    upload: str
    size_bytes: int
    blob: str
    created_ms: int

    @property
    def content(self) -> str:
        """What its content begins with."""
        return f"file_{self.id.removeprefix('part_')}"


class Uploads:
    """An upload whose hour is over is not found any more, and swept away with its parts."""

    def __init__(self, database: Database, contents: Contents, files: Files, settings: BatchSettings) -> None:
        self._database = database
        self._contents = contents
        self._files = files
        self._settings = settings

    async def create(
        self, account: Account, *, filename: str, purpose: str, size_bytes: int, file_expires_s: int | None
    ) -> Upload:
        """Raises: PayloadTooLarge for what no file may have."""
        if size_bytes > self._settings.file_bytes:
            raise PayloadTooLarge(have=size_bytes, limit=self._settings.file_bytes, what="file")
        now_ms = _now_ms()
        upload = Upload(
            id=new_id("upload"),
            project=account.id,
            purpose=purpose,
            filename=filename,
            size_bytes=size_bytes,
            file_expires_s=file_expires_s,
            state=UploadState.PENDING,
            created_ms=now_ms,
            expires_ms=now_ms + LIFE_S * 1000,
            file=None,
        )
        await self._database.run(lambda: _added(upload), durable=True)
        return upload

    async def receive(self, project: str, upload_id: str, pieces: AsyncIterator[bytes]) -> Received:
        """A part's bytes, which are not held in memory; `add` them or `forget` them.

        Raises: NotFound, Conflict when the upload is over, PayloadTooLarge; nothing is stored then.
        """
        _check_pending(await self._get(project, upload_id))
        limit_bytes = min(PART_BYTES_MAX, self._settings.file_bytes)
        return await self._contents.store(new_id("file"), pieces, limit_bytes=limit_bytes)

    async def add(self, project: str, upload_id: str, received: Received) -> Part:
        """Raises: NotFound, Conflict, PayloadTooLarge where the project's files are too large together."""
        part = Part(
            id=f"part_{received.file_id.removeprefix('file_')}",
            upload=upload_id,
            size_bytes=received.size_bytes,
            blob=received.blob,
            created_ms=_now_ms(),
        )

        def begin() -> Transaction[None]:
            _check_pending((yield from _locked(project, upload_id)))
            (row,) = yield _COUNT_PARTS(upload=upload_id)
            if row["parts"] >= PARTS_MAX:
                raise Conflict(f"An upload may have {PARTS_MAX:,} parts; {upload_id} has them. Send larger ones.")
            yield _ADD_PART(**{name: getattr(part, name) for name in Part.__dataclass_fields__})
            yield from self._files.charge(project, size_bytes=part.size_bytes, files=1, within_quota=True)

        await self._database.run(begin, durable=True)
        return part

    async def forget(self, received: Received, *, after: NimbosError) -> None:
        await self._files.forget(received, after=after)

    async def complete(
        self, account: Account, upload_id: str, part_ids: Sequence[str], *, md5: str | None = None
    ) -> tuple[Upload, File]:
        """One file of the parts, in this order; other parts are dropped. Of an upload that is completed its file, as a
        client may not have got the first answer.

        Raises: NotFound; Conflict for one that was cancelled; InvalidRequest where the parts are not as announced.
        """
        upload = await self._get(account.id, upload_id)
        if upload.state is UploadState.COMPLETED and upload.file is not None:
            return upload, await self._files.get(account.id, upload.file)
        _check_pending(upload)
        parts = _chosen(upload, await self._parts(upload_id), part_ids)
        digest = hashlib.md5(usedforsecurity=False)
        try:
            async with aclosing(self._joined(parts, digest)) as pieces:
                received = await self._contents.store(new_id("file"), pieces, limit_bytes=upload.size_bytes)
        except NotFound as error:  # a part went while it was read
            raise Conflict(f"The upload {upload_id} came to its end meanwhile.") from error
        try:
            if md5 is not None and md5.strip().lower() != digest.hexdigest():
                raise InvalidRequest("The parts together have another MD5 than `md5` says.", param="md5")
            file, dropped = await self._finish(account, upload, received)
        except NimbosError as error:
            await self._files.forget(received, after=error)
            raise
        await self._remove(dropped)
        return replace(upload, state=UploadState.COMPLETED, file=file.id), file

    async def cancel(self, project: str, upload_id: str) -> Upload:
        """Its parts are dropped. Cancelling twice is no error. Raises: NotFound; Conflict when it is completed."""

        def begin() -> Transaction[tuple[Upload, list[Part]]]:
            upload = yield from _locked(project, upload_id)
            if upload.state is UploadState.CANCELLED:
                return upload, []
            _check_pending(upload)
            dropped = yield from self._dropped(upload)
            yield _END(id=upload_id, state=UploadState.CANCELLED.value, file=None)
            return replace(upload, state=UploadState.CANCELLED), dropped

        cancelled, parts = await self._database.run(begin, durable=True)
        await self._remove(parts)
        return cancelled

    async def sweep(self) -> int:
        """Forgets uploads whose hour is over; how many."""
        rows = await self._database.read(_LAPSED(now_ms=_now_ms(), limit=_SWEPT_AT_ONCE))
        for row in rows:
            upload = _upload_of(row)

            def begin(upload: Upload = upload) -> Transaction[list[Part]]:
                if not (yield _LOCK(project=upload.project, id=upload.id)):
                    return []  # another server was faster
                dropped = yield from self._dropped(upload)
                yield _FORGET(id=upload.id)
                return dropped

            await self._remove(await self._database.run(begin, durable=True))
        return len(rows)

    async def _get(self, project: str, upload_id: str) -> Upload:
        rows = await self._database.read(_GET(project=project, id=upload_id))
        return _in_time(rows, upload_id)

    async def _parts(self, upload_id: str) -> list[Part]:
        return [_part_of(row) for row in await self._database.read(_PARTS(upload=upload_id))]

    async def _joined(self, parts: Sequence[Part], digest: hashlib._Hash) -> AsyncGenerator[bytes, None]:
        """The contents of the parts, one after the other; `digest` has them all in the end."""
        for part in parts:
            async with aclosing(self._contents.read(part.content, part.blob)) as pieces:
                async for piece in pieces:
                    digest.update(piece)
                    yield piece

    async def _finish(self, account: Account, upload: Upload, received: Received) -> tuple[File, list[Part]]:
        file = made(
            account, received, filename=upload.filename, purpose=upload.purpose, expires_s=upload.file_expires_s
        )

        def begin() -> Transaction[list[Part]]:
            _check_pending((yield from _locked(account.id, upload.id)))
            dropped = yield from self._dropped(upload)
            yield from self._files.record(account, file, within_quota=True)
            yield _END(id=upload.id, state=UploadState.COMPLETED.value, file=file.id)
            return dropped

        return file, await self._database.run(begin, durable=True)

    def _dropped(self, upload: Upload) -> Transaction[list[Part]]:
        """All its parts, which have no rows any more; their contents are to be removed when that is durable."""
        parts = [_part_of(row) for row in (yield _PARTS(upload=upload.id))]
        if parts:
            yield _DROP_PARTS(upload=upload.id)
            freed = sum(part.size_bytes for part in parts)
            yield from self._files.charge(upload.project, size_bytes=-freed, files=-len(parts), within_quota=False)
        return parts

    async def _remove(self, parts: Sequence[Part]) -> None:
        """What has no rows any more. Where the storage does not let it, the sweep of orphans does it later."""
        try:
            for part in parts:
                await self._contents.remove(part.blob)
        except StorageUnavailable as error:
            _log.warning("uploads.parts_left", parts=len(parts), reason=error.reason)


def _chosen(upload: Upload, parts: Sequence[Part], part_ids: Sequence[str]) -> list[Part]:
    """Raises: InvalidRequest."""
    known = {part.id: part for part in parts}
    for part_id in part_ids:
        if part_id not in known:
            raise InvalidRequest(f"The upload has no part {part_id[:100]!r}.", param="part_ids")
    if len(set(part_ids)) < len(part_ids):
        raise InvalidRequest("`part_ids` names a part twice.", param="part_ids")
    chosen = [known[part_id] for part_id in part_ids]
    have = sum(part.size_bytes for part in chosen)
    if have != upload.size_bytes:
        raise InvalidRequest(
            f"The parts have {have} bytes together, and the upload was made for {upload.size_bytes}.", param="part_ids"
        )
    return chosen


def _check_pending(upload: Upload) -> None:
    if upload.state is not UploadState.PENDING:
        raise Conflict(f"The upload {upload.id} is {upload.state.value}; nothing can be added to it any more.")


def _locked(project: str, upload_id: str) -> Transaction[Upload]:
    return _in_time((yield _LOCK(project=project, id=upload_id)), upload_id)


def _in_time(rows: Sequence[Row], upload_id: str) -> Upload:
    if not rows or rows[0]["expires_ms"] <= _now_ms():
        raise NotFound(f"There is no upload {upload_id[:100]!r} in this project, or its hour is over.")
    return _upload_of(rows[0])


def _added(upload: Upload) -> Transaction[None]:
    values = {name: getattr(upload, name) for name in Upload.__dataclass_fields__}
    yield _ADD(**{**values, "state": upload.state.value})


def _upload_of(row: Row) -> Upload:
    fields = {name: row[name] for name in Upload.__dataclass_fields__}
    return Upload(**{**fields, "state": UploadState(row["state"])})


def _part_of(row: Row) -> Part:
    return Part(**{name: row[name] for name in Part.__dataclass_fields__})


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


_ID = uploads.c.id == bindparam("id", type_=Text)
_OWN = (_ID, uploads.c.project == bindparam("project", type_=Text))
_OF = upload_parts.c.upload == bindparam("upload", type_=Text)
_ADD = insert(uploads)
_ADD_PART = insert(upload_parts)
_GET = Statement(select(uploads).where(*_OWN))
_LOCK = Statement(select(uploads).where(*_OWN).with_for_update())
_PARTS = Statement(select(upload_parts).where(_OF).order_by(upload_parts.c.id))
_COUNT_PARTS = Statement(select(func.count().label("parts")).where(_OF))
_DROP_PARTS = Statement(delete(upload_parts).where(_OF))
_END = Statement(
    update(uploads).where(_ID).values(state=bindparam("state", type_=Text), file=bindparam("file", type_=Text))
)
_FORGET = Statement(delete(uploads).where(_ID))
_LAPSED = Statement(
    select(uploads)
    .where(uploads.c.expires_ms <= bindparam("now_ms", type_=BigInteger))
    .order_by(uploads.c.expires_ms)
    .limit(bindparam("limit", type_=Integer))
)

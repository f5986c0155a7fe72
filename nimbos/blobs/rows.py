"""Contents as rows: one place less to copy, and the same for several servers on one PostgreSQL."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from sqlalchemy import Integer, and_, bindparam, delete, func, select

from nimbos.blobs.content import (
    PIECE_BYTES,
    READ_BYTES,
    Aged,
    Stored,
    check_content,
    check_name,
    hash_of,
    in_pieces,
    not_found,
)
from nimbos.db import Database, Statement, Transaction, insert, insert_ignored
from nimbos.db.tables.blobs import blob_pieces, blob_uploads, blobs
from nimbos.types import new_id

_LEFT_BEHIND_MS = 24 * 3600 * 1000  # an upload that old is of a program that died

_AGED_AT_ONCE = 100

_ADD_UPLOAD = insert(blob_uploads)
_ADD_PIECE = insert(blob_pieces)
_ADD_BLOB = insert_ignored(blobs, key=("hash",))
_END_UPLOAD = Statement(delete(blob_uploads).where(blob_uploads.c.id == bindparam("upload")))
_OLD_UPLOADS = Statement(select(blob_uploads.c.id).where(blob_uploads.c.started_ms < bindparam("before_ms")).limit(100))
_FIND = Statement(select(blobs.c.upload, blobs.c.size_bytes).where(blobs.c.hash == bindparam("name")))
_REMOVE = Statement(delete(blobs).where(blobs.c.hash == bindparam("name")).returning(blobs.c.upload))
_REMOVE_PIECES = Statement(delete(blob_pieces).where(blob_pieces.c.upload == bindparam("of")))
_PART = Statement(
    select(func.substr(blob_pieces.c.content, bindparam("first"), bindparam("count")).label("part")).where(
        blob_pieces.c.upload == bindparam("of"), blob_pieces.c.number == bindparam("at")
    )
)
_AGED = Statement(
    select(
        blobs.c.hash, blobs.c.created_ms, func.substr(blob_pieces.c.content, 1, bindparam("head_bytes")).label("head")
    )
    .join(blob_pieces, and_(blob_pieces.c.upload == blobs.c.upload, blob_pieces.c.number == 0))
    .where(blobs.c.created_ms < bindparam("before_ms"), blobs.c.hash > bindparam("after"))
    .order_by(blobs.c.hash)
    .limit(bindparam("most", type_=Integer))
)


class DatabaseBlobs:
    """A content is there when its row in `blobs` is, which is written after the last of its pieces."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, content: bytes) -> str:
        hash = hash_of(content)
        if not await self._database.read(_FIND(name=hash)):
            await self.put_stream(_once(content), limit_bytes=len(content))
        return hash

    async def put_stream(self, pieces: AsyncIterator[bytes], *, limit_bytes: int) -> Stored:
        upload, digest, size_bytes, number = new_id("upl"), hashlib.sha256(), 0, 0
        await self._database.run(lambda: _begin(upload))
        try:
            async with aclosing(in_pieces(pieces, limit_bytes=limit_bytes)) as even:
                async for piece in even:
                    await self._database.run(lambda at=number, part=piece: _add(upload, at, part))  # type: ignore[misc]
                    digest.update(piece)
                    size_bytes += len(piece)
                    number += 1
            stored = Stored(digest.hexdigest(), size_bytes)
            await self._database.run(lambda: _keep(upload, stored), durable=True)
        except BaseException:
            await asyncio.shield(self._database.run(lambda: _drop(upload)))
            raise
        return stored

    async def get(self, hash: str) -> bytes:
        return b"".join([piece async for piece in self.read(hash, piece_bytes=PIECE_BYTES)])

    async def read(
        self, hash: str, *, start: int = 0, end: int | None = None, piece_bytes: int = READ_BYTES
    ) -> AsyncIterator[bytes]:
        rows = await self._database.read(_FIND(name=check_name(hash)))
        if not rows:
            raise not_found(hash)
        upload, size_bytes = rows[0]["upload"], rows[0]["size_bytes"]
        digest, position = hashlib.sha256(), start
        stop = size_bytes if end is None else min(end, size_bytes)
        while position < stop:
            number, inside = divmod(position, PIECE_BYTES)
            count = min(piece_bytes, stop - position, PIECE_BYTES - inside)
            found = await self._database.read(_PART(of=upload, at=number, first=inside + 1, count=count))
            if not found:
                if not await self.has(hash):  # removed while it was read
                    raise not_found(hash)
                break
            piece: bytes = found[0]["part"]
            digest.update(piece)
            position += len(piece)
            yield piece
        if position < stop or (start == 0 and stop == size_bytes):
            check_content(hash, digest)

    async def has(self, hash: str) -> bool:
        return bool(await self._database.read(_FIND(name=check_name(hash))))

    async def aged(self, *, before_ms: int, head_bytes: int) -> AsyncIterator[Aged]:
        after = ""
        while rows := await self._database.read(
            _AGED(before_ms=before_ms, head_bytes=head_bytes, after=after, most=_AGED_AT_ONCE)
        ):
            for row in rows:
                yield Aged(row["hash"], bytes(row["head"]), row["created_ms"])
            after = rows[-1]["hash"]

    async def remove(self, hash: str) -> None:
        check_name(hash)
        await self._database.run(lambda: _remove(hash))


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _begin(upload: str) -> Transaction[None]:
    now_ms = time.time_ns() // 1_000_000
    yield _ADD_UPLOAD(id=upload, started_ms=now_ms)
    for row in (yield _OLD_UPLOADS(before_ms=now_ms - _LEFT_BEHIND_MS)):
        yield from _drop(row["id"])


def _add(upload: str, number: int, content: bytes) -> Transaction[None]:
    yield _ADD_PIECE(upload=upload, number=number, content=content)


def _keep(upload: str, stored: Stored) -> Transaction[None]:
    """The pieces of a content that is there already are dropped."""
    now_ms = time.time_ns() // 1_000_000
    yield _ADD_BLOB(hash=stored.hash, upload=upload, size_bytes=stored.size_bytes, created_ms=now_ms)
    rows = yield _FIND(name=stored.hash)
    if rows[0]["upload"] == upload:
        yield _END_UPLOAD(upload=upload)
    else:
        yield from _drop(upload)


def _drop(upload: str) -> Transaction[None]:
    yield _REMOVE_PIECES(of=upload)
    yield _END_UPLOAD(upload=upload)


def _remove(hash: str) -> Transaction[None]:
    for row in (yield _REMOVE(name=hash)):
        yield _REMOVE_PIECES(of=row["upload"])

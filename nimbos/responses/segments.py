"""Segments: the bytes of what was said, each kept once for its account however many contexts hold it.

A segment's content begins with the account, so no account's segments are another's, and none is some file's content by
chance. Three steps keep one and three remove one:

    keep:   touch its row ─ put its bytes ─ name it, in the transaction that uses it (`named`), or begin again
    sweep:  mark a row that nothing names ─ remove its bytes ─ drop the row

A row is locked to be named and to be marked, so only one of the two happens; who touches a marked row waits until it is
dropped. The grace only saves putting bytes twice. Read `nodes.py` for what names segments.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec
from sqlalchemy import BigInteger, Executable, Integer, Text, and_, bindparam, delete, or_, select, update
from sqlalchemy import text as sql

from nimbos.blobs import Blobs, hash_of
from nimbos.db import Database, Dialect, Statement, Transaction
from nimbos.db.tables.responses import response_items as items
from nimbos.db.tables.responses import response_segments as segments
from nimbos.db.tables.responses import responses
from nimbos.errors import NotFound, StorageUnavailable

GRACE_MS = 60_000
_STALE_MS = 60_000  # a sweeper that took so long is dead
_PATIENCE_S = 10.0
_POLL_S = 0.05
_AT_ONCE = 16
_CACHE_BYTES = 16 << 20


class Swept(Exception):  # never leaves this package
    """A segment was removed before it was named: keep it again."""


class Segments:
    def __init__(self, database: Database, blobs: Blobs, *, grace_ms: int = GRACE_MS) -> None:
        self._database = database
        self._blobs = blobs
        self._grace_ms = grace_ms
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached_bytes = 0

    async def keep(self, account: str, contents: Sequence[bytes]) -> list[str]:
        """Their hashes, in order; the transaction that uses them names them.

        Raises: StorageUnavailable.
        """
        whole = [account.encode() + b"\n" + content for content in contents]
        named = {hash_of(content): content for content in whole}
        await self._touch(sorted(named))
        room = asyncio.Semaphore(_AT_ONCE)

        async def put(content: bytes) -> None:
            async with room:
                await self._blobs.put(content)

        await asyncio.gather(*(put(content) for content in named.values()))
        return [hash_of(content) for content in whole]

    async def load(self, account: str, hashes: Sequence[str]) -> list[bytes]:
        """Raises: NotFound for a segment that was removed meanwhile; StorageUnavailable."""
        room = asyncio.Semaphore(_AT_ONCE)

        async def get(hash: str) -> None:
            async with room:
                found[hash] = self._cached(hash) or self._remember(hash, await self._blobs.get(hash))

        found: dict[str, bytes] = {}
        await asyncio.gather(*(get(hash) for hash in dict.fromkeys(hashes)))
        start = account.encode() + b"\n"
        if not all(content.startswith(start) for content in found.values()):
            raise NotFound("There is no such segment.")
        return [found[hash][len(start) :] for hash in hashes]

    async def sweep(self, *, most: int = 100) -> int:
        """Removes the bytes of segments that nothing names; how many."""
        marked = await self._database.run(lambda: self._mark(most))
        for hash in marked:
            self._forget(hash)
            await self._blobs.remove(hash)

        def drop() -> Transaction[None]:
            for hash in marked:
                yield _DROP(hash=hash)

        if marked:
            await self._database.run(drop)
        return len(marked)

    def _mark(self, most: int) -> Transaction[list[str]]:
        now_ms = _now_ms()
        candidates = yield _CANDIDATES(
            touched_before_ms=now_ms - self._grace_ms, stale_before_ms=now_ms - _STALE_MS, most=most
        )
        marked = []
        for row in candidates:
            hash = row["hash"]
            if (yield _ITEM_NAMES(hash=hash)) or (yield _RESPONSE_NAMES(hash=hash)):
                yield _IN_USE(hash=hash)
            else:
                yield _MARK(hash=hash, now_ms=now_ms)
                marked.append(hash)
        return marked

    async def _touch(self, hashes: list[str]) -> None:
        def touch() -> Transaction[bool]:
            rows = yield _TOUCH(hashes=msgspec.json.encode(hashes).decode(), now_ms=_now_ms())
            return all(row["removing_ms"] is None for row in rows)

        patience = asyncio.get_running_loop().time() + _PATIENCE_S
        while not await self._database.run(touch):
            if asyncio.get_running_loop().time() > patience:
                raise StorageUnavailable("blobs", reason="what is to be kept is being removed. Try again in a minute.")
            await asyncio.sleep(_POLL_S)

    def _cached(self, hash: str) -> bytes | None:
        content = self._cache.get(hash)
        if content is not None:
            self._cache.move_to_end(hash)
        return content

    def _remember(self, hash: str, content: bytes) -> bytes:
        if hash not in self._cache and len(content) <= _CACHE_BYTES // 4:
            self._cache[hash] = content
            self._cached_bytes += len(content)
            while self._cached_bytes > _CACHE_BYTES:
                self._cached_bytes -= len(self._cache.popitem(last=False)[1])
        return content

    def _forget(self, hash: str) -> None:
        self._cached_bytes -= len(self._cache.pop(hash, b""))


def named(hashes: Iterable[str]) -> Transaction[None]:
    """From now on these are used. Raises: Swept, and then nothing of the transaction is written."""
    wanted = sorted(set(hashes))
    rows = yield _NAME(hashes=msgspec.json.encode(wanted).decode())
    if len(rows) < len(wanted):
        raise Swept


def freed(hashes: Iterable[str]) -> Transaction[None]:
    """To be looked at by the next sweep."""
    if wanted := sorted(set(hashes)):
        yield _FREE(hashes=msgspec.json.encode(wanted).decode())


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _touching(dialect: Dialect) -> Executable:
    statement = sql(
        "INSERT INTO response_segments (hash, touched_ms, free, removing_ms) "  # noqa: S608 two constants
        f"SELECT item.value, :now_ms, 1, NULL FROM {_each(dialect)} AS item WHERE true "
        "ON CONFLICT (hash) DO UPDATE SET touched_ms = excluded.touched_ms RETURNING removing_ms"
    )
    return statement.bindparams(bindparam("hashes", type_=Text), bindparam("now_ms", type_=BigInteger))


def _naming(dialect: Dialect) -> Executable:
    statement = sql(
        "UPDATE response_segments SET free = 0 WHERE removing_ms IS NULL "  # noqa: S608 two constants
        f"AND hash IN (SELECT item.value FROM {_each(dialect)} AS item) RETURNING hash"
    )
    return statement.bindparams(bindparam("hashes", type_=Text))


def _freeing(dialect: Dialect) -> Executable:
    statement = sql(
        "UPDATE response_segments SET free = 1 "  # noqa: S608 a constant
        f"WHERE hash IN (SELECT item.value FROM {_each(dialect)} AS item)"
    )
    return statement.bindparams(bindparam("hashes", type_=Text))


def _each(dialect: Dialect) -> str:
    """One JSON list as rows: a statement for each item of a long conversation would be a round trip each."""
    return "json_each(:hashes)" if dialect == "sqlite" else "json_array_elements_text(CAST(:hashes AS json))"


_HASH = bindparam("hash", type_=Text)
_CANDIDATES = Statement(
    select(segments.c.hash)
    .where(
        or_(
            and_(
                segments.c.free == 1,
                segments.c.touched_ms < bindparam("touched_before_ms", type_=BigInteger),
                segments.c.removing_ms.is_(None),
            ),
            segments.c.removing_ms < bindparam("stale_before_ms", type_=BigInteger),
        )
    )
    .order_by(segments.c.hash)
    .limit(bindparam("most", type_=Integer))
    .with_for_update()
)
_ITEM_NAMES = Statement(select(items.c.node).where(items.c.hash == _HASH).limit(1))
_RESPONSE_NAMES = Statement(select(responses.c.id).where(responses.c.echo == _HASH).limit(1))
_IN_USE = Statement(update(segments).where(segments.c.hash == _HASH).values(free=0))
_MARK = Statement(
    update(segments).where(segments.c.hash == _HASH).values(removing_ms=bindparam("now_ms", type_=BigInteger))
)
_TOUCH = Statement(_touching)
_NAME = Statement(_naming)
_FREE = Statement(_freeing)
_DROP = Statement(delete(segments).where(segments.c.hash == _HASH, segments.c.removing_ms.is_not(None)))

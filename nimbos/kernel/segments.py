"""Segments: the words that a log names by hash, each kept once for its account.

A segment's content begins with the account, so that no account's segments are another's; behind it stands a JSON value
in canonical form (keys in order, no white space) or, for what is paged through, plain bytes. Put them before the
transaction that names them, or in it: a segment that nothing names costs room and does no harm. A process's segments
stay as long as its log. Knows no events; `context.py` says which segments a model is shown.

Small ones, which is nearly all, are rows: a file for each would have to reach the disk by itself, which takes longer
than all else that a call costs. A row need not: it reaches the disk at the latest with the transaction that names it,
as a database writes what was committed in order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Executable, LargeBinary, Text, bindparam, select
from sqlalchemy import text as sql

from nimbos.blobs import Blobs, hash_of
from nimbos.db import Database, Dialect, Statement, Transaction, insert_ignored
from nimbos.db.tables.kernel import process_segments
from nimbos.errors import InvalidRequest, NotFound, PayloadTooLarge

SEGMENT_BYTES_MAX = 64 << 20
ROW_BYTES_MAX = 16 << 10
JSON_DEPTH_MAX = 64
JSON_VALUES_MAX = 2_000_000
_CACHE_BYTES = 16 << 20
_AT_ONCE_LEAST = 2
_ENCODER = msgspec.json.Encoder(order="deterministic")
_ADD = insert_ignored(process_segments, key=("hash",))
_FIND = Statement(select(process_segments.c.content).where(process_segments.c.hash == bindparam("name", type_=Text)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A segment with its hash. `row`: what has yet to be written, None where all is."""

    account: str
    hash: str
    content: bytes
    row: bytes | None = None

    def writing(self) -> Transaction[None]:
        """A part of the transaction that names it."""
        if self.row is not None:
            yield _ADD(hash=self.hash, content=self.row)


class Segments:
    """One for a server: contexts that share a past share what was read of it."""

    def __init__(self, database: Database, blobs: Blobs) -> None:
        self._database = database
        self._blobs = blobs
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached_bytes = 0

    async def put(self, account: str, value: Any) -> str:
        """Its hash; the same for the same value of the same account.

        Raises: InvalidRequest for what is no JSON value or nests too deep; PayloadTooLarge; StorageUnavailable.
        """
        return await self.put_bytes(account, canonical(value))

    async def get(self, account: str, hash: str) -> Any:
        """Raises: NotFound, also for a segment of another account; StorageUnavailable."""
        return msgspec.json.decode(await self.get_bytes(account, hash))

    async def put_bytes(self, account: str, content: bytes) -> str:
        """Raises: PayloadTooLarge, StorageUnavailable."""
        prepared = await self._prepared(account, content)
        if prepared.row is not None:
            await self._database.run(prepared.writing, quick=True)
        return self.written(prepared)

    async def prepare(self, account: str, value: Any, *, wrapped: int = 0) -> Prepared:
        """As `put`, for a transaction that names it and writes it, too: `written` when that is committed. `wrapped`:
        levels around values that are kept already, which do not count."""
        return await self._prepared(account, canonical(value, wrapped=wrapped))

    def written(self, prepared: Prepared) -> str:
        """Its hash."""
        return self._remember(prepared.hash, prepared.content, prepared.account)

    async def _prepared(self, account: str, content: bytes) -> Prepared:
        if len(content) > SEGMENT_BYTES_MAX:
            raise PayloadTooLarge(have=len(content), limit=SEGMENT_BYTES_MAX, what="segment")
        row = _start(account) + content
        if len(row) > ROW_BYTES_MAX:
            return Prepared(account=account, hash=await self._blobs.put(row), content=content)
        hash = hash_of(row)
        kept = _key(account, hash) in self._cache
        return Prepared(account=account, hash=hash, content=content, row=None if kept else row)

    async def get_bytes(self, account: str, hash: str) -> bytes:
        """Raises: NotFound, also for a segment of another account; StorageUnavailable."""
        key = _key(account, hash)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        rows = await self._database.read(_FIND(name=hash))
        whole, start = rows[0]["content"] if rows else await self._blobs.get(hash), _start(account)
        if not whole.startswith(start):
            raise NotFound("There is no such segment.")
        content = bytes(whole[len(start) :])
        self._remember(hash, content, account)
        return content

    async def look_up(self, account: str, hashes: Iterable[str]) -> None:
        """Reads those that are rows at once, for whoever will get them one by one. Raises: StorageUnavailable."""
        missing = {hash for hash in hashes if _key(account, hash) not in self._cache}
        if len(missing) < _AT_ONCE_LEAST:
            return
        start = _start(account)
        for row in await self._database.read(_FIND_ALL(names=msgspec.json.encode(sorted(missing)).decode())):
            if row["content"].startswith(start):
                self._remember(row["hash"], bytes(row["content"][len(start) :]), account)

    async def get_all(self, account: str, hashes: Iterable[str]) -> list[Any]:
        """The values, in order."""
        return [await self.get(account, hash) for hash in hashes]

    def _remember(self, hash: str, content: bytes, account: str) -> str:
        key = _key(account, hash)
        if key not in self._cache and len(content) <= _CACHE_BYTES // 4:
            self._cache[key] = content
            self._cached_bytes += len(content)
            while self._cached_bytes > _CACHE_BYTES:
                self._cached_bytes -= len(self._cache.popitem(last=False)[1])
        return hash


def canonical(value: Any, *, wrapped: int = 0) -> bytes:
    """The one way to write a JSON value. `wrapped`: levels around it that do not count. Raises: InvalidRequest."""
    try:
        if not _depth_within(value, JSON_DEPTH_MAX + wrapped):
            raise InvalidRequest(f"A value nests more than {JSON_DEPTH_MAX} deep.")
        return _ENCODER.encode(value)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError, UnicodeError) as error:
        raise InvalidRequest(f"This is no JSON value: {type(error).__name__}.") from error


def text_of(value: Any) -> str:
    """A value that was kept, as a model reads it, and as `read` pages through it: words as they are, anything else as
    JSON."""
    return value if isinstance(value, str) else _ENCODER.encode(value).decode()


def _depth_within(value: Any, limit: int) -> bool:
    """Level by level, so depth costs no stack."""
    level: list[Any] = [value]
    left = JSON_VALUES_MAX
    for _ in range(limit + 1):
        left -= sum(len(item) for item in level if isinstance(item, dict | list | tuple))
        if left < 0:
            raise InvalidRequest(f"A value may hold {JSON_VALUES_MAX} others.")
        level = [child for item in level for child in _children(item)]
        if not level:
            return True
    return False


def _children(item: Any) -> Iterable[Any]:
    if isinstance(item, dict):
        return [child for child in item.values() if isinstance(child, dict | list | tuple)]
    if isinstance(item, list | tuple):
        return [child for child in item if isinstance(child, dict | list | tuple)]
    return ()


def _finding(dialect: Dialect) -> Executable:
    """One JSON list as rows: a statement for each would be a round trip each."""
    each = "json_each(:names)" if dialect == "sqlite" else "json_array_elements_text(CAST(:names AS json))"
    statement = sql(
        "SELECT hash, content FROM process_segments "  # noqa: S608 two constants
        f"WHERE hash IN (SELECT item.value FROM {each} AS item)"
    )
    return statement.bindparams(bindparam("names", type_=Text)).columns(hash=Text, content=LargeBinary)


def _start(account: str) -> bytes:
    return account.encode() + b"\n"


def _key(account: str, hash: str) -> str:
    return f"{account}\n{hash}"


_FIND_ALL = Statement(_finding)

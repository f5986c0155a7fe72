"""Contents by their hash, in a folder and in both databases."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import pytest
from sqlalchemy import text

from nimbos.blobs import Blobs, Stored, hash_of, open_blobs
from nimbos.blobs.folder import FolderBlobs
from nimbos.config import Settings, StorageSettings
from nimbos.db import Database, Statement, Transaction
from nimbos.errors import NotFound, PayloadTooLarge, StorageUnavailable
from tests.live import PATIENCE_S

LARGE = os.urandom(1_000_003)
PIECE_COUNT = Statement(text("SELECT count(*) AS n FROM blob_pieces"))
UPLOAD_COUNT = Statement(text("SELECT count(*) AS n FROM blob_uploads"))


@pytest.fixture(params=["folder", "database"])
async def blobs(request: pytest.FixtureRequest, database: Database, database_settings: Settings) -> Blobs:
    place = "database" if request.param == "database" else ""
    storage = StorageSettings(blobs=place)
    return open_blobs(msgspec.structs.replace(database_settings, storage=storage), database)


async def pieces_of(content: bytes, size: int = 70_001) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def joined(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in pieces])


@pytest.mark.parametrize("content", [b"", b"x", LARGE], ids=["empty", "tiny", "large"])
async def test_what_is_put_is_what_is_got(blobs: Blobs, content: bytes) -> None:
    hash = await blobs.put(content)
    assert hash == hashlib.sha256(content).hexdigest() == hash_of(content)
    assert await blobs.get(hash) == content
    assert await blobs.has(hash)
    assert await blobs.put(content) == hash
    assert await blobs.put_stream(pieces_of(content), limit_bytes=len(content)) == Stored(hash, len(content))
    assert await joined(blobs.read(hash)) == content


async def test_a_part_is_read_without_the_rest(blobs: Blobs) -> None:
    stored = await blobs.put_stream(pieces_of(LARGE, 999), limit_bytes=len(LARGE))
    for start, end in [(0, 10), (262_140, 262_150), (5, 900_000), (len(LARGE) - 3, None), (10, 10), (0, 2_000_000)]:
        found = [piece async for piece in blobs.read(stored.hash, start=start, end=end, piece_bytes=10_000)]
        assert b"".join(found) == LARGE[start:end]
        assert all(len(piece) <= 10_000 for piece in found)


async def test_a_stream_that_is_too_long_leaves_nothing(blobs: Blobs, database: Database, tmp_path: Path) -> None:
    with pytest.raises(PayloadTooLarge):
        await blobs.put_stream(pieces_of(LARGE), limit_bytes=len(LARGE) - 1)
    assert not await blobs.has(hash_of(LARGE))
    await assert_nothing_left(database, tmp_path)


async def test_a_stream_that_fails_or_is_cancelled_leaves_nothing(
    blobs: Blobs, database: Database, tmp_path: Path
) -> None:
    waiting = asyncio.Event()

    async def broken() -> AsyncIterator[bytes]:
        yield LARGE
        raise ConnectionError("the client is gone")

    async def endless() -> AsyncIterator[bytes]:
        yield LARGE
        waiting.set()
        await asyncio.Event().wait()

    with pytest.raises(ConnectionError):
        await blobs.put_stream(broken(), limit_bytes=10**9)
    task = asyncio.create_task(blobs.put_stream(endless(), limit_bytes=10**9))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await assert_nothing_left(database, tmp_path)


async def assert_nothing_left(database: Database, tmp_path: Path) -> None:
    assert [row["n"] for row in await database.read(PIECE_COUNT())] == [0]
    assert [row["n"] for row in await database.read(UPLOAD_COUNT())] == [0]
    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []


async def test_what_is_removed_or_was_never_there_is_not_found(blobs: Blobs) -> None:
    hash = await blobs.put(LARGE)
    await blobs.remove(hash)
    await blobs.remove(hash)
    assert not await blobs.has(hash)
    for name in (hash, "0" * 64):
        with pytest.raises(NotFound):
            await blobs.get(name)
        with pytest.raises(NotFound):
            await joined(blobs.read(name))


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
async def test_a_name_that_is_no_hash_reaches_no_file(blobs: Blobs, name: str) -> None:
    for call in (blobs.get(name), joined(blobs.read(name)), blobs.has(name), blobs.remove(name)):
        with pytest.raises(NotFound):
            await call


async def test_the_same_content_from_many_at_once_is_kept_once(blobs: Blobs, database: Database) -> None:
    streams = (blobs.put_stream(pieces_of(LARGE), limit_bytes=len(LARGE)) for _ in range(8))
    assert set(await asyncio.gather(*streams)) == {Stored(hash_of(LARGE), len(LARGE))}
    assert await blobs.get(hash_of(LARGE)) == LARGE
    assert (await database.read(PIECE_COUNT()))[0]["n"] in (0, 4)


async def test_a_damaged_file_is_told_and_never_served_as_whole(tmp_path: Path, database: Database) -> None:
    blobs = open_blobs(Settings(home=str(tmp_path)), database)
    hash = await blobs.put(LARGE)
    file = tmp_path / "blobs" / hash[:2] / hash[2:4] / hash
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for damaged in (LARGE[:-1], LARGE[:-1] + bytes([LARGE[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(StorageUnavailable, match="damaged"):
            await blobs.get(hash)
        with pytest.raises(StorageUnavailable, match="damaged"):
            await joined(blobs.read(hash))


async def test_a_damaged_row_is_told_and_never_served_as_whole(database: Database, database_settings: Settings) -> None:
    storage = StorageSettings(blobs="database")
    blobs = open_blobs(msgspec.structs.replace(database_settings, storage=storage), database)
    hash = await blobs.put(LARGE)

    def lose() -> Transaction[None]:
        yield Statement(text("DELETE FROM blob_pieces WHERE number = 2"))()

    await database.run(lose)
    with pytest.raises(StorageUnavailable, match="damaged"):
        await blobs.get(hash)


async def test_what_a_dead_program_left_is_removed_after_a_day(tmp_path: Path, database: Database) -> None:
    folder = tmp_path / "blobs"
    folder.mkdir()
    old, new = folder / "incoming-old", folder / "incoming-new"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (0, 0))
    await open_blobs(Settings(home=str(tmp_path)), database).put(b"whole")
    assert not old.exists()
    assert new.exists()
    rows = open_blobs(Settings(home=str(tmp_path), storage=StorageSettings(blobs="database")), database)

    def leave() -> Transaction[None]:
        yield Statement(text("INSERT INTO blob_uploads (id, started_ms) VALUES ('upl_old', 5)"))()

    await database.run(leave)
    await rows.put(b"whole")
    assert [row["n"] for row in await database.read(UPLOAD_COUNT())] == [0]


async def test_a_file_is_closed_whose_reader_went_while_it_was_opened(tmp_path: Path) -> None:
    began, go = threading.Event(), threading.Event()
    opened: list[BinaryIO] = []

    class Slow(FolderBlobs):
        def _open(self, hash: str, start: int) -> BinaryIO:
            opened.append(super()._open(hash, start))
            began.set()
            assert go.wait(PATIENCE_S)
            return opened[0]

    blobs = Slow(tmp_path)
    pieces = blobs.read(await blobs.put(b"content"))
    reading = asyncio.ensure_future(anext(pieces))
    assert await asyncio.to_thread(began.wait, PATIENCE_S)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    go.set()
    await asyncio.get_running_loop().shutdown_default_executor()  # the thread is through
    assert opened[0].closed

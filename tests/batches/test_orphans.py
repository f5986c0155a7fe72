"""Contents that nobody names are removed after a day, and never one that somebody is about to name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec
import pytest
from sqlalchemy import bindparam, delete

from nimbos.batches import Batches
from nimbos.batches.contents import Contents, Received
from nimbos.batches.files import Files, made
from nimbos.batches.orphans import Orphans, begun_ms, file_of, given_back
from nimbos.batches.words import File
from nimbos.blobs import Blobs, open_blobs
from nimbos.config import BatchSettings, Settings, StorageSettings
from nimbos.db import Database, Statement, Transaction, insert
from nimbos.db.tables.accounts import users
from nimbos.db.tables.batches import files as file_table
from nimbos.errors import Conflict, NotFound
from nimbos.types import Account, id_at

ALICE = Account(id="proj_alice", name="Alice")
AT_ONCE_S = -60.0  # also what is stored this very moment
_LOSE = Statement(delete(file_table).where(file_table.c.id == bindparam("of")))


@dataclass
class Shelf:
    database: Database
    blobs: Blobs
    files: Files
    orphans: Orphans

    async def receive(self, content: bytes = b"content") -> Received:
        async def pieces() -> AsyncIterator[bytes]:
            yield content

        return await self.files.receive(pieces())


@pytest.fixture(params=["folder", "database"])
async def shelf(request: pytest.FixtureRequest, database: Database, database_settings: Settings) -> Shelf:
    storage = StorageSettings(blobs="database" if request.param == "database" else "")
    blobs = open_blobs(msgspec.structs.replace(database_settings, storage=storage), database)
    files = Batches(database, blobs, BatchSettings(), server_id="srv_test").files
    return Shelf(database, blobs, files, Orphans(database, Contents(blobs)))


async def sweep(shelf: Shelf) -> int:
    """A day and a week later."""
    return await shelf.orphans.sweep(least_age_s=AT_ONCE_S, grace_s=0)


async def read(shelf: Shelf, file_id: str) -> bytes:
    file = await shelf.files.get(ALICE.id, file_id)
    return b"".join([piece async for piece in shelf.files.read(file)])


async def test_only_what_nobody_names_is_removed(shelf: Shelf) -> None:
    kept = await shelf.files.keep(ALICE, await shelf.receive(b"kept"), filename="a", purpose="user_data")
    other = await shelf.blobs.put(b"proj_alice\na segment of a log")
    looks_like_one = await shelf.blobs.put(id_at("file", 1_000_000, bytes(10)).encode() + b"\na part of a program")
    await shelf.blobs.put(b"")
    left = await shelf.receive(b"its server died before it had a row")
    lost = await shelf.files.keep(ALICE, await shelf.receive(b"its removal was lost"), filename="b", purpose="batch")

    def lose() -> Transaction[None]:
        yield _LOSE(of=lost.id)

    await shelf.database.run(lose)
    assert await shelf.orphans.sweep() == 0  # all are young
    assert await shelf.orphans.sweep(least_age_s=AT_ONCE_S) == 0  # now it is known that nobody names them
    assert await shelf.blobs.has(left.blob)
    assert await sweep(shelf) == 2
    for hash in (left.blob, lost.blob):
        assert not await shelf.blobs.has(hash)
    assert await read(shelf, kept.id) == b"kept"
    assert await shelf.blobs.has(other)
    assert await shelf.blobs.has(looks_like_one)
    assert await sweep(shelf) == 0
    assert [file.id for file in await shelf.files.list(ALICE.id, after="", limit=9, newest_first=True, purpose="")] == [
        kept.id
    ]


async def test_who_comes_with_the_row_too_late_is_refused_it(shelf: Shelf) -> None:
    received = await shelf.receive()
    assert await shelf.orphans.sweep(least_age_s=AT_ONCE_S) == 0
    with pytest.raises(Conflict):
        await shelf.files.keep(ALICE, received, filename="a", purpose="user_data")
    with pytest.raises(NotFound):
        await shelf.files.get(ALICE.id, received.file_id)


async def test_an_id_that_was_taken_is_given_back_to_whoever_stores_its_content_again(shelf: Shelf) -> None:
    received = await shelf.receive()
    assert await shelf.orphans.sweep(least_age_s=AT_ONCE_S) == 0
    file = made(ALICE, received, filename="a", purpose="batch_output", expires_s=None)

    def record() -> Transaction[None]:
        yield from given_back(file.id)
        yield from shelf.files.record(ALICE, file, within_quota=False)

    await shelf.database.run(record)
    assert await sweep(shelf) == 0
    assert await read(shelf, file.id) == b"content"


async def test_what_is_older_than_the_database_was_another_ones(shelf: Shelf) -> None:
    received = await shelf.receive()
    owner = {column.name: None for column in users.columns} | {
        "id": "user_owner", "organisation": "", "email": "", "name": "owner", "role": "owner",
        "created_ms": begun_ms(received.file_id) + 24 * 3_600_000,
    }  # fmt: skip

    def born() -> Transaction[None]:
        yield insert(users)(**owner)

    await shelf.database.run(born)
    assert await sweep(shelf) == 0 and await sweep(shelf) == 0
    assert await shelf.blobs.has(received.blob)


async def test_a_file_that_is_recorded_while_it_is_swept_is_whole_or_refused(shelf: Shelf) -> None:
    for number in range(30):
        received = await shelf.receive(b"%d" % number)
        keeping = shelf.files.keep(ALICE, received, filename="a", purpose="user_data")
        order = (keeping, sweep(shelf))
        results = await asyncio.gather(*(order if number % 2 else reversed(order)), return_exceptions=True)
        kept = results[0 if number % 2 else 1]
        if isinstance(kept, File):
            assert await read(shelf, kept.id) == b"%d" % number
        else:
            assert isinstance(kept, Conflict)


def test_the_id_at_the_head_must_be_of_its_time() -> None:
    now_ms = 1_700_000_000_000
    name = id_at("file", now_ms, bytes(10))
    head = f"{name}\n".encode()
    assert file_of(head, now_ms + 5) == name
    assert file_of(head, now_ms - 5) == name
    assert file_of(head, now_ms + 30 * 24 * 3_600_000) is None
    assert file_of(head, now_ms - 24 * 3_600_000) is None
    assert file_of(head[:-1] + b" ", now_ms) is None
    assert file_of(b"", now_ms) is None

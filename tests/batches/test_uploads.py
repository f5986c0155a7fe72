"""Uploads through the official client: parts become one file, once, within the quota; what ends leaves nothing."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import text

from nimbos.batches import Batches, Part, Upload, uploads
from nimbos.blobs import open_blobs
from nimbos.blobs.content import PIECE_BYTES
from nimbos.config import BatchSettings, Settings, StorageSettings
from nimbos.db import Database, Statement, Transaction
from nimbos.errors import Conflict, NotFound, PayloadTooLarge, StorageUnavailable
from nimbos.types import Account
from tests.live import Live, error_of, serving

ALICE, BOB = Account(id="proj_alice", name="Alice"), Account(id="proj_bob", name="Bob")
LAPSE = Statement(text("UPDATE uploads SET expires_ms = 1"))
TOTAL = Statement(text("SELECT size_bytes, files FROM file_totals WHERE project = 'proj_alice'"))
LEFT = Statement(text("SELECT count(*) AS n FROM uploads"))
BLOBS = Statement(text("SELECT count(*) AS n FROM blobs"))
PARTS_LEFT = Statement(text("SELECT count(*) AS n FROM upload_parts"))
CONTENT = bytes(range(256)) * 300


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    limits = BatchSettings(file_bytes=100_000, project_bytes=1_000_000)
    with serving(tmp_path_factory.mktemp("home"), {"demo": {"default": {"text": "hi"}}}, batches=limits) as running:
        yield running


def begin(live: Live, size_bytes: int = 10, **fields: Any) -> openai.types.Upload:
    given = {"filename": "notes.txt", "mime_type": "text/plain", "purpose": "user_data", **fields}
    return live.client.uploads.create(bytes=size_bytes, **given)


def contents_in(home: Path) -> list[Path]:
    return [path for path in (home / "blobs").rglob("*") if path.is_file()]


def test_parts_become_a_file_in_the_order_that_is_said(served: Live) -> None:
    upload = begin(served, 9, expires_after={"anchor": "created_at", "seconds": 3600})
    assert (upload.status, upload.bytes, upload.filename, upload.purpose) == ("pending", 9, "notes.txt", "user_data")
    assert (upload.file, upload.expires_at) == (None, upload.created_at + 3600)
    one, two, lost, three = (
        served.client.uploads.parts.create(upload.id, data=data) for data in (b"one", b"two", b"lost", b"333")
    )
    assert (one.object, one.upload_id) == ("upload.part", upload.id)
    done = served.client.uploads.complete(upload.id, part_ids=[three.id, one.id, two.id])
    assert done.status == "completed"
    assert done.file is not None
    assert done.file == served.client.files.retrieve(done.file.id)
    assert (done.file.filename, done.file.bytes) == ("notes.txt", 9)
    assert done.file.expires_at == done.file.created_at + 3600
    assert served.client.files.content(done.file.id).content == b"333onetwo"
    assert served.client.uploads.complete(upload.id, part_ids=[lost.id]) == done, "asked again: the same answer"
    for call in (
        lambda: served.client.uploads.parts.create(upload.id, data=b"more"),
        lambda: served.client.uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.ConflictError):
            call()


@pytest.mark.parametrize("md5", [hashlib.md5(CONTENT).hexdigest(), openai.omit])
def test_the_official_client_sends_a_file_in_parts(served: Live, tmp_path: Path, md5: Any) -> None:
    file = tmp_path / "large.bin"
    file.write_bytes(CONTENT)
    before = contents_in(Path(served.settings.home))
    done = served.client.uploads.upload_file_chunked(
        file=file, mime_type="application/octet-stream", purpose="user_data", part_size=10_000, md5=md5
    )
    assert done.file is not None
    assert (done.file.filename, done.file.bytes) == ("large.bin", len(CONTENT))
    assert served.client.files.content(done.file.id).content == CONTENT
    assert len(contents_in(Path(served.settings.home))) == len(before) + 1
    served.client.files.delete(done.file.id)


def test_a_cancelled_upload_leaves_nothing(served: Live) -> None:
    before = contents_in(Path(served.settings.home))
    upload = begin(served, 3)
    part = served.client.uploads.parts.create(upload.id, data=b"one")
    assert len(contents_in(Path(served.settings.home))) == len(before) + 1
    assert served.client.uploads.cancel(upload.id).status == "cancelled"
    assert served.client.uploads.cancel(upload.id).status == "cancelled"
    assert contents_in(Path(served.settings.home)) == before
    with pytest.raises(openai.ConflictError):
        served.client.uploads.complete(upload.id, part_ids=[part.id])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "batch_output"}, "purpose"),
        ({"bytes": -1}, "bytes"),
        ({"filename": ""}, "filename"),
        ({"filename": "a\0"}, "filename"),
        ({"filename": "x" * 256}, "filename"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_upload_that_cannot_be_is_refused(served: Live, fields: dict[str, Any], param: str) -> None:
    body = {"bytes": 3, "filename": "a", "mime_type": "text/plain", "purpose": "batch", **fields}
    assert error_of(served.post("/v1/uploads", body), 400)["param"] == param


def test_parts_that_are_not_what_was_announced_are_refused_and_can_be_mended(served: Live) -> None:
    with pytest.raises(openai.APIStatusError) as large:
        begin(served, 100_001)
    assert (large.value.status_code, large.value.code) == (413, "payload_too_large")
    upload = begin(served, 6)
    one = served.client.uploads.parts.create(upload.id, data=b"one").id
    path = f"/v1/uploads/{upload.id}"
    for part_ids in ([one], [one, one], [one, "part_of_nobody"], []):
        assert error_of(served.post(f"{path}/complete", {"part_ids": part_ids}), 400)["param"] == "part_ids"
    too_large = served.http.post(f"{path}/parts", files={"data": ("x", b"x" * 100_001)})
    assert error_of(too_large, 413)["code"] == "payload_too_large"
    assert error_of(served.http.post(f"{path}/parts", files={"file": ("x", b"two")}), 400)["param"] == "data"
    named = served.http.post(f"{path}/parts", files={"data": ("x", b"two")}, data={"number": "2"})
    assert error_of(named, 400)["param"] == "number"
    two = served.client.uploads.parts.create(upload.id, data=b"two").id
    wrong = served.post(f"{path}/complete", {"part_ids": [one, two], "md5": "0" * 32})
    assert error_of(wrong, 400)["param"] == "md5"
    done = served.client.uploads.complete(upload.id, part_ids=[one, two], md5=hashlib.md5(b"onetwo").hexdigest())
    assert done.file is not None
    served.client.files.delete(done.file.id)
    assert error_of(served.http.post("/v1/uploads/upload_0/parts", files={"data": ("x", b"x")}), 404)
    assert error_of(served.post("/v1/uploads/upload_0/cancel", {}), 404)


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def batches_on(database: Database, tmp_path: Path, **limits: int) -> Batches:
    settings = Settings(home=str(tmp_path))
    return Batches(database, open_blobs(settings, database), BatchSettings(**limits), server_id="srv_test")


async def made(batches: Batches, size_bytes: int = 6) -> Upload:
    return await batches.uploads.create(
        ALICE, filename="a", purpose="batch", size_bytes=size_bytes, file_expires_s=None
    )


async def add(batches: Batches, upload: Upload, content: bytes, *, project: str = ALICE.id) -> Part:
    received = await batches.uploads.receive(project, upload.id, once(content))
    try:
        return await batches.uploads.add(project, upload.id, received)
    except (Conflict, NotFound, PayloadTooLarge) as error:
        await batches.uploads.forget(received, after=error)
        raise


async def total(database: Database) -> tuple[int, int]:
    (row,) = await database.read(TOTAL())
    return row["size_bytes"], row["files"]


async def test_another_projects_upload_is_not_there(database: Database, tmp_path: Path) -> None:
    batches = batches_on(database, tmp_path)
    upload = await made(batches, 3)
    part = await add(batches, upload, b"one")
    for call in (
        add(batches, upload, b"two", project=BOB.id),
        batches.uploads.complete(BOB, upload.id, [part.id]),
        batches.uploads.cancel(BOB.id, upload.id),
    ):
        with pytest.raises(NotFound):
            await call
    other = await made(batches, 3)
    with pytest.raises(Exception, match="no part"):
        await batches.uploads.complete(ALICE, other.id, [part.id])


async def test_parts_count_in_the_quota_until_the_file_takes_their_place(database: Database, tmp_path: Path) -> None:
    batches = batches_on(database, tmp_path, project_bytes=10)
    upload = await made(batches)
    parts = [await add(batches, upload, content) for content in (b"abc", b"def")]
    assert await total(database) == (6, 2)
    with pytest.raises(PayloadTooLarge, match="project's files"):
        await add(batches, upload, b"12345")
    assert await total(database) == (6, 2)
    _, file = await batches.uploads.complete(ALICE, upload.id, [part.id for part in parts])
    assert await total(database) == (6, 1)
    await batches.files.delete(ALICE.id, file.id)
    assert await total(database) == (0, 0)
    assert contents_in(tmp_path) == []


async def test_empty_files_and_parts_count_too(database: Database, tmp_path: Path) -> None:
    """Each has its place on the disk, whatever it holds."""
    batches = batches_on(database, tmp_path, project_files=3)
    upload = await made(batches, 0)
    parts = [await add(batches, upload, b"") for _ in range(2)]
    file = await batches.files.keep(ALICE, await batches.files.receive(once(b"")), filename="a", purpose="batch")
    with pytest.raises(Conflict, match="3 files"):
        await add(batches, upload, b"")
    received = await batches.files.receive(once(b""))
    with pytest.raises(Conflict, match="3 files") as refused:
        await batches.files.keep(ALICE, received, filename="b", purpose="batch")
    await batches.files.forget(received, after=refused.value)
    assert (await total(database), len(contents_in(tmp_path))) == ((0, 3), 3)
    await batches.uploads.complete(ALICE, upload.id, [part.id for part in parts])
    assert await total(database) == (0, 2)
    await batches.files.delete(ALICE.id, file.id)
    assert (await total(database), len(contents_in(tmp_path))) == ((0, 1), 1)


async def test_an_upload_has_no_more_parts_than_it_may(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PARTS_MAX", 2)
    batches = batches_on(database, tmp_path)
    upload = await made(batches, 2)
    for content in (b"a", b"b"):
        await add(batches, upload, content)
    with pytest.raises(Conflict, match="2 parts"):
        await add(batches, upload, b"c")
    assert len(contents_in(tmp_path)) == 2


async def test_an_upload_whose_hour_is_over_is_gone_with_its_parts(database: Database, tmp_path: Path) -> None:
    batches = batches_on(database, tmp_path)
    upload, done = await made(batches), await made(batches, 0)
    part = await add(batches, upload, b"abcdef")
    _, file = await batches.uploads.complete(ALICE, done.id, [])
    assert await batches.uploads.sweep() == 0

    def lapse() -> Transaction[None]:
        yield LAPSE()

    await database.run(lapse)
    for call in (
        add(batches, upload, b"more"),
        batches.uploads.complete(ALICE, upload.id, [part.id]),
        batches.uploads.cancel(ALICE.id, upload.id),
    ):
        with pytest.raises(NotFound, match="hour is over"):
            await call
    assert await batches.uploads.sweep() == 2
    assert [row["n"] for query in (LEFT, PARTS_LEFT) for row in await database.read(query())] == [0, 0]
    assert await total(database) == (0, 1)
    assert [piece async for piece in batches.files.read(file)] == []
    assert len(contents_in(tmp_path)) == 1


async def test_of_two_that_complete_an_upload_one_makes_the_file(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has read the parts, and comes too late with its file, of which nothing stays."""
    batches = batches_on(database, tmp_path)
    upload = await made(batches, 3)
    part = await add(batches, upload, b"abc")
    finish = batches.uploads._finish
    first: list[Any] = []

    async def late(*arguments: Any) -> Any:
        if not first:
            first.append(None)
            first.append(await batches.uploads.complete(ALICE, upload.id, [part.id]))
        return await finish(*arguments)

    monkeypatch.setattr(batches.uploads, "_finish", late)
    with pytest.raises(Conflict, match="completed"):
        await batches.uploads.complete(ALICE, upload.id, [part.id])
    assert (await batches.uploads.complete(ALICE, upload.id, [part.id])) == first[1]
    assert await total(database) == (3, 1)
    assert len(contents_in(tmp_path)) == 1


async def test_parts_that_are_kept_in_the_database_become_a_file_there(database: Database, tmp_path: Path) -> None:
    settings = Settings(home=str(tmp_path), storage=StorageSettings(blobs="database"))
    batches = Batches(database, open_blobs(settings, database), BatchSettings(), server_id="srv_test")
    contents = [bytes([number]) * (3 * PIECE_BYTES // 2) for number in range(3)]
    upload = await made(batches, sum(map(len, contents)))
    parts = [await add(batches, upload, content) for content in contents]
    _, file = await batches.uploads.complete(ALICE, upload.id, [part.id for part in parts])
    assert b"".join([piece async for piece in batches.files.read(file)]) == b"".join(contents)
    assert [row["n"] for row in await database.read(BLOBS())] == [1]


async def test_a_part_whose_content_is_gone_makes_no_file(database: Database, tmp_path: Path) -> None:
    batches = batches_on(database, tmp_path)
    upload = await made(batches, 3)
    part = await add(batches, upload, b"abc")
    for path in contents_in(tmp_path):
        path.unlink()
    with pytest.raises(Conflict):
        await batches.uploads.complete(ALICE, upload.id, [part.id])
    damaged = await add(batches, upload, b"xyz")
    (path,) = contents_in(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(StorageUnavailable, match="damaged"):
        await batches.uploads.complete(ALICE, upload.id, [damaged.id])
    assert contents_in(tmp_path) == [path]


async def test_a_part_that_cannot_be_removed_does_not_take_the_file_along(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = batches_on(database, tmp_path)
    upload = await made(batches, 3)
    part = await add(batches, upload, b"abc")
    broken = iter([StorageUnavailable("here", reason="the disk had an error.")])
    removed = batches.uploads._contents.remove

    async def remove(blob: str) -> None:
        for error in broken:
            raise error
        await removed(blob)

    monkeypatch.setattr(batches.uploads._contents, "remove", remove)
    _, file = await batches.uploads.complete(ALICE, upload.id, [part.id])
    assert b"".join([piece async for piece in batches.files.read(file)]) == b"abc"
    assert not list(broken)


@pytest.mark.parametrize("place", ["", "database"])
async def test_an_upload_that_another_completes_meanwhile_is_a_conflict_wherever_its_parts_are(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    settings = Settings(home=str(tmp_path), storage=StorageSettings(blobs=place))
    batches = Batches(database, open_blobs(settings, database), BatchSettings(), server_id="srv_test")
    upload = await made(batches, 2 * PIECE_BYTES)
    parts = [await add(batches, upload, bytes([number]) * PIECE_BYTES) for number in (1, 2)]
    part_ids, contents = [part.id for part in parts], batches.uploads._contents
    reading, first = contents.read, iter([0])

    async def read(content: str, blob: str) -> AsyncIterator[bytes]:
        async for piece in reading(content, blob):
            yield piece
            for _ in first:
                await batches.uploads.complete(ALICE, upload.id, part_ids)

    monkeypatch.setattr(contents, "read", read)
    with pytest.raises(Conflict):
        await batches.uploads.complete(ALICE, upload.id, part_ids)

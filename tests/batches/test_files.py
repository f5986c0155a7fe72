"""Files through the official client: kept, listed, read in ranges, expired, deleted; never another project's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import bindparam, update

from nimbos.batches import Batches
from nimbos.blobs import open_blobs
from nimbos.config import BatchSettings, Settings
from nimbos.db import Database, Row, Statement, Transaction
from nimbos.db.statements import Bound
from nimbos.db.tables.batches import batches as batch_table
from nimbos.db.tables.batches import files as file_table
from nimbos.errors import Conflict, NotFound, PayloadTooLarge, StorageUnavailable
from nimbos.types import Account
from tests.databases import Postgres
from tests.live import Live, error_of, serving
from tests.wire import wired

_CHANGE = Statement(update(batch_table).where(batch_table.c.id == bindparam("of")).values(state=bindparam("how")))
_LAPSE = Statement(update(file_table).where(file_table.c.id == bindparam("of")).values(expires_ms=1))
ALICE, BOB = Account(id="proj_alice", name="Alice"), Account(id="proj_bob", name="Bob")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home = tmp_path_factory.mktemp("home")
    limits = BatchSettings(file_bytes=100_000, project_bytes=1_000_000)
    with serving(home, {"demo": {"default": {"text": "hi"}}}, batches=limits) as running:
        yield running


def keep(live: Live, content: bytes = b"some text", **fields: Any) -> openai.types.FileObject:
    return live.client.files.create(file=("notes.txt", content), purpose=fields.pop("purpose", "user_data"), **fields)


def test_a_file_comes_back_as_it_was_sent(served: Live) -> None:
    content = bytes(range(256)) * 300
    made = keep(served, content)
    assert (made.bytes, made.filename, made.purpose, made.status) == (
        len(content),
        "notes.txt",
        "user_data",
        "processed",
    )
    assert made.expires_at is None
    assert served.client.files.retrieve(made.id) == made
    assert served.client.files.content(made.id).content == content


def test_a_part_of_a_file_is_read_alone(served: Live) -> None:
    path = f"/v1/files/{keep(served, b'0123456789').id}/content"
    for header, status, body, told in (
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=0-99", 200, b"0123456789", None),
        ("bytes=1-2,4-5", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
    ):
        response = served.http.get(path, headers={"range": header})
        assert (response.status_code, response.content) == (status, body), header
        assert response.headers.get("content-range") == told
    for header in ("bytes=10-", "bytes=5-4", "bytes=-0"):
        response = served.http.get(path, headers={"range": header})
        assert error_of(response, 416)["code"] == "range_not_satisfiable", header


def test_files_are_listed_in_pages_by_order_and_purpose(served: Live) -> None:
    made = [keep(served, purpose="vision").id for _ in range(3)]
    listed = served.client.files.list(purpose="vision", limit=2)
    assert ([file.id for file in listed.data], listed.has_more) == (made[:0:-1], True)
    assert [file.id for file in served.client.files.list(purpose="vision", limit=2)] == made[::-1]
    assert [file.id for file in served.client.files.list(purpose="vision", order="asc")] == made
    assert served.client.files.list(purpose="evals").data == []
    for query in ("limit=0", "order=up", "before=x", "limit=1&limit=2"):
        assert error_of(served.http.get(f"/v1/files?{query}"), 400)["param"] == query.partition("=")[0]


def kept_contents(live: Live) -> list[Path]:
    return [path for path in (Path(live.settings.home) / "blobs").rglob("*") if path.is_file()]


def test_a_deleted_file_is_gone_with_its_content_and_takes_no_equal_one_along(served: Live) -> None:
    before = kept_contents(served)
    one, two = keep(served, b"the same"), keep(served, b"the same")
    assert served.client.files.delete(one.id).deleted
    assert served.client.files.content(two.id).content == b"the same"
    served.client.files.delete(two.id)
    for call in (served.client.files.retrieve, served.client.files.content, served.client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(two.id)
    assert kept_contents(served) == before


def test_an_expiry_is_told_and_must_be_in_its_range(served: Live) -> None:
    made = keep(served, expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at == made.created_at + 3600
    with pytest.raises(openai.BadRequestError) as error:
        keep(served, expires_after={"anchor": "created_at", "seconds": 60})
    assert error.value.param == "expires_after"


@pytest.mark.parametrize("seconds", ["123456789012x", "9" * 5000, "-3600", "\u0663600", ""])
def test_an_expiry_that_is_no_number_is_refused(served: Live, seconds: str) -> None:
    form = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": seconds}
    response = served.http.post("/v1/files", data=form, files={"file": ("a.jsonl", b"{}")})
    assert error_of(response, 400)["param"] == "expires_after"


def test_forms_that_are_wrong_are_refused_with_the_reason(served: Live) -> None:
    def form(*parts: tuple[str, tuple[str | None, bytes]]) -> httpx2.Response:
        return served.http.post("/v1/files", files=list(parts))

    text, purpose = ("file", ("a.txt", b"text")), ("purpose", (None, b"batch"))
    assert form(text, purpose).status_code == 200  # in any order
    assert error_of(form(text), 400)["param"] == "purpose"
    assert error_of(form(text, ("purpose", (None, b"batch_output"))), 400)["param"] == "purpose"
    assert error_of(form(purpose, ("other", ("a.txt", b"text"))), 400)["param"] == "file"
    assert error_of(form(purpose, text, text), 400)["param"] == "file"
    assert error_of(form(purpose, text, ("more", (None, b"1"))), 400)["param"] == "more"
    assert error_of(form(("purpose", (None, b"x" * 20_000)), text), 400)["param"] == "purpose"
    assert error_of(form(*(("purpose", (None, b"batch")) for _ in range(40)), text), 400)
    assert error_of(served.http.post("/v1/files", json={"purpose": "batch"}), 400)
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert error_of(served.http.post("/v1/files", content=b"--y\r\n", headers=broken), 400)
    cut = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
    assert error_of(served.http.post("/v1/files", content=cut, headers=broken), 400)["param"] == "file"


def test_a_file_that_is_too_large_leaves_nothing(served: Live) -> None:
    before = kept_contents(served)
    with pytest.raises(openai.APIStatusError) as error:
        keep(served, b"x" * 100_001)
    assert error.value.status_code == 413
    assert kept_contents(served) == before


# --- below HTTP, on both databases


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def batches_on(database: Database, tmp_path: Path, **limits: int) -> Batches:
    settings = Settings(home=str(tmp_path))
    return Batches(database, open_blobs(settings, database), BatchSettings(**limits), server_id="srv_test")


async def test_another_projects_files_are_not_there(database: Database, tmp_path: Path) -> None:
    files = batches_on(database, tmp_path).files
    stored = await files.receive(once(b"secret"))
    file = await files.keep(ALICE, stored, filename="a", purpose="batch")
    assert (await files.get("proj_alice", file.id)).id == file.id
    for call in (files.get("proj_bob", file.id), files.delete("proj_bob", file.id)):
        with pytest.raises(NotFound):
            await call
    assert await files.list("proj_bob", after="", limit=9, newest_first=True, purpose="") == []


async def test_a_projects_quota_holds_and_what_is_deleted_is_free_again(database: Database, tmp_path: Path) -> None:
    files = batches_on(database, tmp_path, project_bytes=10).files
    first = await files.keep(ALICE, await files.receive(once(b"123456")), filename="a", purpose="batch")
    with pytest.raises(PayloadTooLarge):
        await files.keep(ALICE, await files.receive(once(b"12345")), filename="b", purpose="batch")
    await files.keep(BOB, await files.receive(once(b"12345")), filename="b", purpose="batch")
    await files.delete("proj_alice", first.id)
    await files.keep(ALICE, await files.receive(once(b"1234567890")), filename="c", purpose="batch")


async def test_a_file_whose_time_is_over_is_gone_and_swept(database: Database, tmp_path: Path) -> None:
    files = batches_on(database, tmp_path).files
    file = await files.keep(ALICE, await files.receive(once(b"old")), filename="a", purpose="batch", expires_s=3600)

    def lapse() -> Transaction[None]:
        yield _LAPSE(of=file.id)

    await database.run(lapse)
    with pytest.raises(NotFound):
        await files.get("proj_alice", file.id)
    assert await files.sweep() == 1
    assert await files.sweep() == 0
    assert not list(tmp_path.rglob(file.blob))


async def test_a_file_that_may_have_been_kept_has_its_content(postgres: Postgres, tmp_path: Path) -> None:
    """As the route does it, with a connection that is lost while committing."""
    async with wired(postgres, tmp_path) as (database, wire):
        files = batches_on(database, tmp_path).files
        received = await files.receive(once(b"some text"))
        wire.cut = True
        with pytest.raises(StorageUnavailable) as lost:
            await files.keep(ALICE, received, filename="a", purpose="batch")
        await files.forget(received, after=lost.value)
        file = await files.get(ALICE.id, received.file_id)
        assert b"".join([piece async for piece in files.read(file)]) == b"some text"


async def test_a_file_that_lapses_as_a_batch_begins_with_it_does_not_end_the_sweeping(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = batches_on(database, tmp_path)
    file = await batches.files.keep(
        ALICE, await batches.files.receive(once(b"{}")), filename="a", purpose="batch", expires_s=3600
    )
    batch = await batches.desk.create(
        ALICE, dialect="openai", endpoint="/v1/x", input_file=file.id, completion_window="24h", window_s=9
    )
    read = database.read

    def change(state: str) -> Transaction[None]:
        yield _CHANGE(of=batch.id, how=state)
        yield _LAPSE(of=file.id)

    async def read_and_begin(query: Bound) -> list[Row]:
        """The batch comes between the look at what has lapsed and its deletion."""
        rows = await read(query)
        await database.run(lambda: change("validating"))
        return rows

    await database.run(lambda: change("completed"))
    monkeypatch.setattr(database, "read", read_and_begin)
    assert await batches.files.sweep() == 1
    assert await batches.files.size_bytes(file.id) == 2


async def test_a_file_that_a_batch_reads_cannot_be_deleted(database: Database, tmp_path: Path) -> None:
    batches = batches_on(database, tmp_path)
    file = await batches.files.keep(ALICE, await batches.files.receive(once(b"{}")), filename="a", purpose="batch")
    batch = await batches.desk.create(
        ALICE, dialect="openai", endpoint="/v1/x", input_file=file.id, completion_window="24h", window_s=9
    )
    with pytest.raises(Conflict, match=batch.id):
        await batches.files.delete("proj_alice", file.id)

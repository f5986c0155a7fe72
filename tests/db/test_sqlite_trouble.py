"""Trouble with the file: each has its reason, nothing is half written, and work goes on when the cause is gone."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from nimbos.config import Settings
from nimbos.db import Database, Statement, Transaction
from nimbos.db.schema import HEAD
from nimbos.db.sqlite import SqliteStore
from nimbos.db.sqlite_file import SqliteFile
from nimbos.errors import StorageUnavailable
from tests.db.tables import ADD, ALL, count, everything, make

pytestmark = pytest.mark.usefixtures("both_ways")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Database]:
    """SQLite that waits for locks only briefly."""
    opened = Database(
        await SqliteStore.open(SqliteFile(tmp_path / "nimbos.db", lock_patience_s=0.05)), dialect="sqlite"
    )
    await opened.run(make)
    yield opened
    await opened.close()


def large(name: str) -> Transaction[None]:
    yield from count(f"{name}-before")
    yield ADD(id=name, n=0, content=os.urandom(200_000))


async def test_a_full_disk_undoes_only_what_does_not_fit_and_is_survived(small_disk: Path) -> None:
    database = Database(await SqliteStore.open(SqliteFile(small_disk / "nimbos.db")), dialect="sqlite")
    ballast = small_disk / "ballast"
    await database.run(make)
    kept = await fill(database)
    assert await everything(database) == kept
    small = await asyncio.gather(*(database.run(lambda: count("small")) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(outcome, int | StorageUnavailable) for outcome in small)
    await database.close()
    with closing(sqlite3.connect(small_disk / "nimbos.db")) as checked:
        assert checked.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not ballast.exists()


async def fill(database: Database) -> dict[str, int]:
    """Writes until the disk is full, and gives what was told to be written."""
    kept: dict[str, int] = {}
    for number in range(100):
        try:
            await database.run(lambda name=f"{number:03}": large(name), durable=bool(number % 2))  # type: ignore[misc]
        except StorageUnavailable as error:
            assert "full" in error.reason
            return kept
        kept |= {f"{number:03}": 0, f"{number:03}-before": 1}
    raise AssertionError("the disk is never full")


async def test_work_goes_on_when_the_disk_has_room_again(small_disk: Path) -> None:
    database = Database(await SqliteStore.open(SqliteFile(small_disk / "nimbos.db")), dialect="sqlite")
    await database.run(make)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_500_000))
    kept = await fill(database)
    group = [database.run(lambda n=n: large(f"late-{n}")) for n in range(4)]  # type: ignore[misc]
    outcomes = await asyncio.gather(*group, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {StorageUnavailable}
    assert await everything(database) == kept
    ballast.unlink()
    await database.run(lambda: large("fits"), durable=True)
    assert await everything(database) == {**kept, "fits": 0, "fits-before": 1}
    await database.close()


async def test_one_that_does_not_fit_does_not_take_its_group_along(small_disk: Path) -> None:
    def huge() -> Transaction[None]:
        yield from count("huge-before")
        for number in range(40):
            yield ADD(id=f"huge-{number}", n=0, content=os.urandom(100_000))

    database = Database(await SqliteStore.open(SqliteFile(small_disk / "nimbos.db")), dialect="sqlite")
    await database.run(make)
    runs = [database.run(lambda: count("a")), database.run(huge), database.run(lambda: count("b"))]
    outcomes = await asyncio.gather(*runs, return_exceptions=True)
    assert (outcomes[0], outcomes[2]) == (1, 1)
    assert isinstance(outcomes[1], StorageUnavailable)
    assert await everything(database) == {"a": 1, "b": 1}
    await database.close()


async def test_a_lock_that_is_held_for_long_is_told_and_waited_out(store: Database, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "nimbos.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        runs = [store.run(lambda: count("a")) for _ in range(50)]
        outcomes = await asyncio.gather(*runs, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {StorageUnavailable}
        assert "locked" in str(outcomes[0])
        assert await store.read(ALL()) == []  # readers are not kept out
    assert await store.run(lambda: count("a")) == 1


async def test_a_file_that_is_gone_is_told_and_used_again_when_it_is_back(store: Database, tmp_path: Path) -> None:
    await store.run(lambda: count("a"))
    path, elsewhere = tmp_path / "nimbos.db", tmp_path / "elsewhere.db"
    path.rename(elsewhere)
    for call in (store.run(lambda: count("a")), store.read(ALL()), store.backup(tmp_path / "copy.db")):
        with pytest.raises(StorageUnavailable, match="gone"):
            await call
    assert not path.exists()
    elsewhere.rename(path)
    assert await store.run(lambda: count("a")) == 2
    assert await everything(store) == {"a": 2}


async def test_another_file_in_its_place_is_left_alone_until_the_first_is_back(store: Database, tmp_path: Path) -> None:
    """SQLite would apply the first file's log to it."""
    await store.run(lambda: count("a"))
    assert await everything(store) == {"a": 1}  # a reader is open
    await store.backup(tmp_path / "copy.db")
    await store.run(lambda: count("a"))
    path, elsewhere = tmp_path / "nimbos.db", tmp_path / "elsewhere.db"
    path.rename(elsewhere)
    (tmp_path / "copy.db").rename(path)
    before = path.read_bytes()
    for call in (store.run(lambda: count("a")), store.read(ALL()), store.backup(tmp_path / "copy.db")):
        with pytest.raises(StorageUnavailable, match="another file"):
            await call
    assert path.read_bytes() == before
    elsewhere.replace(path)
    assert await store.run(lambda: count("a")) == 3
    assert await everything(store) == {"a": 3}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"no database " * 1000, "not a SQLite database"), (b"SQLite format 3\0" + bytes(5000), "not a SQLite|damaged")],
)
async def test_what_is_no_database_is_refused_at_the_start(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "nimbos.db"
    path.write_bytes(content)
    with pytest.raises(StorageUnavailable, match=reason):
        await Database.open(Settings(home=str(tmp_path)))
    assert path.read_bytes() == content


async def test_another_programs_database_is_refused_at_the_start(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "nimbos.db")) as other:
        other.execute("CREATE TABLE asks (id TEXT)")
    with pytest.raises(StorageUnavailable, match="another program"):
        await Database.open(Settings(home=str(tmp_path)))


async def test_a_folder_in_the_files_place_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "nimbos.db").mkdir()
    with pytest.raises(StorageUnavailable):
        await Database.open(Settings(home=str(tmp_path)))


def test_a_read_only_disk_is_told_at_the_start_and_used_when_it_can_be_written(small_disk: Path) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    async def write(folder: Path) -> int:
        database = Database(await SqliteStore.open(SqliteFile(folder / "nimbos.db")), dialect="sqlite")
        try:
            return await database.run(lambda: count("a"))
        finally:
            await database.close()

    async def prepare() -> None:
        database = await Database.open(Settings(home=str(small_disk / "there")))
        await database.run(make)
        await database.close()

    asyncio.run(prepare())
    remount("ro")
    for folder in ("there", "new"):
        with pytest.raises(StorageUnavailable, match=r"[Rr]ead-only"):
            asyncio.run(write(small_disk / folder))
    remount("rw")
    assert asyncio.run(write(small_disk / "there")) == 1


async def test_only_its_owner_can_read_the_file(store: Database, tmp_path: Path) -> None:
    await store.run(lambda: count("a"))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("nimbos.db*")}
    assert modes == {"nimbos.db": 0o600, "nimbos.db-wal": 0o600, "nimbos.db-shm": 0o600}


async def test_a_generator_that_misbehaves_does_not_stop_the_writer(store: Database) -> None:
    def cancelled() -> Transaction[None]:
        yield from count("a")
        raise asyncio.CancelledError

    def stubborn() -> Transaction[None]:
        try:
            yield Statement(text("SELECT nothing FROM nowhere"))()
        finally:
            yield ADD(id="late", n=1, content=None)

    def nonsense() -> Transaction[None]:
        yield from count("a")
        yield "SELECT 1"  # type: ignore[misc]

    def wrong() -> Transaction[None]:
        yield from count("a")
        yield Statement(text("SELECT nothing FROM nowhere"))()

    for begin, error in [
        (cancelled, asyncio.CancelledError),
        (nonsense, AttributeError),
        (wrong, sqlite3.OperationalError),
        (lambda: None, AttributeError),
    ]:
        with pytest.raises(error):  # type: ignore[call-overload]
            await store.run(begin)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="ignored"):
        await store.run(stubborn)
    assert await everything(store) == {}
    assert await store.run(lambda: count("a")) == 1


async def test_many_transactions_share_few_commits(store: Database, tmp_path: Path) -> None:
    assert await store.run(lambda: count("a")) == 1
    with closing(sqlite3.connect(tmp_path / "nimbos.db", isolation_level=None)) as other:
        before = _changes(other)
        outcomes = await asyncio.gather(*(store.run(lambda: count("a"), durable=True) for _ in range(200)))
        assert sorted(outcomes) == list(range(2, 202))
        assert _changes(other) != before
    wal = tmp_path / "nimbos.db-wal"
    assert wal.stat().st_size < 50 * 4096  # 200 commits of their own would be 200 pages at least


@pytest.mark.parametrize("durable", [True, False])
async def test_the_log_is_written_back_behind_quick_commits(store: Database, tmp_path: Path, durable: bool) -> None:
    """Each start would read a log that only grows, and each reader would look through it."""
    for _ in range(200):
        await store.run(lambda: count("a"), durable=durable, quick=True)
    alone = tmp_path / "alone.db"
    shutil.copy(tmp_path / "nimbos.db", alone)
    with closing(sqlite3.connect(alone)) as file:
        assert file.execute("SELECT n FROM test_things WHERE id = 'a'").fetchone()[0] > 100


def _changes(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA data_version").fetchone()[0])


class Failing(sqlite3.Connection):
    """A connection whose n-th statement fails, and all that follow if `lasting`. SQLite sometimes undoes the
    transaction itself before it says so: `undoing`."""

    left: int | None = None
    lasting = False
    undoing = False

    def execute(self, statement: str, parameters: object = (), /) -> FailingCursor:  # type: ignore[override]
        return self.cursor(FailingCursor).execute(statement, parameters)


class FailingCursor(sqlite3.Cursor):
    def execute(self, statement: str, parameters: object = (), /) -> FailingCursor:  # type: ignore[override]
        if Failing.left is not None:
            Failing.left -= 1
            if Failing.left == 0 or (Failing.left < 0 and Failing.lasting):
                if Failing.undoing and self.connection.in_transaction:
                    super().execute("ROLLBACK")
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
                raise error
        super().execute(statement, parameters)  # type: ignore[arg-type]
        return self


@pytest.mark.parametrize("undoing", [False, True])
@pytest.mark.parametrize("lasting", [False, True])
async def test_each_statement_that_fails_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool, undoing: bool, both_ways: str
) -> None:
    """The n-th statement fails, for n = 1, 2, 3, … until all goes well: of three transactions that run as a group each
    is whole or not there, and its caller was told which."""

    def five(prefix: str) -> Transaction[str]:
        for name in "abcde":
            yield from count(f"{prefix}-{name}")
        return "done"

    file = SqliteFile(tmp_path / "nimbos.db", connection_class=Failing)
    database = Database(await SqliteStore.open(file), dialect="sqlite")
    await database.run(make)
    monkeypatch.setattr(Failing, "lasting", lasting)
    monkeypatch.setattr(Failing, "undoing", undoing)
    whole, failures = set(), 0
    for n in range(1, 200):
        names = [f"{n}-{number}" for number in range(3)]
        Failing.left = n
        runs = [database.run(lambda name=name: five(name)) for name in names]  # type: ignore[misc]
        outcomes = await asyncio.gather(*runs, return_exceptions=True)
        all_well = Failing.left > 0
        Failing.left = None
        whole |= {name for name, outcome in zip(names, outcomes, strict=True) if outcome == "done"}
        failed = [outcome for outcome in outcomes if outcome != "done"]
        assert all(isinstance(outcome, StorageUnavailable) for outcome in failed)
        # Each of a group is tried alone, and what failed goes well now; the first six make a connection and begin.
        assert lasting or n <= 6 or len(failed) <= 1
        failures += len(failed)
        assert await everything(database) == {f"{name}-{letter}": 1 for name in whole for letter in "abcde"}
        if all_well:
            break
    assert n > 30
    quickly = both_ways == "quick"  # then the writer thread tries again what failed on the loop's
    assert failures > 60 if lasting else (failures == 0) is quickly
    await database.close()


@pytest.mark.parametrize("durable", [False, True])
async def test_each_byte_that_does_not_fit_leaves_nothing_half_written(small_disk: Path, durable: bool) -> None:
    """The disk has room for n more pages, for n = 0, 1, 2, … until a transaction fits."""
    database = Database(await SqliteStore.open(SqliteFile(small_disk / "nimbos.db")), dialect="sqlite")
    await database.run(make)
    ballast, failures = small_disk / "ballast", 0
    for pages in range(200):
        ballast.write_bytes(b"")
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        ballast.write_bytes(bytes(max(0, free - pages * 4096)))
        try:
            await database.run(lambda: large("x"), durable=durable)
            break
        except StorageUnavailable as error:
            assert "full" in error.reason
            failures += 1
            assert await everything(database) == {}
    assert failures > 5
    assert await everything(database) == {"x": 0, "x-before": 1}
    await database.close()


async def test_the_version_is_written(store: Database, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "nimbos.db")) as other:
        assert other.execute("SELECT version_num FROM nimbos_version").fetchall() == [(HEAD,)]

"""`nimbos backup`: a whole copy, while the server writes."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import Conflict, NotFound, StorageUnavailable
from tests.cli.command import refusal, run
from tests.db.tables import count, make
from tests.live import serving


@pytest.fixture
async def settings(tmp_path: Path) -> Settings:
    home = tmp_path / "home"
    database = await Database.open(Settings(home=str(home)))
    await database.run(make)
    await database.close()
    return Settings(home=str(home))


async def test_a_copy_that_is_made_while_others_write_is_of_one_moment(settings: Settings, tmp_path: Path) -> None:
    database = await Database.open(settings)
    stopping = asyncio.Event()

    def both(number: int) -> object:
        first = yield from count("first", number)
        second = yield from count("second", number)
        assert first == second

    async def work() -> None:
        while not stopping.is_set():
            await database.run(lambda: both(1))  # type: ignore[arg-type,return-value]

    workers = [asyncio.create_task(work()) for _ in range(3)]
    copies = [tmp_path / f"copy-{number}.db" for number in range(5)]
    for copy in copies[:3]:
        await database.backup(copy)
    for copy in copies[3:]:
        await Database.copy(settings, copy)
    stopping.set()
    await asyncio.gather(*workers)
    await database.close()
    for copy in copies:
        with closing(sqlite3.connect(copy)) as opened:
            assert opened.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert opened.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            sums = {row[0] for row in opened.execute("SELECT n FROM test_things")}
            assert len(sums) <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(copy.name for copy in copies), "home"]


async def test_a_copy_is_a_database(settings: Settings, tmp_path: Path) -> None:
    database = await Database.open(settings)
    await database.run(lambda: count("a", 7))
    other = tmp_path / "other"
    other.mkdir()
    await database.backup(other / "nimbos.db")
    await database.close()
    assert stat.S_IMODE((other / "nimbos.db").stat().st_mode) == 0o600
    restored = await Database.open(Settings(home=str(other)))
    assert await restored.run(lambda: count("a", 1)) == 8
    await restored.close()


async def test_a_copy_goes_over_nothing_and_needs_a_place(settings: Settings, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    with pytest.raises(Conflict, match="exists"):
        await Database.copy(settings, there)
    assert there.read_text() == "mine"
    link, folder = tmp_path / "link", tmp_path / "folder"
    link.symlink_to(tmp_path / "what is not there")
    folder.mkdir()
    with pytest.raises(Conflict, match="exists"):
        await Database.copy(settings, link)
    with pytest.raises(Conflict, match="is a folder"):
        await Database.copy(settings, folder)
    with pytest.raises(Conflict, match="exists"):
        await Database.copy(settings, Path(settings.home) / "nimbos.db")
    with pytest.raises(NotFound, match=r"there is not a folder"):
        await Database.copy(settings, there / "below")
    with pytest.raises(NotFound, match=r"no folder .*/not mounted/yet\. Make it first"):
        await Database.copy(settings, tmp_path / "not mounted" / "yet" / "copy.db")
    with pytest.raises(StorageUnavailable, match="too long"):
        await Database.copy(settings, tmp_path / ("x" * 300))
    with pytest.raises(NotFound, match="no database yet"):
        await Database.copy(Settings(home=str(tmp_path / "nowhere")), tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "home", "link", "there"]
    assert list(folder.iterdir()) == []


async def test_a_copy_that_does_not_fit_leaves_nothing(settings: Settings, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(bytes(free - 64 * 1024))
    with pytest.raises(StorageUnavailable, match="full"):
        await Database.copy(settings, small_disk / "copy.db")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    ballast.unlink()
    await Database.copy(settings, small_disk / "copy.db")
    assert [path.name for path in small_disk.iterdir()] == ["copy.db"]


async def test_a_copy_on_a_read_only_disk_is_told(settings: Settings, small_disk: Path) -> None:
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageUnavailable, match=r"[Rr]ead-only"):
        await Database.copy(settings, small_disk / "copy.db")


def test_the_command_copies_while_the_server_runs(tmp_path: Path) -> None:
    home, target = tmp_path / "home", tmp_path / "saturday.db"
    with serving(home, {"demo": {"default": {"text": "Hello."}}}, database_url="") as live:
        assert live.chat().status_code == 200
        done = run(home, "backup", str(target))
        assert done.returncode == 0, done.stderr
        assert str(target) in done.stdout
        assert live.chat().status_code == 200
        assert "exists already" in refusal(home, "backup", str(target))
        assert "There is no folder" in refusal(home, "backup", str(tmp_path / "disk" / "saturday.db"))
        assert not (tmp_path / "disk").exists()
    with closing(sqlite3.connect(target)) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert copy.execute("SELECT count(*) FROM asks").fetchone() == (1,)


def test_the_command_sends_those_with_postgresql_to_pg_dump(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    url = "postgresql://user:pa55word@127.0.0.1:1/nimbos"
    line = refusal(home, "backup", str(tmp_path / "copy"), NIMBOS_DATABASE_URL=url)
    assert "pg_dump" in line
    assert "pa55word" not in line

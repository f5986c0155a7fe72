from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nimbos.db import Database, Transaction
from nimbos.db.sqlite import SqliteStore
from tests.db.tables import make


@pytest.fixture
async def things(database: Database) -> Database:
    """The database, with the tests' own table."""
    await database.run(make)
    return database


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=3M", "tmpfs", str(folder)]
    made = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(params=["given", "quick"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything once as it is written, and once where SQLite may run it on the event loop's thread."""
    if request.param == "quick":
        run = SqliteStore.run

        async def quickly(
            store: SqliteStore, begin: Callable[[], Transaction[Any]], *, durable: bool, quick: bool
        ) -> Any:
            return await run(store, begin, durable=durable, quick=True)

        monkeypatch.setattr(SqliteStore, "run", quickly)
    return str(request.param)

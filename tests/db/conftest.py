from __future__ import annotations

from collections.abc import Callable
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

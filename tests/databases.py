"""The fixture `database`: every test that takes it runs once on SQLite and once on PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nimbos.config import Settings
from nimbos.db import Database


@pytest.fixture(params=["sqlite"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """An empty database with all tables."""
    opened = await Database.open(Settings(home=str(tmp_path)))
    yield opened
    await opened.close()

from __future__ import annotations

import pytest

from nimbos.db import Database
from tests.db.tables import make


@pytest.fixture
async def things(database: Database) -> Database:
    """The database, with the tests' own table."""
    await database.run(make)
    return database

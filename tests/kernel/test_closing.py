"""A kernel that is closed ends, whatever has just been told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nimbos.config import Settings
from nimbos.db import Database
from tests.kernel.running import ACCOUNT, PATIENCE_S, running


@pytest.mark.parametrize("turns", range(6))
async def test_a_kernel_closes_at_any_moment_after_news(tmp_path: Path, turns: int) -> None:
    """An order to stop that comes in the same turn of the loop as news must not be taken for the news."""
    settings = Settings(home=str(tmp_path))
    database = await Database.open(settings)
    async with running(database, settings) as place:
        await place.kernel.list(ACCOUNT)  # everything has begun to wait
        place.kernel.bells.look.set()
        place.kernel.bells.timer("proc_none", 0)
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await place.kernel.close()
    await database.close()

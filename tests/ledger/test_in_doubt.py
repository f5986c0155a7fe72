"""A connection that is lost between a commit and its answer: nobody knows what was done, and nothing stays reserved."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nimbos.errors import StorageUnavailable
from tests.databases import Postgres
from tests.ledger.books import ACCOUNT
from tests.ledger.shop import shop
from tests.wire import wired


@pytest.mark.parametrize("leaving", [False, True])
async def test_a_reservation_nobody_knows_of_is_given_back(postgres: Postgres, tmp_path: Path, leaving: bool) -> None:
    """`leaving`: the client goes while its ask is on the way."""
    async with wired(postgres, tmp_path) as (database, wire), shop(database, tmp_path) as opened:
        budget = await opened.books.budget("key", ACCOUNT.key, limit=1_000)
        wire.cut = True
        asking = asyncio.ensure_future(opened.ask())
        if leaving:
            while opened.rows_in_use == 0:
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait({asking})
        else:
            with pytest.raises(StorageUnavailable) as refused:
                await asking
            assert refused.value.in_doubt
        while opened.rows_in_use:
            await asyncio.sleep(0.01)
        (row,) = (await opened.rows()).values()  # it was committed
        assert (row["state"], row["outcome"]) == ("settled", "cancelled")
        assert (await opened.books.look(budget)).reserved == 0
        assert (await opened.ask(limit_tokens=3)).complete

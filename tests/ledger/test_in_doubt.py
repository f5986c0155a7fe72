"""A connection that is lost between a commit and its answer: nobody knows what was done, and nothing stays reserved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database
from nimbos.errors import StorageUnavailable
from tests.databases import Postgres, name_of
from tests.ledger.books import ACCOUNT
from tests.ledger.shop import shop


class Wire:
    """Between a client and PostgreSQL. Once `cut` is set, the next commit is done and its answer never arrives."""

    def __init__(self, url: str) -> None:
        query = parse_qs(urlsplit(url).query)
        self._socket = f"{query['host'][0]}/.s.PGSQL.{query.get('port', ['5432'])[0]}"
        self.cut = False
        self.meetings: set[asyncio.Task[None] | None] = set()

    async def meet(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        self.meetings.add(asyncio.current_task())
        server, asked = await asyncio.open_unix_connection(self._socket)
        back = asyncio.create_task(_pass_on(server, answers))
        while content := await client.read(65536):
            if self.cut and b"COMMIT\0" in content:
                self.cut = False
                back.cancel()
                await asyncio.wait({back})
                asked.write(content)
                await server.read(65536)  # "it is done", and nobody hears it
                break
            asked.write(content)
        back.cancel()
        answers.close()
        asked.close()


async def _pass_on(server: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
    while content := await server.read(65536):
        answers.write(content)
    answers.close()


@asynccontextmanager
async def wired(postgres: Postgres, home: Path) -> AsyncIterator[tuple[Database, Wire]]:
    url = postgres.with_tables()
    wire = Wire(url)
    listener = await asyncio.start_server(wire.meet, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    user = urlsplit(url).username
    through = f"postgresql://{user}@127.0.0.1:{port}/{name_of(url)}"
    database = await Database.open(Settings(home=str(home), storage=StorageSettings(database_url=through)))
    try:
        yield database, wire
    finally:
        await database.close()
        listener.close()
        await asyncio.gather(*(meeting for meeting in wire.meetings if meeting is not None))
        postgres.drop(url)


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

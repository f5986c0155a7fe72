"""A way to PostgreSQL that breaks when a test wants it, for what nobody can know then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database
from tests.databases import Postgres, name_of


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

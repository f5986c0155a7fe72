"""What servers that died left behind: asks that nobody settled, and budgets that they hold.

A server's asks are settled from its meter file by the next server of the same home (a folder whose `run/home` says
which it is). An ask of that home without a row in a file was let in and never began: it used nothing. Where several
homes share a PostgreSQL, each server says from time to time that it lives; what a silent one's asks hold is given back
after a while, and they stay to be settled by their own home.
"""

from __future__ import annotations

import asyncio
import os
import time
from functools import partial
from pathlib import Path

import structlog
from sqlalchemy import bindparam, delete, literal_column, select

from nimbos.db import Database, Row, Statement, Transaction, upsert
from nimbos.db.tables.ledger import asks, servers
from nimbos.errors import NimbosError
from nimbos.ledger.ledger import Ledger
from nimbos.ledger.rollups import keep_folding
from nimbos.ledger.rows import Settlement
from nimbos.meterfile import is_dead, leftovers
from nimbos.types import Usage, new_id

RECOVERED = "recovered"
BEAT_S = 15.0
SILENT_AFTER_S = 90.0
GONE_AFTER_S = 30 * 24 * 3600.0  # a home that is not started for so long is not waited for, if it has nothing to settle
TIDY_FIRST_S, TIDY_S = 60.0, 24 * 3600.0

_SEEN = upsert(servers, key=("id",), set=("seen_ms",))
_SERVERS_OF_HOME = Statement(select(servers).where(servers.c.home == bindparam("of")))
_SILENT = Statement(
    select(servers).where(servers.c.home != bindparam("here"), servers.c.seen_ms < bindparam("before_ms"))
)
_OPEN_OF = Statement(select(asks.c.id).where(literal_column("state = 'open'"), asks.c.server == bindparam("of")))
_FORGET = Statement(delete(servers).where(servers.c.id == bindparam("of")))
_UNSETTLED = (
    select(asks.c.id).where(asks.c.server == servers.c.id, asks.c.state != literal_column("'settled'")).exists()
)
_FORGET_GONE = Statement(
    delete(servers)
    .where(servers.c.home != bindparam("here"), servers.c.seen_ms < bindparam("before_ms"), ~_UNSETTLED)
    .returning(servers.c.id)
)

_log = structlog.get_logger(__name__)


class Recovery:
    def __init__(self, *, database: Database, ledger: Ledger, run_dir: Path) -> None:
        self._database = database
        self._ledger = ledger
        self._run_dir = run_dir
        self._home = home_id(run_dir)
        self._tasks: list[asyncio.Task[None]] = []

    async def recover(self) -> int:
        """Settles what the dead servers of this home left; the number of asks. This server is known from now on.

        Raises: StorageUnavailable; the files stay for the next try.
        """
        await self._beat()
        recovered = 0
        rows = leftovers(self._run_dir)
        try:
            for ask_id, counts in rows:
                recovered += await self._settle(ask_id, counts.usage(), counts.compute_us // 1000)
        finally:
            rows.close()
        for server in await self._database.read(_SERVERS_OF_HOME(of=self._home)):
            if server["id"] != self._ledger.server_id and not (self._run_dir / f"{server['id']}.bin").exists():
                for row in await self._database.read(_OPEN_OF(of=server["id"])):
                    recovered += await self._settle(row["id"], Usage(), 0)
                await self._database.run(partial(_forget, server))
        if recovered:
            _log.warning("ledger.recovered", asks=recovered)
        return recovered

    async def dead(self) -> list[str]:
        """Servers of this home that have ended and that `recover` has not been through. Raises: StorageUnavailable."""
        known = await self._database.read(_SERVERS_OF_HOME(of=self._home))
        others = [str(row["id"]) for row in known if row["id"] != self._ledger.server_id]
        return [server for server in others if is_dead(self._run_dir / f"{server}.bin")]

    def start(self) -> None:
        """Says from now on that this server lives, and adds up what was used. With SQLite nobody else asks; a copy of
        such a file in another home brings along servers that are not of it."""
        if self._database.dialect == "postgresql":
            self._tasks.append(asyncio.create_task(self._keep_beating(), name="ledger heartbeat"))
        self._tasks.append(asyncio.create_task(self._keep_tidying(), name="ledger servers"))
        self._tasks.append(asyncio.create_task(keep_folding(self._database), name="ledger sums"))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def release_silent(self) -> int:
        """Gives back what asks of silent servers hold; the number of asks."""
        before_ms = _now_ms() - int(SILENT_AFTER_S * 1000)
        released = 0
        for server in await self._database.read(_SILENT(here=self._home, before_ms=before_ms)):
            for row in await self._database.read(_OPEN_OF(of=server["id"])):
                released += await self._database.run(partial(self._ledger.abandon, row["id"]))
        if released:
            _log.warning("ledger.released", asks=released)
        return released

    async def forget_gone(self) -> int:
        """Servers of other homes that have been silent for long and left nothing; how many. Should one come back, it
        says again that it lives."""
        before_ms = _now_ms() - int(GONE_AFTER_S * 1000)

        def forget() -> Transaction[int]:
            return len((yield _FORGET_GONE(here=self._home, before_ms=before_ms)))

        return await self._database.run(forget)

    async def _keep_tidying(self) -> None:
        await asyncio.sleep(TIDY_FIRST_S)
        while True:
            try:
                await self.forget_gone()
            except NimbosError as error:
                _log.warning("ledger.servers_not_tidied", code=error.code)
            await asyncio.sleep(TIDY_S)

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self._beat()
                await self.release_silent()
            except NimbosError as error:
                _log.warning("ledger.no_heartbeat", code=error.code)

    async def _beat(self) -> None:
        await self._database.run(self._seen)

    def _seen(self) -> Transaction[None]:
        yield _SEEN(id=self._ledger.server_id, home=self._home, seen_ms=_now_ms())

    async def _settle(self, ask_id: str, usage: Usage, compute_ms: int) -> bool:
        settlement = Settlement(ask_id=ask_id, usage=usage, outcome=RECOVERED, compute_ms=compute_ms)
        settled = await self._database.run(lambda: self._ledger.settle(settlement), durable=True)
        self._ledger.remember(settled.prices)
        return settled.new


def home_id(run_dir: Path) -> str:
    """Which home this is; made at the first call. A path would not do: two machines may have the same."""
    file = run_dir / "home"
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not file.exists():
        draft = run_dir / f".home.{os.getpid()}"
        draft.write_text(new_id("home"))
        try:
            os.link(draft, file)  # the first of several servers wins
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return file.read_text()


def _forget(server: Row) -> Transaction[None]:
    yield _FORGET(of=server["id"])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

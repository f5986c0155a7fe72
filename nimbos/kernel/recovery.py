"""After a server died: what it held is free at once for the next server of the same home.

Only a claim makes a process run, so recovery has nothing to do but to give claims back. Whether a server is dead is
told by the lock on its meter file, which the system drops with the process; a server of another home is waited for, for
a lease. Each time is counted: a process that its servers die of is set aside (`runner.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from nimbos.db import Database, Transaction
from nimbos.work import Work

_log = structlog.get_logger(__name__)


def crew_name(server: str) -> str:
    """In whose name a server's crew holds processes. `server`: as its ledger calls it."""
    return f"{server}/process"


async def release_dead(database: Database, servers: Iterable[str]) -> int:
    """Gives back what these held; of how many servers."""
    work, released = Work(database), 0
    await database.run(work.adopt)
    for server in servers:

        def begin(server: str = server) -> Transaction[None]:
            yield from work.lapse_all(crew_name(server))

        await database.run(begin, durable=True)
        released += 1
    if released:
        _log.info("kernel.dead_servers", servers=released)
    return released

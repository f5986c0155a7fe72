"""A server in a process of its own that its process kills: `python -m tests.kernel.a_doomed_server HOME DEATHS_MAX`.

At its start it takes up what dead servers of its home left, like every server.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.kernel import release_dead, runner
from nimbos.kernel.events import Note
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.ledger import Ledger, Recovery
from nimbos.meterfile import MeterFile
from tests.kernel.running import running


async def kill(holding: Holding) -> None:
    await holding.append(Draft(body=Note(about="said", text="it begins")))
    os.kill(os.getpid(), signal.SIGKILL)


async def serve(home: Path) -> None:
    meter_file = MeterFile.create(home / "run")
    settings = Settings(home=str(home))
    database = await Database.open(settings)
    recovery = Recovery(database=database, ledger=Ledger(server_id=meter_file.path.stem), run_dir=home / "run")
    await release_dead(database, await recovery.dead())  # before their files are gone
    await recovery.recover()
    async with running(database, settings, {"plain": kill}, server=meter_file.path.stem, lease_s=3600):
        await asyncio.Event().wait()


if __name__ == "__main__":
    runner.DEATHS_MAX = int(sys.argv[2])
    asyncio.run(serve(Path(sys.argv[1])))

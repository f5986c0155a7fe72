"""A server in a process of its own, for tests that stop or kill it: `python -m tests.kernel.a_server HOME URL LEASE_S`.

It drives whatever is ready: notes that it began, says so, and stops itself (SIGSTOP) before it goes on. When it is
continued it tries to write once more, and says what came of that.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database
from nimbos.kernel import Reason
from nimbos.kernel.events import Note
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.ledger import Ledger, Recovery
from nimbos.meterfile import MeterFile
from tests.kernel.running import running


def say(*words: object) -> None:
    print(*words, flush=True)


async def stall(holding: Holding) -> None:
    await holding.append(Draft(body=Note(about="said", text="before")))
    say("driving", holding.holder.epoch)
    os.kill(os.getpid(), signal.SIGSTOP)
    late = asyncio.ensure_future(holding.append(Draft(body=Note(about="said", text="after"))))
    try:
        await asyncio.wait({late})
    except asyncio.CancelledError:  # the crew was quicker to find that the claim is gone
        await asyncio.wait({late})
    error = late.exception()
    say("wrote" if error is None else type(error).__name__)
    if error is not None:
        raise error
    await holding.exit(Reason.OK)


async def serve(home: Path, url: str, lease_s: float) -> None:
    meter_file = MeterFile.create(home / "run")
    settings = Settings(home=str(home), storage=StorageSettings(database_url=url))
    database = await Database.open(settings)
    ledger = Ledger(server_id=meter_file.path.stem)
    await Recovery(database=database, ledger=ledger, run_dir=home / "run").recover()
    async with running(database, settings, {"plain": stall}, server=meter_file.path.stem, lease_s=lease_s):
        say("serving", meter_file.path.stem)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])))

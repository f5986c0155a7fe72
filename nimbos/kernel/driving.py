"""Who drives what: an agent by `agent.py`, a durable function by `durable.py`; one gate and one thinker for all."""

from __future__ import annotations

from nimbos.kernel.agent import Agent
from nimbos.kernel.durable import Durable
from nimbos.kernel.gate import Gate
from nimbos.kernel.holding import Holding, Shared
from nimbos.kernel.programs import Programs
from nimbos.kernel.runner import Drive
from nimbos.kernel.think import Thinker
from nimbos.kernel.tools import ToolWorkers, Workspaces
from nimbos.service import Service


def driver(shared: Shared, *, service: Service, programs: Programs, workspaces: Workspaces) -> Drive:
    workers = ToolWorkers(programs, workspaces)
    gate = Gate(shared, programs=programs, workers=workers)
    thinker = Thinker(service=service, database=shared.database, segments=shared.segments)
    durable = Durable(gate=gate, thinker=thinker, segments=shared.segments, workers=workers)
    agent = Agent(service=service, thinker=thinker, gate=gate, segments=shared.segments)

    async def drive(holding: Holding) -> None:
        await (durable if holding.program.entry else agent).drive(holding)

    return drive

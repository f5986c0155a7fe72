"""Which worker is whose: one for each process that this server runs, made when it is first asked for, closed with the
run. What a program's tools are is asked once for each program, as a program never changes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from nimbos.kernel.program import TOOLS
from nimbos.kernel.programs import Programs
from nimbos.kernel.tools.specs import ToolSpec
from nimbos.kernel.tools.worker import Place, ToolWorker
from nimbos.kernel.tools.workspaces import Workspaces
from nimbos.toolwire import WorkerLimits

if TYPE_CHECKING:
    from nimbos.kernel.holding import Holding
    from nimbos.kernel.program import Program

_SPECS_KEPT = 256


class ToolWorkers:
    def __init__(self, programs: Programs, workspaces: Workspaces, *, limits: WorkerLimits | None = None) -> None:
        self._programs = programs
        self._workspaces = workspaces
        self._limits = limits
        self._workers: WeakKeyDictionary[Holding, ToolWorker] = WeakKeyDictionary()
        self._specs: OrderedDict[str, tuple[ToolSpec, ...]] = OrderedDict()

    def of(self, holding: Holding) -> ToolWorker:
        """Not started yet if it is new; `holding.closing` ends it."""
        worker = self._workers.get(holding)
        if worker is None:
            program, pid = holding.program, holding.pid

            async def place() -> Place:
                folder = await self._programs.folder(program)
                workspace = await self._workspaces.ready(pid)
                return Place(folder=folder, workspace=workspace, output=self._workspaces.output(pid))

            worker = ToolWorker(place, tools=_file_of_tools(program), entry=program.entry, limits=self._limits)
            self._workers[holding] = worker
            holding.closing.push_async_callback(worker.close)
        return worker

    async def specs(self, holding: Holding) -> tuple[ToolSpec, ...]:
        """The tools that the program has and its manifest allows. Raises: BrokenProgram, StorageUnavailable."""
        program = holding.program
        if not _file_of_tools(program):
            return ()
        specs = self._specs.get(program.hash)
        if specs is None:
            specs = self._specs[program.hash] = await self.of(holding).describe()
            if len(self._specs) > _SPECS_KEPT:
                self._specs.popitem(last=False)
        allowed = program.manifest.tools.python
        return specs if allowed is None else tuple(spec for spec in specs if spec.name in allowed)


def _file_of_tools(program: Program) -> str:
    return TOOLS if any(file.path == TOOLS for file in program.files) else ""

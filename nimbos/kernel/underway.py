"""The steps of a durable function that have no record yet: each is under way, or waits for what arrives from outside.
They run at once, on one holding. Knows no worker; `durable.py` says who asked for what and is told what came of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from nimbos.errors import (
    EngineFailed,
    Forbidden,
    InvalidRequest,
    ModelUnusable,
    NimbosError,
    NotFound,
    Overloaded,
)
from nimbos.kernel.branches import Parting, stopped
from nimbos.kernel.events import BudgetSettled, ModelFailed, ModelIntent
from nimbos.kernel.gate import Gate
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.steps import Asked, record_of, request_of, syscall_of
from nimbos.kernel.syscall import Syscall, Wait
from nimbos.kernel.think import Thinker
from nimbos.kernel.view import Call
from nimbos.types import new_id

_REFUSALS = (InvalidRequest, NotFound, Forbidden, ModelUnusable, EngineFailed, Overloaded)  # which waiting mends not


@dataclass(slots=True, eq=False)
class Open:
    """`work`: a step; or a call that no step of this run asked for. `number`: of whoever waits for the step. `wait`:
    why it is not under way."""

    work: Asked | Syscall
    number: int | None = None
    wait: Wait | None = None


class Underway:
    """Of one run. `open`: by call id."""

    def __init__(self, holding: Holding, *, gate: Gate, thinker: Thinker) -> None:
        self.open: dict[str, Open] = {}
        self._holding = holding
        self._gate = gate
        self._thinker = thinker
        self._running: dict[asyncio.Task[Wait | None], Open] = {}
        self._parting = Parting(lambda: self._running)
        holding.alone = self._parting.alone

    @property
    def running(self) -> tuple[asyncio.Task[Wait | None], ...]:
        return tuple(self._running)

    @property
    def waits(self) -> list[Wait]:
        return [one.wait for one in self.open.values() if one.wait is not None]

    def begin(self, one: Open) -> None:
        call_id = one.work.call_id
        one.wait = None
        self.open[call_id] = one
        if not self._parting.begun:  # else this run ends, and the next one begins it
            task = asyncio.create_task(self._perform(one.work), name=f"{self._holding.pid} {call_id}")
            self._running[task] = one

    def look_again(self) -> None:
        """Something arrived: what waits may be over."""
        for one in list(self.open.values()):
            if one.wait is not None:
                self.begin(one)

    def take_up(self, wanted: Callable[[Call], bool]) -> None:
        """Calls that are open and that no step of this run has asked for."""
        for call_id, call in self._holding.view.calls.items():
            if call_id not in self.open and wanted(call):
                intent = call.intent
                self.begin(Open(Syscall(call_id=call_id, verb=intent.verb, resource=intent.resource, step=intent.step)))

    def ended(self) -> list[Open]:
        """Those that have a record now, and are open no more. Raises: what one of them raised, like Parked."""
        over = []
        for task in [task for task in self._running if task.done()]:
            one = self._running.pop(task)
            one.wait = task.result()
            if one.wait is None:
                del self.open[one.work.call_id]
                over.append(one)
        return over

    async def until_none_runs(self) -> None:
        """Raises: as `ended`."""
        while self._running:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            self.ended()

    async def put_away(self) -> None:
        """What is under way ends with the run."""
        await stopped(self._running)

    async def _perform(self, work: Asked | Syscall) -> Wait | None:
        """None: it has a record now."""
        if isinstance(work, Syscall):
            done = await self._gate.attempt(self._holding, work)
            return done if isinstance(done, Wait) else None
        if record_of(self._holding.view, work) is None:
            if work.think is not None:
                await self._think(work)
            elif isinstance(done := await self._gate.attempt(self._holding, syscall_of(work)), Wait):
                return done
        recorded = record_of(self._holding.view, work)
        assert recorded is not None, work.key
        return recorded if isinstance(recorded, Wait) else None

    async def _think(self, asked: Asked) -> None:
        assert asked.think is not None
        holding = self._holding
        try:
            request = request_of(asked.think, holding.program)
            await self._thinker.think(holding, request, step=asked.key, purpose="step")
        except _REFUSALS as error:
            if asked.key not in holding.view.steps:
                await self._refused(asked, error)

    async def _refused(self, asked: Asked, error: NimbosError) -> None:
        """Recorded like an answer: the function may go another way for it, and must find that way again."""
        ask_id = new_id("ask")
        await self._holding.append(
            Draft(body=ModelIntent(ask_id=ask_id, model=self._holding.view.model, step=asked.key, purpose="step")),
            Draft(body=ModelFailed(ask_id=ask_id, code=error.code, message=error.message)),
            Draft(body=BudgetSettled(used={}, ask_id=ask_id)),
        )

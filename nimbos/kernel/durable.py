"""A durable function: code in the program's worker whose steps come here, and are answered from the log or done.

    from the top ─▶ step ─┬─ has a record ─▶ answered at once          the function ends ─▶ exit
                          └─ has none ─▶ gate or thinker ─▶ record ─▶ answered
                                             └─ must wait ─▶ when every open step waits and the code is quiet: park

Parked, the function loses its coroutine and its process. Woken, or after any failure, it runs from the top again. What
a function can see is made from records alone, so it sees the same each time. Read `steps.py` for keys, and
`adk/steps.py` for what a program writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nimbos.errors import (
    BrokenProgram,
    EngineFailed,
    Forbidden,
    InvalidRequest,
    ModelUnusable,
    NimbosError,
    NotFound,
    PayloadTooLarge,
)
from nimbos.kernel.events import BudgetSettled, ModelFailed, ModelIntent, Note
from nimbos.kernel.fold import CallStatus
from nimbos.kernel.gate import Gate
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.releasing import MARK, is_released
from nimbos.kernel.segments import Segments
from nimbos.kernel.steps import Asked, BadStep, Occurrences, record_of, request_of, said_of, syscall_of
from nimbos.kernel.syscall import Syscall, Wait
from nimbos.kernel.think import Thinker
from nimbos.kernel.tools import FunctionRun, NotJson, ToolWorkers, WorkerDied, read_value
from nimbos.kernel.view import Recorded
from nimbos.kernel.words import Reason
from nimbos.toolwire import FRAME_BYTES_MAX, Quiet, RunDone, Step, shortened
from nimbos.types import new_id

STEPS_MAX = 10_000  # of one run
DEATHS_MAX = 3  # of the worker, without a new record
_NOTES_MAX = 20
_REFUSALS = (InvalidRequest, NotFound, Forbidden, ModelUnusable, EngineFailed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Durable:
    """One for a server."""

    gate: Gate
    thinker: Thinker
    segments: Segments
    workers: ToolWorkers

    async def drive(self, holding: Holding) -> None:
        """Raises: Parked, Exited; whatever ends the run so that another one goes on."""
        await _Life(self, _Branching(holding)).lead()


class _Branching(Holding):
    """The same holding, for steps that run at once: whoever parks waits until nothing else is under way, so that no
    outcome is left without a hand to write it."""

    def __init__(self, holding: Holding) -> None:
        self.__dict__ = holding.__dict__
        self.alone: Callable[[], Awaitable[None]]

    async def park(self, *arguments: Any, **named: Any) -> None:
        await self.alone()
        await super().park(*arguments, **named)


@dataclass(slots=True, eq=False)
class _Open:
    """A step without a record. `number`: of whoever waits for it in this run. `wait`: why it has none yet."""

    work: Asked | Syscall
    number: int | None = None
    wait: Wait | None = None


class _Life:
    """From a claim until it parks or exits. `_running`: what is under way, by task."""

    def __init__(self, durable: Durable, holding: _Branching) -> None:
        holding.alone = self._alone
        self._durable = durable
        self._holding = holding
        self._open: dict[str, _Open] = {}
        self._running: dict[asyncio.Task[Wait | None], _Open] = {}
        self._parking = asyncio.Lock()  # never let go: whoever has it ends this life
        self._parkers: set[asyncio.Task[Any] | None] = set()
        self._another = asyncio.Event()  # parks, too
        self._asked: dict[str, Asked] = {}
        self._occurrences = Occurrences()
        self._steps = 0
        self._quiet: int | None = None
        self._mail = True

    async def lead(self) -> None:
        holding = self._holding
        try:
            await self._durable.gate.release(holding)
            self._take_up(lambda call_id, status: is_released(call_id))
            given = await self._durable.segments.get(holding.view.account, holding.view.input)
            deaths = 0
            while deaths < DEATHS_MAX:
                recorded = len(holding.view.steps)
                died = await self._from_the_top(given)
                deaths = deaths + 1 if len(holding.view.steps) == recorded and not died.deadline else 0
            await self._exit(Reason.FAILED, error=f"Its process died {deaths} times at the same place: {died}.")
        except BrokenProgram as error:
            await holding.exit(Reason.FAILED, error=error.message)
        finally:
            await self._put_away()

    async def _from_the_top(self, given: Any) -> WorkerDied:
        """Returns when the worker is gone. Raises: Parked, Exited …"""
        self._occurrences, self._asked, self._steps, self._quiet = Occurrences(), {}, 0, None
        for left in self._open.values():
            left.number = None
        try:
            run = await self._durable.workers.of(self._holding).run_function(given)
            await self._follow(run)
        except WorkerDied as died:
            return died
        raise AssertionError("a function is followed to its end")

    async def _follow(self, run: FunctionRun) -> None:
        """Raises: WorkerDied, Parked, Exited …"""
        incoming = asyncio.create_task(run.next())
        bell = asyncio.create_task(self._holding.mail.wait())
        try:
            while True:
                await self._when_idle(run)
                limit_s = None if self._running else self._holding.program.manifest.limits.tool_deadline_s
                waited: set[asyncio.Task[Any]] = {incoming, bell, *self._running}
                done, _ = await asyncio.wait(waited, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    await self._exit(Reason.FAILED, error=f"Its code took more than {limit_s:g} s between two steps.")
                if bell in done:
                    self._mail, bell = True, asyncio.create_task(self._holding.mail.wait())
                await self._settle(run)
                if incoming in done:
                    message, incoming = incoming.result(), asyncio.create_task(run.next())
                    await self._take(run, message)
        finally:
            await _ended({incoming, bell})

    # --- what the function says

    async def _take(self, run: FunctionRun, message: Step | Quiet | RunDone) -> None:
        if isinstance(message, RunDone):
            await self._ended(message)
        elif isinstance(message, Step):
            await self._step(run, message)
        elif message.number == self._quiet:
            self._quiet = None
            waits = [left.wait for left in self._open.values() if left.wait is not None]
            if waits and not self._running and not self._mail:
                await self._durable.gate.park(self._holding, waits)

    async def _step(self, run: FunctionRun, step: Step) -> None:
        self._quiet = None
        self._steps += 1
        if self._steps > STEPS_MAX or len(self._holding.view.steps) > STEPS_MAX:
            await self._exit(Reason.FAILED, error=f"It asked for more than {STEPS_MAX} steps.")
        try:
            asked = self._occurrences.read(step)
        except BadStep as bad:
            await run.answer(step.number, error="bad_step", message=str(bad))
            return
        self._asked[asked.key] = asked
        recorded = record_of(self._holding.view, asked)
        if isinstance(recorded, Recorded):
            await self._answer(run, step.number, asked, recorded)
        elif (left := self._open.get(asked.call_id)) is not None:  # from before the worker died
            left.number = step.number
        else:
            self._begin(asked.call_id, _Open(asked, step.number))

    async def _answer(self, run: FunctionRun, number: int, asked: Asked, recorded: Recorded) -> None:
        said = await said_of(recorded, asked, self._durable.segments, self._holding.view.account)
        await run.answer(number, value=said.value, error=said.error, message=said.message)

    # --- what is done for it

    def _begin(self, call_id: str, left: _Open) -> None:
        self._open[call_id] = left
        if not self._parking.locked():  # else this life ends, and the next one begins it
            task = asyncio.create_task(self._perform(left.work), name=f"{self._holding.pid} {call_id}")
            self._running[task] = left

    async def _perform(self, work: Asked | Syscall) -> Wait | None:
        """None: it has a record now."""
        if isinstance(work, Syscall):
            done = await self._durable.gate.attempt(self._holding, work)
            return done if isinstance(done, Wait) else None
        if record_of(self._holding.view, work) is None:
            if work.think is not None:
                await self._think(work)
            elif isinstance(done := await self._durable.gate.attempt(self._holding, syscall_of(work)), Wait):
                return done
        recorded = record_of(self._holding.view, work)
        assert recorded is not None, work.key
        return recorded if isinstance(recorded, Wait) else None

    async def _think(self, asked: Asked) -> None:
        assert asked.think is not None
        holding = self._holding
        try:
            request = request_of(asked.think, holding.program)
            await self._durable.thinker.think(holding, request, step=asked.key, purpose="step")
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

    async def _settle(self, run: FunctionRun) -> None:
        """What came to its end is answered. Raises: what it raised, Parked for one that had to park."""
        for task in [task for task in self._running if task.done()]:
            left = self._running.pop(task)
            left.wait = task.result()
            if left.wait is None:
                work, number = left.work, left.number
                self._open.pop(work.call_id, None)
                if isinstance(work, Asked) and number is not None:
                    recorded = record_of(self._holding.view, work)
                    assert isinstance(recorded, Recorded)
                    await self._answer(run, number, work, recorded)

    async def _when_idle(self, run: FunctionRun) -> None:
        """Nothing is under way: mail is taken, which may end what waits; else the function is asked whether more is
        to come, and if not, it parks."""
        if self._running or self._quiet is not None:
            return
        if self._mail:
            self._mail = False
            await self._holding.take_mail()
            self._look_again()
        elif any(left.wait is not None for left in self._open.values()):
            self._quiet = await run.ask_quiet()

    def _look_again(self) -> None:
        for call_id, left in list(self._open.items()):
            if left.wait is not None:
                left.wait = None
                self._begin(call_id, left)

    def _take_up(self, wanted: Callable[[str, CallStatus], bool]) -> None:
        """Calls that are open and that no step of this run asks for."""
        for call_id, call in self._holding.view.calls.items():
            if call_id not in self._open and wanted(call_id, call.status):
                intent = call.intent
                work = Syscall(call_id=call_id, verb=intent.verb, resource=intent.resource, step=intent.step)
                self._begin(call_id, _Open(work))

    async def _alone(self) -> None:
        """Until all that is under way has ended or parks, too. The first goes on, the others wait for ever."""
        self._parkers.add(asyncio.current_task())
        self._another.set()
        await self._parking.acquire()
        while others := {task for task in self._running if task not in self._parkers and not task.done()}:
            self._another.clear()
            another = asyncio.create_task(self._another.wait())
            try:
                await asyncio.wait({*others, another}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                another.cancel()

    # --- its end

    async def _ended(self, done: RunDone) -> None:
        """What is under way is awaited, and what nobody knows the outcome of is asked about, before it exits."""
        self._take_up(lambda call_id, status: status is not CallStatus.INTENDED)
        while self._running:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in self._running if task.done()]:
                left = self._running.pop(task)
                left.wait = task.result()
        unknown = self._holding.view.calls
        waits = [
            left.wait
            for call_id, left in self._open.items()
            if left.wait is not None and call_id in unknown and unknown[call_id].status is not CallStatus.INTENDED
        ]
        if waits:
            await self._durable.gate.park(self._holding, waits)
        if done.error:
            await self._exit(Reason.FAILED, error=shortened(done.message or done.error), drafts=self._changed())
        try:
            value = read_value(done.value, limit=FRAME_BYTES_MAX)
            result = await self._durable.segments.put(self._holding.view.account, value)
        except (NotJson, InvalidRequest, PayloadTooLarge) as error:
            await self._exit(Reason.FAILED, error=f"What it returned cannot be kept: {error}")
        await self._exit(Reason.OK, result=result, drafts=self._changed())

    def _changed(self) -> list[Draft]:
        """A function that ended has asked again for every step there is a record of, unless it changed."""
        unasked = [key for key in self._holding.view.steps if key.removesuffix(MARK) not in self._asked]
        said = (
            f"The recorded step {key} was not asked for again: what has another name or other arguments is a new step."
            for key in unasked[:_NOTES_MAX]
        )
        return [Draft(body=Note(about="changed_step", text=text)) for text in said]

    async def _exit(
        self, reason: Reason, *, result: str | None = None, error: str = "", drafts: Sequence[Draft] = ()
    ) -> None:
        """Raises: Exited."""
        await self._holding.exit(reason, result=result, error=error, drafts=drafts)

    async def _put_away(self) -> None:
        """What is still under way ends with the run."""
        await _ended(self._running)


async def _ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancelled, and put away. What they raised is told by what ended the run, or by the log."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

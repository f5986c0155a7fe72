"""A durable function: code in the program's worker whose steps come here, and are answered from the log or done.

    from the top ─▶ step ─┬─ has a record ─▶ answered at once          the function ends ─▶ exit
                          └─ has none ─▶ gate or thinker ─▶ record ─▶ answered
                                             └─ must wait ─▶ when every open step waits and the code is quiet: park

Parked, the function loses its coroutine and its process. Woken, or after any failure, it runs from the top again. What
a function can see is made from records alone, so it sees the same each time. Read `steps.py` for keys, `underway.py`
for steps without a record, and `adk/steps.py` for what a program writes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from nimbos.errors import BrokenProgram, InvalidRequest, PayloadTooLarge
from nimbos.kernel.branches import stopped
from nimbos.kernel.events import Note
from nimbos.kernel.gate import Gate
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.outward import TRIES_MAX
from nimbos.kernel.releasing import MARK, is_released
from nimbos.kernel.segments import Segments
from nimbos.kernel.steps import Asked, BadStep, Occurrences, record_of, said_of
from nimbos.kernel.think import Thinker
from nimbos.kernel.tools import FunctionRun, NotJson, ToolWorkers, WorkerDied, read_value
from nimbos.kernel.underway import Open, Underway
from nimbos.kernel.view import CallStatus, Recorded
from nimbos.kernel.words import Reason
from nimbos.toolwire import Quiet, RunDone, Step, shortened

STEPS_MAX = 10_000  # of one process
DEATHS_MAX = 3  # of the worker, without a new record of a step that it did not end
SUSPECTED_MAX = DEATHS_MAX * TRIES_MAX  # likewise, with new calls under way each time
_NOTES_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Durable:
    """One for a server."""

    gate: Gate
    thinker: Thinker
    segments: Segments
    workers: ToolWorkers

    async def drive(self, holding: Holding) -> None:
        """Raises: Parked, Exited; whatever ends the run so that another one goes on."""
        await _Run(self, holding).lead()


class _Run:
    """From a claim until it parks or exits. `_asked`: the steps that the function has asked for since its top."""

    def __init__(self, durable: Durable, holding: Holding) -> None:
        self._durable = durable
        self._holding = holding
        self._underway = Underway(holding, gate=durable.gate, thinker=durable.thinker)
        self._asked: dict[str, Asked] = {}
        self._occurrences = Occurrences()
        self._steps = 0
        self._quiet: int | None = None  # the number of the question whether more is to come
        self._mail = True

    async def lead(self) -> None:
        holding = self._holding
        try:
            await self._durable.gate.release(holding)
            self._underway.take_up(lambda call: is_released(call.intent.call_id))
            given = await self._durable.segments.get(holding.view.account, holding.view.input)
            deaths = suspected = 0
            while deaths < DEATHS_MAX and suspected < SUSPECTED_MAX:
                survived = self._survived()
                died = await self._from_the_top(given)
                if died.known or self._survived() != survived:
                    deaths = suspected = 0
                elif died.suspects > 1:
                    suspected += 1
                else:
                    deaths += 1
                if died.suspects > 1:  # where the function does not run, a call that ends its process is known
                    await self._underway.until_none_runs()
            await self._leave_nothing_unknown()
            times = deaths + suspected
            await holding.exit(Reason.FAILED, error=f"Its process died {times} times at the same place: {died}.")
        except BrokenProgram as error:
            await self._leave_nothing_unknown()
            await holding.exit(Reason.FAILED, error=error.message)
        finally:
            await self._underway.put_away()

    def _survived(self) -> int:
        """How many records there are, but of those whose call is held to have ended the process."""
        return sum(recorded.error != "died" for recorded in self._holding.view.steps.values())

    async def _from_the_top(self, given: Any) -> WorkerDied:
        """Returns when the worker is gone. Raises: Parked, Exited …"""
        self._occurrences, self._asked, self._steps, self._quiet = Occurrences(), {}, 0, None
        for one in self._underway.open.values():
            one.number = None
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
                if bell.done() and not self._mail:  # what rang is taken
                    bell = asyncio.create_task(self._holding.mail.wait())
                running = self._underway.running
                waited: set[asyncio.Task[Any]] = {incoming, *running, *(() if bell.done() else (bell,))}
                limit_s = None if running else self._holding.program.manifest.limits.tool_deadline_s
                done, _ = await asyncio.wait(waited, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    await self._leave_nothing_unknown()
                    error = f"Its code took more than {limit_s:g} s between two steps; long work belongs into a tool."
                    await self._holding.exit(Reason.FAILED, error=error)
                self._mail = self._mail or bell in done
                await self._answer_ended(run)
                if incoming in done:
                    message, incoming = incoming.result(), asyncio.create_task(run.next())
                    await self._take(run, message)
        finally:
            await stopped({incoming, bell})

    async def _when_idle(self, run: FunctionRun) -> None:
        """Nothing is under way: mail is taken, which may end what waits; else the function is asked whether more is
        to come."""
        if self._underway.running or self._quiet is not None:
            return
        if self._mail:
            self._mail = False
            await self._holding.take_mail()
            self._underway.look_again()
        elif self._underway.waits:
            self._quiet = await run.ask_quiet()

    async def _take(self, run: FunctionRun, message: Step | Quiet | RunDone) -> None:
        if isinstance(message, RunDone):
            await self._end(message)
        elif isinstance(message, Step):
            await self._step(run, message)
        elif message.number == self._quiet:
            self._quiet = None
            waits = self._underway.waits
            if waits and not self._underway.running and not self._mail:
                await self._durable.gate.park(self._holding, waits)

    async def _step(self, run: FunctionRun, step: Step) -> None:
        self._quiet = None
        self._steps += 1
        view = self._holding.view
        if max(self._steps, len(view.steps)) > STEPS_MAX:
            await self._leave_nothing_unknown()
            await self._holding.exit(Reason.FAILED, error=f"It asked for more than {STEPS_MAX} steps.")
        try:
            asked = self._occurrences.read(step)
        except BadStep as bad:
            await run.answer(step.number, error="bad_step", message=str(bad))
            return
        self._asked[asked.key] = asked
        recorded = record_of(view, asked)
        if isinstance(recorded, Recorded):
            await self._answer(run, step.number, asked, recorded)
        elif (open := self._underway.open.get(asked.call_id)) is not None:  # from before the worker died
            open.number = step.number
        else:
            self._underway.begin(Open(asked, step.number))

    async def _answer_ended(self, run: FunctionRun) -> None:
        """Raises: what a step raised, like Parked for one that had to park; WorkerDied."""
        for one in self._underway.ended():
            work = one.work
            if isinstance(work, Asked) and one.number is not None:
                recorded = record_of(self._holding.view, work)
                assert isinstance(recorded, Recorded)
                await self._answer(run, one.number, work, recorded)

    async def _answer(self, run: FunctionRun, number: int, asked: Asked, recorded: Recorded) -> None:
        said = await said_of(recorded, asked, self._durable.segments, self._holding.view.account)
        await run.answer(number, value=said.value, error=said.error, message=said.message)

    async def _leave_nothing_unknown(self) -> None:
        """What is under way is awaited, and what nobody knows the outcome of is asked about, before it exits.

        Raises: Parked.
        """
        self._underway.take_up(lambda call: call.status is not CallStatus.INTENDED)
        await self._underway.until_none_runs()
        calls = self._holding.view.calls
        begun = [id for id in self._underway.open if id in calls and calls[id].status is not CallStatus.INTENDED]
        waits = [wait for id in begun if (wait := self._underway.open[id].wait) is not None]
        if waits:
            await self._durable.gate.park(self._holding, waits)

    async def _end(self, done: RunDone) -> None:
        await self._leave_nothing_unknown()
        exit = self._holding.exit
        if done.error:
            await exit(Reason.FAILED, error=shortened(done.message or done.error), drafts=self._changed())
        try:
            value = read_value(done.value)
            result = await self._durable.segments.put(self._holding.view.account, value)
        except (NotJson, InvalidRequest, PayloadTooLarge) as error:
            await exit(Reason.FAILED, error=f"What it returned cannot be kept: {error}")
        await exit(Reason.OK, result=result, drafts=self._changed())

    def _changed(self) -> list[Draft]:
        """A function that ended has asked again for every step there is a record of, unless it changed."""
        unasked = [key for key in self._holding.view.steps if key.removesuffix(MARK) not in self._asked]
        said = (
            f"The recorded step {key} was not asked for again: what has another name or other arguments is a new step."
            for key in unasked[:_NOTES_MAX]
        )
        return [Draft(body=Note(about="changed_step", text=text)) for text in said]

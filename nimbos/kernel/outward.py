"""Calls that go outside: started, run, and, when they are cut off, dealt with as their effect class says.

    started ─┬─▶ done                               whatever the tool said, also that it failed
             ├─▶ started again                      pure and idempotent; checkable, if it did not happen
             └─▶ unknown ─▶ a person's word         opaque, and what cannot be told even so

A driver that loses a call while its server lives may try again a few times. A call that was lost with others, by one of
them, is made again alone, also without the function that asked for it, and only what it then loses by itself counts. A
call that a dead server left behind is taken up again more often, but not for ever: it may be what kills them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from nimbos.errors import BrokenProgram, BudgetExhausted, Overloaded
from nimbos.kernel import calling
from nimbos.kernel.budgets import exhausted
from nimbos.kernel.calling import Ending
from nimbos.kernel.deciding import settled
from nimbos.kernel.drivers.answers import Answered, Lost
from nimbos.kernel.drivers.outside import Job, Nothing, run_tool, verify_tool
from nimbos.kernel.effects import RECOVERY, Recovery
from nimbos.kernel.events import CallIntent
from nimbos.kernel.fold import Call, CallStatus
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.segments import Segments
from nimbos.kernel.syscall import Also, Outcome, Wait
from nimbos.kernel.tools import ToolWorkers, WorkerDied
from nimbos.kernel.words import Effect, Reason, State, Verdict

TRIES_MAX = 3
RECOVERIES_MAX = 20
STALL_S = 1.0  # between a call's start and its driver; a lease lasts several times as long

Begin: TypeAlias = Callable[[], Awaitable[None]]


@dataclass(slots=True, eq=False)
class _Tries:
    """Of a call, in this run. `failed`: that nothing but the call itself can have ended. `cut_off`: by another call.
    `alone`: nothing is to run beside it from now on."""

    failed: int = 0
    cut_off: int = 0
    alone: bool = False

    @property
    def over(self) -> bool:
        return self.failed >= TRIES_MAX

    def count(self, lost: Lost) -> None:
        self.failed += lost.suspects == 1
        self.cut_off += lost.suspects == 0
        self.alone = self.alone or lost.suspects > 1 or self.cut_off >= TRIES_MAX


class Outward:
    def __init__(self, segments: Segments, workers: ToolWorkers) -> None:
        self._segments = segments
        self._workers = workers

    async def begin(self, holding: Holding, intent: CallIntent, arguments: Any, also: Also) -> Outcome | Wait:
        """A new call. Raises: Parked when nothing is left to spend, and then nothing of the call is written."""
        begin = partial(calling.begin, holding, intent, label=calling.context_label(holding))
        return await self._run(holding, intent.call_id, arguments, also, begin)

    async def start(
        self, holding: Holding, call: Call, arguments: Any, also: Also, *, first: Sequence[Draft] = ()
    ) -> Outcome | Wait:
        """One that was intended, and is approved now or to be tried again. `first`: events that say so.

        Raises: as `begin`; an answer that was not consumed is found again.
        """
        again = partial(calling.again, holding, call, first=first)
        return await self._run(holding, call.intent.call_id, arguments, also, again)

    async def recover(self, holding: Holding, call: Call, arguments: Any, also: Also) -> Outcome | Wait:
        """A driver was given it by a server that is gone."""
        recovery = RECOVERY[call.intent.effect]
        if recovery is Recovery.VERIFY:
            return await self._verify(holding, call, arguments, also)
        if recovery is Recovery.ASK:
            return await self._lose(holding, call)
        if call.attempts >= RECOVERIES_MAX:
            return await self._give_up(holding, call, also)
        again = partial(calling.again, holding, call, tried_ms=_at_most_ms(holding, call))
        return await self._run(holding, call.intent.call_id, arguments, also, again)

    async def resolve(self, holding: Holding, call: Call, arguments: Any, also: Also) -> Outcome | Wait:
        """Nobody knows what came of it, unless a person has said so."""
        said = await settled(holding, self._segments, call.intent)
        if said is None:
            return _in_doubt(call.intent.call_id)
        if said.verdict is Verdict.RETRY:
            return await self.start(holding, call, arguments, also, first=said.drafts)
        ending = Ending(first=said.drafts)
        return await calling.finish(holding, self._segments, call.intent.call_id, said.answered, ending, also=also)

    async def _run(
        self, holding: Holding, call_id: str, arguments: Any, also: Also, begin: Begin, tries: _Tries | None = None
    ) -> Outcome | Wait:
        """Until it has an outcome, or nobody can know it. `begin` writes that a driver is given it.

        Raises: Parked when nothing is left to spend.
        """
        tries = tries or _Tries()
        while True:
            try:
                call, answered, tried_ms = await self._try(holding, call_id, arguments, begin, tries)
            except BudgetExhausted as error:
                if _is_begun(holding, call_id):
                    begun = holding.view.calls[call_id]
                    await calling.put_off(holding, begun, tried_ms=_at_most_ms(holding, begun))
                await exhausted(holding, error)
                raise AssertionError("a process that is parked goes no further") from error
            except Overloaded as error:
                return _held(holding, call_id, error)
            if isinstance(answered, Lost):
                tries.count(answered)
                after = await self._after_loss(holding, call, arguments, answered, also, tries, tried_ms)
                if after is None:
                    begin = partial(calling.again, holding, call, tried_ms=tried_ms)
                    continue
                if not isinstance(after, Answered):
                    return after
                answered = after
            ending = Ending(reserved_ms=calling.reserved_ms(holding, call.intent), used_ms=tried_ms)
            return await calling.finish(holding, self._segments, call_id, answered, ending, also=also)

    async def _try(
        self, holding: Holding, call_id: str, arguments: Any, begin: Begin, tries: _Tries
    ) -> tuple[Call, Answered | Lost, int]:
        """One, and how long it took. It begins when it is its turn, so what is stopped while it waits for that was not
        begun; and a first one not while the run is about to end.

        Raises: BudgetExhausted, Overloaded, and then it was not begun; Fenced, StorageUnavailable.
        """
        worker = self._workers.of(holding)
        while True:
            if not _is_begun(holding, call_id):
                await holding.may_begin.wait()  # nobody's turn is kept meanwhile
            async with worker.turn(alone=tries.alone):
                before = time.monotonic()  # a worker's start is paid by the call that needs it
                with suppress(BrokenProgram, WorkerDied):  # which `run_tool` tells of
                    await worker.describe()  # its start may take long: nothing but the call is left then
                if not (_is_begun(holding, call_id) or holding.may_begin.is_set()):
                    continue
                await begin()
                call = holding.view.calls[call_id]
                await _check_stall(holding, call)
                answered = await run_tool(self._workers, holding, _job(holding, call, arguments))
                return call, answered, _since_ms(before)

    async def _after_loss(
        self, holding: Holding, call: Call, arguments: Any, why: Lost, also: Also, tries: _Tries, tried_ms: int
    ) -> Answered | Outcome | Wait | None:
        """The driver, here and now, cannot say whether it happened. None: it is to be started once more."""
        effect = call.intent.effect
        cut_short = calling.reserved_ms(holding, call.intent) < call.intent.deadline_ms  # by the end of a budget
        if effect is Effect.CHECKABLE:
            return await self._verify(holding, call, arguments, also, why=why, tries=tries, tried_ms=tried_ms)
        if effect is Effect.PURE and (tries.over or (why.error == "deadline" and not cut_short)):
            return Answered(value=why.why, error=why.error)
        return await self._lose(holding, call) if effect is Effect.OPAQUE or tries.over else None

    async def _verify(
        self,
        holding: Holding,
        call: Call,
        arguments: Any,
        also: Also,
        *,
        why: Lost | None = None,
        tries: _Tries | None = None,
        tried_ms: int | None = None,
    ) -> Outcome | Wait:
        """`why`: how it was lost just now, in a try of `tried_ms`; None: by a server that is gone."""
        intent, tries = call.intent, tries or _Tries()
        spent_ms = _at_most_ms(holding, call) if tried_ms is None else tried_ms  # nobody pays for waiting for a turn
        async with self._workers.of(holding).turn(alone=True):  # what another call cuts off, nobody would know
            before = time.monotonic()
            verified = await verify_tool(self._workers, holding, _job(holding, call, arguments))
            spent_ms += _since_ms(before)
        if isinstance(verified, Lost):
            return await self._lose(holding, call)
        if isinstance(verified, Nothing):
            if why is None or not tries.over:
                again = partial(calling.again, holding, call, tried_ms=spent_ms)
                return await self._run(holding, intent.call_id, arguments, also, again, tries)
            verified = Answered(value=f"{why.why} It did not happen.", error=why.error)
        used_ms = None if tried_ms is None else spent_ms
        ending = Ending(reserved_ms=calling.reserved_ms(holding, intent), used_ms=used_ms)
        return await calling.finish(holding, self._segments, intent.call_id, verified, ending, also=also)

    async def _give_up(self, holding: Holding, call: Call, also: Also) -> Outcome | Wait:
        if call.intent.effect is not Effect.PURE:
            return await self._lose(holding, call)
        why = f"The call was begun {call.attempts} times, and each time the server died before it ended."
        ending = Ending(reserved_ms=calling.reserved_ms(holding, call.intent))
        answered = Answered(value=why, error="died")
        return await calling.finish(holding, self._segments, call.intent.call_id, answered, ending, also=also)

    async def _lose(self, holding: Holding, call: Call) -> Wait:
        await calling.lost(holding, call)
        return _in_doubt(call.intent.call_id)


def _is_begun(holding: Holding, call_id: str) -> bool:
    """A driver was given it before, and it has no outcome."""
    call = holding.view.calls.get(call_id)
    return call is not None and call.status is CallStatus.STARTED


async def _check_stall(holding: Holding, call: Call) -> None:
    """A server that was stopped behind the start of a call may have lost the process meanwhile, and somebody may have
    decided what becomes of the call. Raises: Fenced."""
    if call.started_ms is None or holding.now_ms() - call.started_ms > STALL_S * 1000:
        await holding.append()


def _since_ms(before: float) -> int:
    return round((time.monotonic() - before) * 1000)


def _at_most_ms(holding: Holding, call: Call) -> int:
    """What a try took that ended with its server: nobody knows, but no longer than until now or its deadline."""
    held_ms = calling.reserved_ms(holding, call.intent)
    return held_ms if call.started_ms is None else min(held_ms, max(0, holding.now_ms() - call.started_ms))


def _in_doubt(call_id: str) -> Wait:
    return Wait(state=State.ASKING, reason=Reason.IN_DOUBT, about=(call_id,))


def _held(holding: Holding, call_id: str, error: Overloaded) -> Wait:
    """Calls that run now hold what is left of a budget: their ends may give some of it back."""
    due_ms = holding.now_ms() + round((error.retry_after_s or 1.0) * 1000)
    return Wait(state=State.WAITING, reason=Reason.TOOL, due_ms=due_ms, about=(call_id,))


def _job(holding: Holding, call: Call, arguments: Any) -> Job:
    deadline_s = calling.reserved_ms(holding, call.intent) / 1000
    return Job(tool=call.intent.resource, arguments=arguments, key=call.intent.key, deadline_s=deadline_s)

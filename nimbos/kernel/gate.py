"""The gate: the one way out of a process.

    wanted ─▶ 1 may it? (offer) ─▶ 2 labels ─▶ 3 budget ─▶ 4 call.intent ─▶ 5 driver, with a deadline ─▶ 6 call.done
              └─ no: call.denied     └────────── 1-4 are durable before 5 begins ──────────┘

What is internal has its intent and its outcome in one transaction. What waits parks the process and is looked at again
when it is woken. What goes outside (`outward.py`) may be cut off between intent and outcome; then `effects.py` says
what to do, and what nobody can know a person is asked. Whatever becomes of a call, its model is told. `calling.py` has
the transactions, `drivers/` those who do the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from nimbos.errors import BrokenProgram
from nimbos.kernel import calling
from nimbos.kernel.arguments import Checker, WrongArguments, read_arguments
from nimbos.kernel.branches import at_once
from nimbos.kernel.calling import Ending
from nimbos.kernel.deciding import approval
from nimbos.kernel.drivers.answers import Answered
from nimbos.kernel.drivers.builtin import WAITING
from nimbos.kernel.drivers.own import Own
from nimbos.kernel.drivers.waiting import timed
from nimbos.kernel.effects import HARMLESS, bound_hash, effect_key
from nimbos.kernel.events import CallDenied, CallIntent, CallWanted, SignalConsumed
from nimbos.kernel.fold import Call, CallStatus
from nimbos.kernel.holding import Holding, Shared
from nimbos.kernel.log import Draft
from nimbos.kernel.offer import NotOffered, Offered, find, needs_approval, offers, resource_of, verb_of
from nimbos.kernel.outward import Outward
from nimbos.kernel.releasing import MARK, is_released, telling, to_release
from nimbos.kernel.segments import canonical
from nimbos.kernel.syscall import Also, Outcome, Syscall, Wait, joined, nothing
from nimbos.kernel.tools import ToolWorkers, WorkerDied
from nimbos.kernel.words import Effect, Reason, SignalKind, State, Verb

if TYPE_CHECKING:
    from nimbos.kernel.programs import Programs

__all__ = ["Also", "Gate", "Outcome", "Syscall", "Wait", "nothing"]

CALLS_AT_ONCE: Final = 8  # of one answer
_RESOURCE_CHARACTERS = 200
_WITHHELD = "Withheld: this process is a fork, and what it does outside happens only when the fork is adopted."


class Gate:
    """One for a server. Its methods may be used at once for one process; whatever parks ends the run."""

    def __init__(self, shared: Shared, *, programs: Programs, workers: ToolWorkers) -> None:
        self._segments = shared.segments
        self._workers = workers
        self._checker = Checker()
        self._outward = Outward(shared.segments, workers)
        self._own = Own(shared, programs)

    async def tools(self, holding: Holding) -> tuple[Offered, ...]:
        """What the model is offered, always in the same order.

        Raises: BrokenProgram, WorkerDied for Python that cannot be loaded; StorageUnavailable.
        """
        return tuple((await offers(holding, self._workers)).values())

    async def wanted(self, holding: Holding, wanted: CallWanted, *, also: Also = nothing) -> Outcome | Wait:
        """A call as a model wrote it: what is no JSON is refused. As `attempt`."""
        syscall = Syscall(call_id=wanted.call_id, verb=verb_of(holding, wanted.name), resource=wanted.name)
        if wanted.call_id not in holding.view.calls:
            try:
                syscall = replace(syscall, arguments=read_arguments(wanted.arguments))
            except WrongArguments as wrong:
                return await self._deny(holding, syscall, str(wrong), "wrong_arguments", also)
        return await self.attempt(holding, syscall, also=also)

    async def call(self, holding: Holding, syscall: Syscall, *, also: Also = nothing) -> Outcome:
        """Also goes on with the same call where it was left.

        Raises: Parked, when it has to wait or nothing is left to spend; what `Holding.append` raises.
        """
        done = await self.attempt(holding, syscall, also=also)
        if isinstance(done, Wait):
            await self.park(holding, [done])
            raise AssertionError("a process that is parked goes no further")
        return done

    async def attempt(self, holding: Holding, syscall: Syscall, *, also: Also = nothing) -> Outcome | Wait:
        """Like `call`, for whoever has other things to do meanwhile, and parks when nothing else is left (`park`)."""
        left_open = holding.view.calls.get(syscall.call_id)
        if left_open is not None:
            return await self._go_on(holding, left_open, also)
        try:
            offered = await find(holding, self._workers, syscall)
            self._checker.check(syscall.arguments, offered.parameters, tool=offered.name)
        except NotOffered as refusal:
            return await self._deny(holding, syscall, str(refusal), "unknown_tool", also)
        except WrongArguments as wrong:
            return await self._deny(holding, syscall, str(wrong), "wrong_arguments", also)
        except (BrokenProgram, WorkerDied) as broken:
            why = f"The program's tools cannot be used: {broken}"
            return await self._deny(holding, syscall, why, "not_loaded", also)
        return await self._begin(holding, syscall, offered, also)

    async def park(self, holding: Holding, waits: Sequence[Wait]) -> None:
        """Until any of them may be over. Raises: Parked, always, if nothing else."""
        wait = joined(waits)
        await holding.park(wait.state, wait.reason, due_ms=wait.due_ms, about=wait.about)

    async def finish_open(self, holding: Holding, *, also: Also = nothing, partly: bool = False) -> None:
        """At the start of a run: brings calls without an outcome to their end, and does what was withheld from a fork
        that was adopted since. Returns when no call is open; with `partly` also when one of them came to its end.

        Raises: Parked; what `Holding.append` raises.
        """
        await _forget_timers(holding)
        left_open = list(holding.view.calls.values())
        done = [await self._go_on(holding, call, also) for call in left_open if call.intent.effect is not Effect.PURE]
        pure = [partial(self._go_on, holding, call, also) for call in left_open if call.intent.effect is Effect.PURE]
        done += await at_once(holding, pure, most=CALLS_AT_ONCE)
        done += await self._release(holding)
        waits = [wait for wait in done if isinstance(wait, Wait)]
        if waits and not (partly and len(waits) < len(done)):
            await self.park(holding, waits)

    async def release(self, holding: Holding) -> None:
        """Does what was withheld from a fork that was adopted since; what has to wait stays open.

        Raises: Parked; what `Holding.append` raises.
        """
        await self._release(holding)

    async def _begin(self, holding: Holding, syscall: Syscall, offered: Offered, also: Also) -> Outcome | Wait:
        arguments = timed(offered.verb, syscall.arguments, holding.now_ms())
        deadline_s = min(offered.deadline_s, syscall.deadline_s or offered.deadline_s)
        intent = CallIntent(
            call_id=syscall.call_id,
            verb=offered.verb,
            resource=resource_of(offered, arguments)[:_RESOURCE_CHARACTERS],
            effect=offered.effect,
            key=effect_key(holding.pid, syscall.call_id),
            arguments=await self._segments.put(holding.view.account, arguments),
            bound_to=bound_hash(offered.definition_hash, canonical(syscall.arguments)),
            deadline_ms=max(1, round(deadline_s * 1000)),
            step=syscall.step,
        )
        label = calling.context_label(holding)
        said = Draft(body=intent, call_id=intent.call_id, label=label)
        if holding.view.withheld and intent.effect not in HARMLESS:
            ending = Ending(first=(said,), withheld=True, label=label)
            return await self._finish(holding, intent, Answered(value=_WITHHELD), ending, also)
        if needs_approval(holding, intent):
            await holding.append(said)
            return _permission(intent)
        if offered.verb is Verb.TOOL:
            return await self._outward.begin(holding, intent, arguments, also)
        return await self._perform(holding, intent, arguments, Ending(first=(said,), label=label), also)

    async def _go_on(self, holding: Holding, call: Call, also: Also) -> Outcome | Wait:
        """With a call that was left without an outcome."""
        intent = call.intent
        if is_released(intent.call_id):
            also = telling(holding, self._segments, intent)
        arguments = await self._segments.get(holding.view.account, intent.arguments)
        if call.status is CallStatus.UNKNOWN:
            return await self._outward.resolve(holding, call, arguments, also)
        if call.status is CallStatus.STARTED:
            return await self._outward.recover(holding, call, arguments, also)
        first: tuple[Draft, ...] = ()
        if needs_approval(holding, intent) and not (call.approved or call.again):
            said = await approval(holding, self._segments, intent)
            if said is None:
                return _permission(intent)
            if said.refused is not None:
                return await self._refuse(
                    holding, intent.call_id, said.refused, "refused", also, by=said.by, behind=said.drafts
                )
            first = said.drafts
        if intent.verb is Verb.TOOL:
            return await self._outward.start(holding, call, arguments, also, first=first)
        return await self._perform(holding, intent, arguments, Ending(first=first), also)

    async def _perform(
        self, holding: Holding, intent: CallIntent, arguments: Any, ending: Ending, also: Also
    ) -> Outcome | Wait:
        """One of the kernel's own verbs."""
        async with holding.answering if intent.verb in WAITING else nullcontext():
            answered = await self._own.perform(holding, intent, arguments)
            if isinstance(answered, Answered):
                return await self._finish(holding, intent, answered, ending, also)
        if ending.first:
            await holding.append(*ending.first)
        return answered

    async def _deny(self, holding: Holding, syscall: Syscall, why: str, code: str, also: Also) -> Outcome:
        """A model's call is answered without an intent; a step's needs one to be found again by its key."""
        call_id = syscall.call_id
        first: tuple[Draft, ...] = ()
        if all(call_id != wanted.call_id for wanted in holding.view.wanted):
            intent = CallIntent(
                call_id=call_id,
                verb=syscall.verb,
                resource=syscall.resource[:_RESOURCE_CHARACTERS],
                effect=Effect.PURE,
                key=effect_key(holding.pid, call_id),
                arguments=await self._segments.put(holding.view.account, None),
                step=syscall.step,
            )
            first = (Draft(body=intent, call_id=call_id),)
        return await self._refuse(holding, call_id, why, code, also, first=first)

    async def _refuse(
        self,
        holding: Holding,
        call_id: str,
        why: str,
        code: str,
        also: Also,
        *,
        by: str = "kernel",
        first: Sequence[Draft] = (),
        behind: Sequence[Draft] = (),
    ) -> Outcome:
        outcome = Outcome(call_id=call_id, value=why, shown=f"Error ({code}): {why}", error=code)
        extra = await also(outcome)
        denied = Draft(body=CallDenied(call_id=call_id, by=by, why=why), call_id=call_id, actor=by)
        await holding.append(*first, denied, *behind, *extra)
        return outcome

    async def _finish(
        self, holding: Holding, intent: CallIntent, answered: Answered, ending: Ending, also: Also
    ) -> Outcome:
        return await calling.finish(holding, self._segments, intent.call_id, answered, ending, also=also)

    async def _release(self, holding: Holding) -> list[Outcome | Wait]:
        """What a fork only seemed to do, once it is adopted, as new calls."""
        done = []
        for call_id, intent in to_release(holding.view):
            arguments = await self._segments.get(holding.view.account, intent.arguments)
            syscall = Syscall(
                call_id=call_id,
                verb=intent.verb,
                resource=intent.resource,
                arguments=arguments,
                step=f"{intent.step}{MARK}" if intent.step else "",
            )
            done.append(await self.attempt(holding, syscall, also=telling(holding, self._segments, intent)))
        return done


def _permission(intent: CallIntent) -> Wait:
    return Wait(state=State.ASKING, reason=Reason.PERMISSION, about=(intent.call_id,))


async def _forget_timers(holding: Holding) -> None:
    """Those that woke the process for something else than a call that is open: it is awake now."""
    view = holding.view
    rung = [one for one in view.signals if one.signal is SignalKind.TIMER and one.about not in view.calls]
    if rung:
        await holding.append(*(Draft(body=SignalConsumed(received=one.seq), cause=one.seq) for one in rung))

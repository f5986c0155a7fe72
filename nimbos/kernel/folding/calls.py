"""The rules for calls: intent before start, one outcome, and never a second start that its effect class forbids.

wanted ─┬─▶ intended ─▶ started ─┬─▶ done
        │      ▲           │  ▲──┘ again, unless it is opaque
        │      └── retry ──┴─▶ unknown ─▶ resolved, and `done` with what came of it
        └─▶ denied, also when it was intended
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

from nimbos.kernel.events import (
    CallApproved,
    CallDenied,
    CallDone,
    CallIntent,
    CallResolved,
    CallStarted,
    CallUnknown,
    CallWanted,
)
from nimbos.kernel.folding.records import Call, CallStatus, Recorded
from nimbos.kernel.words import Effect, Verdict

CallEvent: TypeAlias = CallIntent | CallApproved | CallDenied | CallStarted | CallDone | CallUnknown | CallResolved

_UNSEEN = frozenset({Effect.INTERNAL, Effect.PURE})  # what a fork may do before it is adopted


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When an event happened. `withheld`: to a fork that is not adopted."""

    seq: int
    ts_ms: int
    withheld: bool


@dataclass(slots=True, kw_only=True)
class Calls:
    """`turn`: what the last answer called; `wanted`: those of it that have neither intent nor outcome. `ended`: that
    have an outcome; `resolved`: where it is a person's word, and a result may follow. `withheld`: what a fork only
    seemed to do."""

    open: dict[str, Call] = field(default_factory=dict)
    turn: tuple[CallWanted, ...] = ()
    wanted: list[CallWanted] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    resolved: dict[str, Call] = field(default_factory=dict)
    withheld: dict[str, CallIntent] = field(default_factory=dict)
    made: int = 0

    def copy(self) -> Calls:
        return Calls(
            open=dict(self.open),
            turn=self.turn,
            wanted=list(self.wanted),
            ended=set(self.ended),
            resolved=dict(self.resolved),
            withheld=dict(self.withheld),
            made=self.made,
        )

    @property
    def unanswered(self) -> bool:
        """Whether the model waits for a result: its next turn cannot begin."""
        return bool(self.wanted) or any(call.wanted is not None for call in self.open.values())

    def ask_for(self, calls: tuple[CallWanted, ...]) -> str | None:
        """Why the answer cannot be."""
        ids = {call.call_id for call in calls}
        if len(ids) < len(calls) or ids & self.ended or ids & self.open.keys():
            return "its calls have ids that are not new"
        self.turn = calls
        self.wanted = list(calls)
        return None

    def fork(self) -> None:
        """What the past of a fork had begun is not the fork's: it begins anew what its model wants. What its past, a
        fork as well, only seemed to do, it seems to have done, too."""
        self.wanted = [call for call in self.turn if call.call_id not in self.ended]
        self.open = {}
        self.resolved = {}

    def change(self, event: CallEvent, at: Moment, steps: dict[str, Recorded]) -> str | None:
        """Why it cannot be; an outcome of a step is added to `steps`."""
        match event:
            case CallIntent():
                return self._intend(event, at, steps)
            case CallDone():
                return self._done(event, at, steps)
            case CallDenied() if (wanted := self._wanted(event.call_id)) is not None:
                self.wanted.remove(wanted)
                self.ended.add(event.call_id)
                return None
        call = self.open.get(event.call_id)
        if call is None:
            return f"there is no open call {event.call_id}"
        match event:
            case CallApproved():
                return self._approve(call, event)
            case CallDenied():
                return self._deny(call, event, at, steps)
            case CallStarted():
                return self._start(call, event, at)
            case CallUnknown():
                return self._lose(call)
            case CallResolved():
                return self._resolve(call, event, at, steps)

    def _wanted(self, call_id: str) -> CallWanted | None:
        return next((call for call in self.wanted if call.call_id == call_id), None)

    def _intend(self, intent: CallIntent, at: Moment, steps: dict[str, Recorded]) -> str | None:
        if intent.call_id in self.open or intent.call_id in self.ended:
            return f"call {intent.call_id} was intended before"
        if intent.step and (
            intent.step in steps or any(intent.step == call.intent.step for call in self.open.values())
        ):
            return f"step {intent.step} was intended before"
        wanted = self._wanted(intent.call_id)
        if wanted is not None:
            self.wanted.remove(wanted)
        self.open[intent.call_id] = Call(intent=intent, seq=at.seq, intended_ms=at.ts_ms, wanted=wanted)
        self.made += 1
        return None

    def _approve(self, call: Call, approved: CallApproved) -> str | None:
        if call.status is not CallStatus.INTENDED:
            return f"call {approved.call_id} has begun"
        if approved.bound_to != call.intent.bound_to:
            return f"the approval of {approved.call_id} is for another definition or other arguments"
        self.open[approved.call_id] = replace(call, approved=True)
        return None

    def _deny(self, call: Call, denied: CallDenied, at: Moment, steps: dict[str, Recorded]) -> str | None:
        if call.status is not CallStatus.INTENDED:
            return f"call {denied.call_id} has begun"
        self._end(call, Recorded(seq=at.seq, result=None, error="denied", outcome=denied), steps)
        return None

    def _start(self, call: Call, started: CallStarted, at: Moment) -> str | None:
        effect = call.intent.effect
        if call.status is CallStatus.UNKNOWN:
            return f"nobody knows yet what came of call {started.call_id}"
        if at.withheld and effect not in _UNSEEN:
            return f"a fork that is not adopted withholds what is {effect}"
        if started.attempt != call.attempts + 1:
            return f"attempt {started.attempt} cannot follow {call.attempts}"
        if effect is Effect.OPAQUE and call.attempts and not call.again:
            return f"call {started.call_id} is opaque and was begun before"
        self.open[started.call_id] = replace(
            call, status=CallStatus.STARTED, attempts=started.attempt, again=False, started_ms=at.ts_ms
        )
        return None

    def _lose(self, call: Call) -> str | None:
        if call.status is CallStatus.UNKNOWN or call.intent.effect is Effect.INTERNAL:
            return f"call {call.intent.call_id} is {call.status} and {call.intent.effect}"
        self.open[call.intent.call_id] = replace(call, status=CallStatus.UNKNOWN)
        return None

    def _resolve(self, call: Call, resolved: CallResolved, at: Moment, steps: dict[str, Recorded]) -> str | None:
        if call.status is not CallStatus.UNKNOWN:
            return f"call {resolved.call_id} is not in doubt"
        if resolved.verdict is Verdict.RETRY:
            self.open[resolved.call_id] = replace(call, status=CallStatus.INTENDED, again=True)
            return None
        error = "" if resolved.verdict is Verdict.HAPPENED else resolved.verdict.value
        self._end(call, Recorded(seq=at.seq, result=resolved.result, error=error, outcome=resolved), steps)
        self.resolved[resolved.call_id] = call
        return None

    def _done(self, done: CallDone, at: Moment, steps: dict[str, Recorded]) -> str | None:
        call = self.resolved.pop(done.call_id, None) or self.open.get(done.call_id)
        if call is None:
            return f"there is no open call {done.call_id}"
        if call.status is CallStatus.UNKNOWN and done.call_id in self.open:
            return f"call {done.call_id} is in doubt, and only a person's word ends it"
        if done.withheld:
            if not at.withheld or call.attempts or call.intent.effect in _UNSEEN:
                return f"call {done.call_id} cannot be withheld"
            self.withheld[done.call_id] = call.intent
        self._end(call, Recorded(seq=at.seq, result=done.result, error=done.error, outcome=done), steps)
        return None

    def _end(self, call: Call, recorded: Recorded, steps: dict[str, Recorded]) -> None:
        self.open.pop(call.intent.call_id, None)
        self.ended.add(call.intent.call_id)
        if call.intent.step:
            steps[call.intent.step] = recorded

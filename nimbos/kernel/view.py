"""A process at one moment: what `fold.py` makes of a log. `folding/rules.py` says how each event changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nimbos.kernel.chain import decoded, kind_of
from nimbos.kernel.events import (
    Body,
    BudgetExhausted,
    CallWanted,
    Event,
    ProcForked,
    ProcState,
    Segment,
)
from nimbos.kernel.faults import Illegal
from nimbos.kernel.folding.asks import Asks
from nimbos.kernel.folding.calls import Calls
from nimbos.kernel.folding.mail import Mail
from nimbos.kernel.folding.records import Call, CallStatus, Child, Received, Recorded, Turn
from nimbos.kernel.folding.rules import came_of_it, changed, why_not_now
from nimbos.kernel.folding.shown import Shown
from nimbos.kernel.folding.spending import Spending
from nimbos.kernel.words import Reason, SignalKind, State
from nimbos.types import AskClass

__all__ = ["Call", "CallStatus", "Child", "Received", "Recorded", "Turn", "View"]


@dataclass(slots=True, kw_only=True)
class View:
    """A process after its event `seq`. `about`, `due_ms`: what it waits for or asked last, and when a timer wakes it.
    `withheld`: a fork, or a child of one, that is not adopted. `steps`: of a durable function, those that have an
    outcome. `born_seq`: the last event of its parent's log when it was made. `turns`: answers in the agent's own
    conversation. `deaths`: runs that ended without a word, one after the other, since anything came of it."""

    pid: str = ""
    seq: int = 0
    hash: str = ""
    epoch: int = 0
    ran_epoch: int = 0
    program: str = ""
    name: str = ""
    account: str = ""
    model: str = ""
    ask_class: AskClass = AskClass.AGENT
    parent: str | None = None
    depth: int = 0
    detached: bool = False
    withheld: bool = False
    forked_from: str | None = None
    forked_seq: int = 0
    key: str = ""
    born_seq: int = 0
    input: str = ""
    state: State = State.READY
    reason: Reason = Reason.NONE
    due_ms: int | None = None
    about: tuple[str, ...] = ()
    result: str | None = None
    error: str = ""
    turns: int = 0
    deaths: int = 0
    steps: dict[str, Recorded] = field(default_factory=dict)
    asks: Asks = field(default_factory=Asks)
    syscalls: Calls = field(default_factory=Calls)
    shown: Shown = field(default_factory=Shown)
    mail: Mail = field(default_factory=Mail)
    spending: Spending = field(default_factory=Spending)

    @property
    def context(self) -> list[Segment]:
        """Shown to the model, in order."""
        return self.shown.segments

    @property
    def evicted(self) -> dict[str, Segment]:
        return self.shown.evicted

    @property
    def turn(self) -> Turn | None:
        """The agent's ask that has no outcome."""
        return self.asks.find(purpose="turn")

    def asked(self, step: str) -> Turn | None:
        """A durable function's ask that has no outcome."""
        return self.asks.find(purpose="step", step=step)

    @property
    def wanted(self) -> list[CallWanted]:
        """Calls of the last answer that have neither an intent nor an outcome."""
        return self.syscalls.wanted

    @property
    def calls(self) -> dict[str, Call]:
        """Calls that have no outcome."""
        return self.syscalls.open

    @property
    def calls_made(self) -> int:
        return self.syscalls.made

    @property
    def signals(self) -> list[Received]:
        """Received and not consumed."""
        return self.mail.waiting

    @property
    def unheard(self) -> int:
        """Messages among them."""
        return sum(signal.signal is SignalKind.MESSAGE for signal in self.mail.waiting)

    @property
    def children(self) -> dict[str, Child]:
        return self.mail.children

    @property
    def used(self) -> dict[str, int]:
        """By its own asks and calls, by meter."""
        return self.spending.used

    @property
    def exhausted(self) -> BudgetExhausted | None:
        return self.spending.exhausted

    def copy(self) -> View:
        return replace(
            self,
            steps=dict(self.steps),
            asks=self.asks.copy(),
            syscalls=self.syscalls.copy(),
            shown=self.shown.copy(),
            mail=self.mail.copy(),
            spending=self.spending.copy(),
        )

    def check(self, bodies: Sequence[Body]) -> None:
        """Raises: Illegal when these cannot be the next events, in this order."""
        self.copy().go_on(bodies)

    def go_on(self, bodies: Sequence[Body]) -> None:
        """As if these were the next events; for a copy. Raises: Illegal."""
        for body in bodies:
            self.seq += 1
            self._change(body, ts_ms=0, kind=kind_of(body))

    def apply(self, event: Event) -> None:
        """Raises: Illegal, FromNewerVersion, Unreadable; the view is then of no use any more."""
        body = decoded(event)
        why = self._why_unchained(event, body)
        if why is not None:
            raise Illegal(event.pid, event.kind, why)
        self.pid = event.pid
        self.seq = event.seq
        self.hash = event.hash
        if isinstance(body, ProcForked):
            self.epoch = self.ran_epoch = 0
        self.epoch = event.epoch
        died = isinstance(body, ProcState) and self.state is State.RUNNING and event.epoch > self.ran_epoch
        self._change(body, ts_ms=event.ts_ms, kind=event.kind)
        self.deaths = self.deaths + 1 if died else 0 if came_of_it(body) else self.deaths
        if isinstance(body, ProcState) and body.to is State.RUNNING:
            if event.epoch <= self.ran_epoch:
                raise Illegal(event.pid, event.kind, f"epoch {event.epoch} has run it before")
            self.ran_epoch = event.epoch

    def _why_unchained(self, event: Event, body: Body) -> str | None:
        if event.seq != self.seq + 1:
            return f"it is number {event.seq} behind {self.seq}"
        if event.prev_hash != self.hash:
            return "it is not chained to the one before"
        if isinstance(body, ProcForked):
            fits = (body.at_seq, body.at_hash) == (self.seq, self.hash) and self.seq > 0
            return None if fits else f"it forks from event {body.at_seq}, not from this past"
        if self.seq and event.pid != self.pid:
            return f"it happened to {event.pid}"
        return f"epoch {event.epoch} is over" if event.epoch < self.epoch else None

    def _change(self, body: Body, *, ts_ms: int, kind: str) -> None:
        why = why_not_now(self, body) or changed(self, body, ts_ms)
        if why is not None:
            raise Illegal(self.pid, kind, why)

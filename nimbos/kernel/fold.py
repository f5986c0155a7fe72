"""The fold: what a log says a process is. Pure, and the only way to know.

    view = fold(events)            from the start, or on from a view
    view.check(bodies)             raises what these would raise next, and changes nothing

It refuses whatever cannot be: a state that may not follow, an effect begun twice, tokens settled twice, an outcome of
nothing. What it refuses must never be written, so whoever holds a process checks before it appends. The rules for asks,
calls and the context are in `folding/`; those for states, signals, children and budgets are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from nimbos.kernel.chain import decoded, kind_of
from nimbos.kernel.events import (
    Body,
    BudgetExhausted,
    BudgetReserved,
    BudgetSettled,
    CallApproved,
    CallDenied,
    CallDone,
    CallIntent,
    CallResolved,
    CallStarted,
    CallUnknown,
    CallWanted,
    CtxChanged,
    Event,
    GrantAdded,
    GrantRevoked,
    MemChanged,
    ModelDone,
    ModelFailed,
    ModelIntent,
    ModelPartial,
    Note,
    ProcCreated,
    ProcExited,
    ProcForked,
    ProcState,
    Segment,
    SignalConsumed,
    SignalReceived,
)
from nimbos.kernel.faults import FromNewerVersion, Illegal, Unreadable
from nimbos.kernel.folding.asks import Asks
from nimbos.kernel.folding.calls import CallEvent, Calls, Moment
from nimbos.kernel.folding.mail import Mail
from nimbos.kernel.folding.records import Call, CallStatus, Child, Received, Recorded, Turn
from nimbos.kernel.folding.shown import Shown
from nimbos.kernel.folding.spending import Spending
from nimbos.kernel.words import Reason, SignalKind, State, why_illegal
from nimbos.types import AskClass

__all__ = [
    "Call",
    "CallStatus",
    "Child",
    "FromNewerVersion",
    "Illegal",
    "Received",
    "Recorded",
    "Turn",
    "Unreadable",
    "View",
    "fold",
]

_CALL_EVENTS = (CallIntent, CallApproved, CallDenied, CallStarted, CallDone, CallUnknown, CallResolved)
_MODEL_EVENTS = (ModelIntent, ModelPartial, ModelDone, ModelFailed)
_ASKED = frozenset({State.READY, State.RUNNING, State.PAUSED})  # in which the last question is still known


@dataclass(slots=True, kw_only=True)
class View:
    """A process after its event `seq`. `about`, `due_ms`: what it waits for or asked last, and when a timer wakes it.
    `withheld`: a fork, or a child of one, that is not adopted. `steps`: of a durable function, those that have an
    outcome. `turns`: answers in the agent's own conversation."""

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
    input: str = ""
    created_ms: int = 0
    state: State = State.READY
    reason: Reason = Reason.NONE
    due_ms: int | None = None
    about: tuple[str, ...] = ()
    result: str | None = None
    error: str = ""
    turns: int = 0
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
        trial = self.copy()
        for body in bodies:
            trial.seq += 1
            trial._change(body, ts_ms=0, kind=kind_of(body))

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
        self._change(body, ts_ms=event.ts_ms, kind=event.kind)
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
        why = self._why_not_now(body) or _changed(self, body, ts_ms)
        if why is not None:
            raise Illegal(self.pid, kind, why)

    def _why_not_now(self, body: Body) -> str | None:
        if isinstance(body, ProcCreated) is not (self.seq == 1):
            return "a log begins with proc.created, and only there"
        if isinstance(body, ProcForked | ProcCreated | Note):
            return None
        if self.state is State.DONE:
            return "the process is done"
        if self.state is not State.RUNNING and isinstance(body, _CALL_EVENTS + _MODEL_EVENTS):
            return f"the process is {self.state}"
        return None


def fold(events: Iterable[Event], view: View | None = None) -> View:
    """Goes on from `view`, which it changes. Raises: Illegal, FromNewerVersion, Unreadable."""
    folded = View() if view is None else view
    for event in events:
        folded.apply(event)
    return folded


def _changed(view: View, body: Body, ts_ms: int) -> str | None:
    """Why it cannot be."""
    match body:
        case ProcCreated():
            _created(view, body, ts_ms)
        case ProcForked():
            _forked(view, body, ts_ms)
        case ProcState():
            return _to_state(view, body)
        case ProcExited():
            return _exited(view, body)
        case SignalReceived():
            return view.mail.receive(body, seq=view.seq, ts_ms=ts_ms)
        case SignalConsumed():
            return _consumed(view, body)
        case ModelIntent() | ModelPartial() | ModelDone() | ModelFailed():
            return _model(view, body)
        case CallIntent() | CallApproved() | CallDenied() | CallStarted() | CallDone() | CallUnknown() | CallResolved():
            return _call(view, body, ts_ms)
        case CtxChanged():
            return view.shown.change(body)
        case BudgetReserved() | BudgetSettled() | BudgetExhausted():
            return _budget(view, body)
        case Note(about="adopted"):
            view.withheld = False
        case Note() | MemChanged() | GrantAdded() | GrantRevoked():
            pass
    return None


def _created(view: View, body: ProcCreated, ts_ms: int) -> None:
    view.program = body.program
    view.name = body.name
    view.account = body.account
    view.model = body.model
    view.ask_class = body.ask_class
    view.parent = body.parent
    view.depth = body.depth
    view.detached = body.detached
    view.withheld = body.withheld
    view.key = body.key
    view.input = body.input
    view.created_ms = ts_ms


def _forked(view: View, body: ProcForked, ts_ms: int) -> None:
    """What was being done, and used, is its parent's; what was said and answered is the fork's as well."""
    view.forked_from = body.of
    view.forked_seq = body.at_seq
    view.created_ms = ts_ms
    view.withheld = True
    view.parent, view.detached = None, True
    view.state, view.reason, view.due_ms, view.about = State.READY, Reason.NONE, None, ()
    view.result, view.error = None, ""
    view.asks.fork()
    view.syscalls.fork()
    view.mail.fork()
    view.spending = Spending()


def _to_state(view: View, body: ProcState) -> str | None:
    why = why_illegal(view.state, body.to, body.reason)
    if why is None:
        view.state, view.reason, view.due_ms = body.to, body.reason, body.due_ms
        if body.to not in _ASKED:
            view.about = body.about
    return why


def _exited(view: View, body: ProcExited) -> str | None:
    why = why_illegal(view.state, State.DONE, body.reason)
    if why is None:
        view.state, view.reason, view.due_ms = State.DONE, body.reason, None
        view.result, view.error = body.result, body.error
    return why


def _consumed(view: View, body: SignalConsumed) -> str | None:
    consumed = view.mail.consume(body)
    if isinstance(consumed, str):
        return consumed
    if consumed.signal is SignalKind.TOP_UP:
        view.spending.exhausted = None
    return None


def _model(view: View, body: ModelIntent | ModelPartial | ModelDone | ModelFailed) -> str | None:
    match body:
        case ModelIntent():
            if body.purpose == "turn" and view.syscalls.unanswered:
                return "the model's calls have no outcome yet"
            view.spending.exhausted = None
            return view.asks.intent(body, seq=view.seq, epoch=view.epoch, steps=view.steps)
        case ModelPartial():
            return view.asks.partial(body)
        case ModelDone():
            return _answered(view, body)
        case ModelFailed():
            turn = view.asks.failed(body)
            if isinstance(turn, str):
                return turn
            if turn.step and not body.again:
                view.steps[turn.step] = Recorded(seq=view.seq, result=None, error=body.code, outcome=body)
            return None


def _answered(view: View, body: ModelDone) -> str | None:
    turn = view.asks.done(body)
    if isinstance(turn, str):
        return turn
    if turn.step:
        view.steps[turn.step] = Recorded(seq=view.seq, result=body.message, error="", outcome=body)
    if turn.purpose != "turn":
        return None
    view.turns += 1
    return view.syscalls.ask_for(body.calls)


def _call(view: View, body: CallEvent, ts_ms: int) -> str | None:
    at = Moment(seq=view.seq, ts_ms=ts_ms, withheld=view.withheld)
    why = view.syscalls.change(body, at, view.steps)
    if why is None and isinstance(body, CallIntent):
        view.spending.exhausted = None
    if why is None and isinstance(body, CallDone) and body.child:
        return view.mail.spawned(body.child, body.call_id)
    return why


def _budget(view: View, body: BudgetReserved | BudgetSettled | BudgetExhausted) -> str | None:
    match body:
        case BudgetReserved():
            return view.spending.reserve(body)
        case BudgetSettled():
            why = view.asks.settle(body.ask_id) if body.ask_id else None
            return why or view.spending.settle(body)
        case BudgetExhausted():
            view.spending.exhausted = body
            return None

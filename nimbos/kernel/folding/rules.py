"""The rules for a process as a whole: its states, and who of asks, calls, mail and spending an event concerns.

Each function changes the view, or says why the event cannot be; then the view is of no use any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    CtxChanged,
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
    SignalConsumed,
    SignalReceived,
)
from nimbos.kernel.folding.calls import CallEvent, Moment
from nimbos.kernel.folding.records import Recorded
from nimbos.kernel.folding.spending import Spending
from nimbos.kernel.words import Reason, SignalKind, State, why_illegal

if TYPE_CHECKING:
    from nimbos.kernel.view import View

_CALL_EVENTS = (CallIntent, CallApproved, CallDenied, CallStarted, CallDone, CallUnknown, CallResolved)
_MODEL_EVENTS = (ModelIntent, ModelPartial, ModelDone, ModelFailed)
_WORK = _CALL_EVENTS + _MODEL_EVENTS  # what only a running process does
_OUTCOMES = (ModelPartial, ModelDone, CallDone, CallDenied, CallResolved, ProcCreated, ProcForked, ProcExited)
_ASKED = frozenset({State.READY, State.RUNNING, State.PAUSED})  # in which the last question is still known


def why_not_now(view: View, body: Body) -> str | None:
    if isinstance(body, ProcCreated) is not (view.seq == 1):
        return "a log begins with proc.created, and only there"
    if isinstance(body, ProcForked | ProcCreated | Note):
        return None
    if view.state is State.DONE:
        return "the process is done"
    if view.state is not State.RUNNING and isinstance(body, _WORK):
        return f"the process is {view.state}"
    return None


def came_of_it(body: Body) -> bool:
    """Whether a run that brings this about was not for nothing."""
    parked = isinstance(body, ProcState) and body.to not in (State.READY, State.RUNNING)
    return parked or isinstance(body, _OUTCOMES)


def changed(view: View, body: Body, ts_ms: int) -> str | None:
    """Why it cannot be."""
    match body:
        case ProcCreated():
            _created(view, body)
        case ProcForked():
            _forked(view, body)
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
            return view.shown.change(body, turn=[call.call_id for call in view.syscalls.turn])
        case BudgetReserved() | BudgetSettled() | BudgetExhausted():
            return _budget(view, body)
        case Note(about="adopted"):
            view.withheld = False
        case Note() | MemChanged() | GrantAdded() | GrantRevoked():
            pass
    return None


def _created(view: View, body: ProcCreated) -> None:
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
    view.born_seq = body.born_seq
    view.input = body.input


def _forked(view: View, body: ProcForked) -> None:
    """What was being done, and used, is its parent's; what was said and answered is the fork's as well."""
    view.forked_from = body.of
    view.forked_seq = body.at_seq
    view.key = body.key
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

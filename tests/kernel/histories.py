"""Random histories that may be, written without the fold: a second, plain account of the kernel's rules.

`Story` says which events may come next, and does them; `histories()` draws them one after the other. `logged` makes a
chained log of bodies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from hypothesis import strategies as st

from nimbos.kernel.chain import encoded, kind_of, sealed, version_of
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
from nimbos.kernel.words import LEGAL, REASONS, Effect, Label, Reason, SignalKind, State, Verb, Verdict
from nimbos.types import AskClass

PID = "proc_1"
Purpose = Literal["turn", "step", "summary"]
_HARMLESS = (Effect.INTERNAL, Effect.PURE)


def created(**changes: object) -> ProcCreated:
    given = {
        "program": "p" * 64,
        "name": "trip",
        "account": "proj_1",
        "input": "i" * 64,
        "model": "demo",
        "ask_class": AskClass.AGENT,
    }
    return ProcCreated(**{**given, **changes})  # type: ignore[arg-type]


def intent(call_id: str, effect: Effect = Effect.OPAQUE, *, step: str = "", bound_to: str = "") -> CallIntent:
    return CallIntent(
        call_id=call_id,
        verb=Verb.TOOL,
        resource="mail",
        effect=effect,
        key=f"key of {call_id}",
        arguments="a" * 64,
        bound_to=bound_to,
        step=step,
    )


def done(call_id: str, **changes: object) -> CallDone:
    return CallDone(**{"call_id": call_id, "result": "r" * 64, "size_bytes": 2, **changes})  # type: ignore[arg-type]


def segment(id: str, *, pinned: bool = False, covers: tuple[str, ...] = ()) -> Segment:
    kind: Literal["view", "user"] = "view" if covers else "user"
    return Segment(id=id, hash=f"hash of {id}", kind=kind, tokens=3, pinned=pinned, covers=covers)


def logged(bodies: Sequence[Body], *, pid: str = PID, past: Sequence[Event] = ()) -> list[Event]:
    """Chained behind `past`. The epoch grows with each `running`; a fork begins anew."""
    events: list[Event] = []
    seq, hash, epoch = (past[-1].seq, past[-1].hash, past[-1].epoch) if past else (0, "", 0)
    for body in bodies:
        if isinstance(body, ProcForked):
            epoch, pid = 0, f"{pid}.fork{seq}"
        epoch += isinstance(body, ProcState) and body.to is State.RUNNING
        kind = kind_of(body)
        event = Event(
            pid=pid,
            seq=seq + 1,
            epoch=epoch,
            ts_ms=1_000 + seq,
            kind=kind,
            cause=seq or None,
            call_id="",
            actor="kernel",
            label=Label(),
            body=encoded(body),
            blob=None,
            usage=None,
            version=version_of(kind),
            prev_hash=hash,
            hash="",
        )
        event = sealed(event)
        events.append(event)
        seq, hash = event.seq, event.hash
    return events


@dataclass(slots=True)
class Asked:
    ask_id: str
    purpose: Purpose
    step: str
    epoch: int
    failed: bool = False
    emitted: int = 0


@dataclass(slots=True)
class Called:
    call_id: str
    effect: Effect
    step: str
    of_model: bool
    state: Literal["intended", "started", "unknown"] = "intended"
    attempts: int = 0
    again: bool = False


@dataclass(slots=True, repr=False)
class Story:
    """What has happened so far, as a person would keep account of it."""

    bodies: list[Body] = field(default_factory=list)
    state: State = State.READY
    epoch: int = 0
    asks: list[Asked] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)
    calls: dict[str, Called] = field(default_factory=dict)
    steps_over: set[str] = field(default_factory=set)
    unsettled: list[str] = field(default_factory=list)
    mail: list[int] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    pinned: set[str] = field(default_factory=set)
    evicted: list[str] = field(default_factory=list)
    withheld: bool = False
    used: dict[str, int] = field(default_factory=dict)
    children: list[str] = field(default_factory=list)
    ids: Iterator[int] = field(default_factory=count)

    def __repr__(self) -> str:
        return f"Story({[kind_of(body) for body in self.bodies]})"

    def do(self, body: Body) -> None:
        self.bodies.append(body)

    def name(self, prefix: str) -> str:
        return f"{prefix}{next(self.ids)}"

    def moves(self) -> list[Callable[[st.DataObject], None]]:
        """What may happen now."""
        moves: list[Callable[[st.DataObject], None]] = [self.note]
        if self.state is State.DONE:
            return moves
        moves += [self.receive, self.change_context, self.reserve]
        moves += [self.change_state] * (1 if self.state is State.RUNNING else 6)
        moves += [self.consume] if self.mail else []
        moves += [self.settle] if self.unsettled else []
        if self.state is State.RUNNING:
            moves += [self.intend, self.ask] * 2
            moves += [self.hear] * 3 if any(not ask.failed for ask in self.asks) else []
            moves += [self.act] * 3 if self.calls else []
            moves += [self.deny] if self.wanted else []
        return moves

    def note(self, data: st.DataObject) -> None:
        about: Literal["adopted", "said"] = data.draw(st.sampled_from(("adopted", "said")))
        self.withheld = self.withheld and about != "adopted"
        self.do(Note(about=about, text="words"))

    def change_state(self, data: st.DataObject) -> None:
        to = data.draw(st.sampled_from(sorted(LEGAL[self.state])))
        reason = data.draw(st.sampled_from(sorted(REASONS[to])))
        if to is State.DONE and data.draw(st.integers(0, 3)):
            return
        self.state = to
        self.epoch += to is State.RUNNING
        if to is State.DONE and data.draw(st.booleans()):
            self.do(ProcExited(reason=reason, result="r" * 64))
        else:
            self.do(ProcState(to=to, reason=reason, due_ms=data.draw(st.none() | st.integers(0, 9)), about=("x",)))

    def receive(self, data: st.DataObject) -> None:
        signal = data.draw(st.sampled_from(sorted(SignalKind)))
        about, reason = "", Reason.NONE
        if signal is SignalKind.CHILD_EXIT:
            about = data.draw(st.sampled_from([*self.children, "a stranger"]))
            reason = data.draw(st.sampled_from(sorted(REASONS[State.DONE])))
        self.do(
            SignalReceived(
                signal=signal, source="user", external_id=self.name("mail"), about=about, reason=reason, body="b" * 64
            )
        )
        self.mail.append(len(self.bodies))

    def consume(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.mail))
        self.mail.remove(seq)
        self.do(SignalConsumed(received=seq))

    def reserve(self, data: st.DataObject) -> None:
        self.do(BudgetReserved(meter="calls", amount=data.draw(st.integers(0, 5)), call_id="some"))

    def settle(self, data: st.DataObject) -> None:
        ask_id = data.draw(st.sampled_from(self.unsettled))
        self.unsettled.remove(ask_id)
        used = data.draw(st.dictionaries(st.sampled_from(("tokens", "cost_micros")), st.integers(0, 99)))
        for meter, amount in used.items():
            self.used[meter] = self.used.get(meter, 0) + amount
        self.do(BudgetSettled(used=used, ask_id=ask_id))
        if data.draw(st.integers(0, 4)) == 0:
            self.do(BudgetExhausted(meter="tokens", owner="process", limit=10, used=11))

    def ask(self, data: st.DataObject) -> None:
        purpose: Purpose = data.draw(st.sampled_from(("turn", "step", "summary")))
        unanswered = self.wanted or any(call.of_model for call in self.calls.values())
        step = data.draw(st.sampled_from(("s1", "s2", "s3"))) if purpose == "step" else ""
        before = next((ask for ask in self.asks if (ask.purpose, ask.step) == (purpose, step)), None)
        in_flight = before is not None and not before.failed and before.epoch == self.epoch
        if in_flight or step in self.steps_over or (purpose == "turn" and unanswered):
            return
        continues = before is not None and data.draw(st.booleans())
        ask = Asked(self.name("ask"), purpose, step, self.epoch)
        if before is not None:
            ask.emitted = before.emitted if continues else 0
            self.asks.remove(before)
        self.asks.append(ask)
        self.unsettled.append(ask.ask_id)
        named = before.ask_id if before is not None and continues else ""
        self.do(ModelIntent(ask_id=ask.ask_id, model="demo", continues=named, step=step, purpose=purpose))

    def hear(self, data: st.DataObject) -> None:
        ask = data.draw(st.sampled_from([ask for ask in self.asks if not ask.failed]))
        what = data.draw(st.sampled_from(("partial", "done", "failed")))
        if what == "partial":
            ids = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4)))
            ask.emitted += len(ids)
            self.do(ModelPartial(ask_id=ask.ask_id, ids=ids, text="é" * len(ids)))
        elif what == "failed":
            again = data.draw(st.booleans())
            ask.failed = True
            if not again and ask.purpose != "turn":
                self.asks.remove(ask)
                self.steps_over |= {ask.step} - {""}
            self.do(ModelFailed(ask_id=ask.ask_id, code="engine_failed", message="it died", again=again))
        else:
            self.asks.remove(ask)
            self.steps_over |= {ask.step} - {""}
            names = [f"{ask.ask_id}.{n}" for n in range(data.draw(st.integers(0, 2)))]
            calls = tuple(CallWanted(call_id=name, name="mail", arguments="{}") for name in names)
            if ask.purpose == "turn":
                self.wanted = names
            self.do(ModelDone(ask_id=ask.ask_id, model_hash="h", finish="stop", message="m" * 64, calls=calls))

    def deny(self, data: st.DataObject) -> None:
        call_id = data.draw(st.sampled_from(self.wanted))
        self.wanted.remove(call_id)
        self.do(CallDenied(call_id=call_id, by="gate", why="there is no such tool"))

    def intend(self, data: st.DataObject) -> None:
        effect = data.draw(st.sampled_from(sorted(Effect)))
        call_id = data.draw(st.sampled_from([*self.wanted, ""])) or self.name("step.")
        of_model = call_id in self.wanted
        step = "" if of_model else self.name("c")
        if of_model:
            self.wanted.remove(call_id)
        self.calls[call_id] = Called(call_id, effect, step, of_model)
        self.do(intent(call_id, effect, step=step, bound_to="def"))

    def act(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(list(self.calls.values())))
        actions = list(self._actions(call))
        actions[data.draw(st.integers(0, len(actions) - 1))](call, data)

    def _actions(self, call: Called) -> Iterator[Callable[[Called, st.DataObject], None]]:
        if call.state == "unknown":
            yield self._resolve
            return
        if call.state == "intended":
            yield self._approve
            yield self._refuse
        may_start = not self.withheld or call.effect in _HARMLESS
        if may_start and not (call.effect is Effect.OPAQUE and call.attempts and not call.again):
            yield self._start
        if call.effect is not Effect.INTERNAL:
            yield self._lose
        yield self._finish

    def _approve(self, call: Called, data: st.DataObject) -> None:
        self.do(CallApproved(call_id=call.call_id, by="user:1", bound_to="def"))

    def _refuse(self, call: Called, data: st.DataObject) -> None:
        self._over(call)
        self.do(CallDenied(call_id=call.call_id, by="user:1", why="no"))

    def _start(self, call: Called, data: st.DataObject) -> None:
        call.attempts += 1
        call.state, call.again = "started", False
        self.do(CallStarted(call_id=call.call_id, attempt=call.attempts))

    def _lose(self, call: Called, data: st.DataObject) -> None:
        call.state = "unknown"
        self.do(CallUnknown(call_id=call.call_id))

    def _resolve(self, call: Called, data: st.DataObject) -> None:
        verdict = data.draw(st.sampled_from(sorted(Verdict)))
        self.do(CallResolved(call_id=call.call_id, verdict=verdict, by="user:1"))
        if verdict is Verdict.RETRY:
            call.state, call.again = "intended", True
            return
        self._over(call)
        if data.draw(st.booleans()):
            self.do(done(call.call_id))

    def _finish(self, call: Called, data: st.DataObject) -> None:
        withheld = self.withheld and not call.attempts and call.effect not in _HARMLESS and data.draw(st.booleans())
        child = ""
        if call.effect is Effect.INTERNAL and data.draw(st.booleans()):
            child = self.name("proc_child")
            self.children.append(child)
        self._over(call)
        self.do(done(call.call_id, withheld=withheld, child=child))

    def _over(self, call: Called) -> None:
        del self.calls[call.call_id]
        self.steps_over |= {call.step} - {""}

    def change_context(self, data: st.DataObject) -> None:
        loose = [id for id in self.shown if id not in self.pinned]
        evict: list[str] = data.draw(_some(loose, 3))
        first = min((self.shown.index(id) for id in evict), default=len(self.shown))
        add: list[Segment] = []
        if data.draw(st.booleans()) and evict:
            view = segment(self.name("view"), covers=tuple(evict))
            add.append(view)
            kept = [id for id in self.shown[:first] if id not in evict]
            self.shown = [*kept, view.id, *(id for id in self.shown[first:] if id not in evict)]
        else:
            self.shown = [id for id in self.shown if id not in evict]
        self.evicted += evict
        for _ in range(data.draw(st.integers(0, 2))):
            new = segment(self.name("seg"), pinned=data.draw(st.booleans()))
            self.pinned |= {new.id} if new.pinned else set()
            self.shown.append(new.id)
            add.append(new)
        pin: list[str] = data.draw(_some(self.shown, 1))
        self.pinned |= set(pin)
        self.do(CtxChanged(add=tuple(add), evict=tuple(evict), pin=tuple(pin)))


def _some(names: list[str], most: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), unique=True, max_size=most) if names else st.just([])


@st.composite
def histories(draw: st.DrawFn, *, most: int = 40, fork: bool = False) -> Story:
    """`fork`: it goes on as a fork that is not adopted, whose own part begins empty-handed."""
    data = draw(st.data())
    story = Story(bodies=[created(withheld=fork)], withheld=fork)
    for _ in range(draw(st.integers(0, most))):
        moves = story.moves()
        moves[data.draw(st.integers(0, len(moves) - 1))](data)
    return story

"""The fold against a plain account of the same history, in any chunking; and what it must refuse."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nimbos.kernel.chain import KINDS, decoded, encoded, kind_of, sealed
from nimbos.kernel.events import (
    Body,
    BudgetReserved,
    BudgetSettled,
    CallApproved,
    CallDenied,
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
    ProcExited,
    ProcForked,
    ProcState,
    SignalConsumed,
    SignalReceived,
)
from nimbos.kernel.faults import FromNewerVersion, Illegal, Unreadable
from nimbos.kernel.fold import View, fold
from nimbos.kernel.words import LEGAL, REASONS, Effect, Reason, SignalKind, State, Verdict
from tests.kernel.histories import PID, Story, created, done, histories, intent, logged, segment

RUNNING = ProcState(to=State.RUNNING)
ASK = ModelIntent(ask_id="ask", model="demo")
SETTLED = BudgetSettled(used={"tokens": 1}, ask_id="ask")
WANTED = CallWanted(call_id="ask.0", name="mail", arguments="{}")
ANSWER = ModelDone(ask_id="ask", model_hash="h", finish="tool_calls", message="m", calls=(WANTED,))


def after(*bodies: Body) -> View:
    return fold(logged([created(), RUNNING, *bodies]))


def started(effect: Effect) -> list[Body]:
    return [intent("c", effect), CallStarted(call_id="c", attempt=1)]


@settings(max_examples=60, deadline=None)
@given(histories(), st.data())
def test_any_chunking_folds_to_the_same_state(story: Story, data: st.DataObject) -> None:
    events = logged(story.bodies)
    view = View()
    left = events
    while left:
        size = data.draw(st.integers(1, len(left)))
        view = fold(left[:size], view).copy()  # as by a checkpoint
        left = left[size:]
    assert view == fold(events)


@settings(max_examples=150, deadline=None)
@given(st.booleans().flatmap(lambda fork: histories(most=80, fork=fork)))
def test_the_fold_agrees_with_a_plain_account(story: Story) -> None:
    view = fold(logged(story.bodies))
    assert (view.state, view.epoch, view.withheld) == (story.state, story.epoch, story.withheld)
    assert [call.call_id for call in view.wanted] == story.wanted
    assert {
        id: (call.intent.effect, call.status.value, call.attempts, call.again) for id, call in view.calls.items()
    } == {id: (call.effect, call.state, call.attempts, call.again) for id, call in story.calls.items()}
    assert {ask.ask_id: (ask.purpose, ask.step, ask.failed is not None) for ask in view.asks.open.values()} == {
        ask.ask_id: (ask.purpose, ask.step, ask.failed) for ask in story.asks
    }
    assert {ask.ask_id: (len(ask.emitted), len(ask.text)) for ask in view.asks.open.values()} == {
        ask.ask_id: (ask.emitted, ask.emitted) for ask in story.asks
    }
    assert view.steps.keys() == story.steps_over
    assert sorted(signal.seq for signal in view.signals) == sorted(story.mail)
    assert [shown.id for shown in view.context] == story.shown
    assert {shown.id for shown in view.context if shown.pinned} == story.pinned
    assert view.evicted.keys() == set(story.evicted)
    assert view.used == story.used
    assert list(view.children) == story.children


@settings(max_examples=60, deadline=None)
@given(histories(), st.data())
def test_what_is_in_flight_is_not_a_forks(story: Story, data: st.DataObject) -> None:
    events = logged(story.bodies)
    cut = data.draw(st.integers(1, len(events)))
    past = fold(events[:cut])
    fork = fold(logged([ProcForked(of=PID, at_seq=cut, at_hash=past.hash), RUNNING], past=events[:cut]), past.copy())
    assert (fork.state, fork.withheld, fork.epoch, fork.calls, fork.used) == (State.RUNNING, True, 1, {}, {})
    assert [shown.id for shown in fork.context] == [shown.id for shown in past.context]
    over = past.syscalls.ended
    assert [call.call_id for call in fork.wanted] == [
        call.call_id for call in past.syscalls.turn if call.call_id not in over
    ]
    assert all(child.foreign for child in fork.children.values())
    for call in fork.wanted:  # may begin again, under a key of its own
        fork.check([intent(call.call_id, Effect.OPAQUE), done(call.call_id, withheld=True)])


@settings(max_examples=60, deadline=None)
@given(histories())
def test_bodies_come_back_as_they_were_written(story: Story) -> None:
    for event, body in zip(logged(story.bodies), story.bodies, strict=True):
        assert decoded(event) == body
        assert encoded(decoded(event)) == event.body


@settings(max_examples=60, deadline=None)
@given(histories(), st.data())
def test_checking_changes_nothing(story: Story, data: st.DataObject) -> None:
    """One hand at a time: whoever takes the process next has an epoch of its own."""
    cut = data.draw(st.integers(1, len(story.bodies)))
    events = logged(story.bodies)
    taken = [n for n, body in enumerate(story.bodies, 1) if isinstance(body, ProcState) and body.to is State.RUNNING]
    view = fold(events[:cut])
    for first, last in pairwise([cut, *(n for n in taken if n > cut), len(events)]):
        before = view.copy()
        view.check(story.bodies[first:last])
        assert view == before
        view = fold(events[first:last], view)
    assert view == fold(events)


@settings(max_examples=60, deadline=None)
@given(histories(), st.data())
def test_nothing_can_be_left_out_said_twice_or_exchanged(story: Story, data: st.DataObject) -> None:
    events = logged(story.bodies)
    at = data.draw(st.integers(0, len(events) - 1))
    with pytest.raises(Illegal):
        fold([*events[: at + 1], *events[at:]])
    if at < len(events) - 1:
        with pytest.raises(Illegal):
            fold([*events[:at], *events[at + 1 :]])
        with pytest.raises(Illegal):
            fold([*events[:at], events[at + 1], events[at], *events[at + 2 :]])


@pytest.mark.parametrize("was", [state for state in State if state is not State.DONE])
@pytest.mark.parametrize("to", list(State))
def test_only_legal_states_follow(was: State, to: State) -> None:
    ways: dict[State, list[Body]] = {State.READY: [], State.RUNNING: [RUNNING]}
    path = ways.get(was, [RUNNING, ProcState(to=was, reason=min(REASONS[was]))])
    view = fold(logged([created(), *path]))
    changes = [ProcState(to=to, reason=reason) for reason in Reason]
    legal = [change for change in changes if to in LEGAL[was] and change.reason in REASONS[to]]
    for change in changes:
        if change in legal:
            view.check([change])
        else:
            with pytest.raises(Illegal):
                view.check([change])


ILLEGAL: dict[str, tuple[list[Body], Body]] = {
    "a second birth": ([], created()),
    "a start without an intent": ([], CallStarted(call_id="c", attempt=1)),
    "an outcome of nothing": ([], done("c")),
    "the same intent twice": ([intent("c")], intent("c")),
    "an intent after its outcome": ([*started(Effect.OPAQUE), done("c")], intent("c")),
    "a step that was done under another id": (
        [intent("c", Effect.PURE, step="s"), done("c")],
        intent("d", Effect.PURE, step="s"),
    ),
    "a step that is being done": ([intent("c", Effect.PURE, step="s")], intent("d", Effect.PURE, step="s")),
    "an opaque effect again": (started(Effect.OPAQUE), CallStarted(call_id="c", attempt=2)),
    "an attempt left out": (started(Effect.PURE), CallStarted(call_id="c", attempt=3)),
    "a start in doubt": ([*started(Effect.OPAQUE), CallUnknown(call_id="c")], CallStarted(call_id="c", attempt=2)),
    "an outcome in doubt": ([*started(Effect.OPAQUE), CallUnknown(call_id="c")], done("c")),
    "a verdict without a doubt": (
        started(Effect.OPAQUE),
        CallResolved(call_id="c", verdict=Verdict.RETRY, by="user:1"),
    ),
    "a third start after one retry": (
        [
            *started(Effect.OPAQUE),
            CallUnknown(call_id="c"),
            CallResolved(call_id="c", verdict=Verdict.RETRY, by="user:1"),
            CallStarted(call_id="c", attempt=2),
        ],
        CallStarted(call_id="c", attempt=3),
    ),
    "two outcomes": ([*started(Effect.PURE), done("c")], done("c")),
    "an approval of other arguments": (
        [intent("c", bound_to="these")],
        CallApproved(call_id="c", by="user:1", bound_to="those"),
    ),
    "a denial of what has begun": (started(Effect.OPAQUE), CallDenied(call_id="c", by="user:1", why="no")),
    "withheld outside a fork": ([intent("c")], done("c", withheld=True)),
    "a doubt about what the log itself does": (started(Effect.INTERNAL), CallUnknown(call_id="c")),
    "a child twice": (
        [intent("c", Effect.INTERNAL), done("c", child="proc_2"), intent("d", Effect.INTERNAL)],
        done("d", child="proc_2"),
    ),
    "two turns at once": ([ASK], ModelIntent(ask_id="other", model="demo")),
    "the same ask twice": ([ASK, ANSWER, CallDenied(call_id="ask.0", by="gate", why="no")], ASK),
    "a turn before its calls are answered": ([ASK, ANSWER], ModelIntent(ask_id="other", model="demo")),
    "a turn while a call is open": (
        [ASK, ANSWER, intent("ask.0")],
        ModelIntent(ask_id="other", model="demo"),
    ),
    "words of an ask that is over": ([ASK, ANSWER], ModelPartial(ask_id="ask", ids=(1,))),
    "words of an ask that failed": (
        [ASK, ModelFailed(ask_id="ask", code="x", message="y", again=True)],
        ModelPartial(ask_id="ask", ids=(1,)),
    ),
    "two answers": ([ASK, ANSWER], ANSWER),
    "going on with another's ask": ([], ModelIntent(ask_id="b", model="demo", continues="ask")),
    "a step without a name": ([], ModelIntent(ask_id="b", model="demo", purpose="step")),
    "tokens settled twice": (
        [ASK, ANSWER, BudgetSettled(used={"tokens": 1}, ask_id="ask")],
        BudgetSettled(used={"tokens": 1}, ask_id="ask"),
    ),
    "tokens of nobody": ([], BudgetSettled(used={"tokens": 1}, ask_id="ask")),
    "less than nothing used": ([], BudgetSettled(used={"tokens": -1})),
    "less than nothing reserved": ([], BudgetReserved(meter="calls", amount=-1)),
    "a signal twice": (
        [SignalReceived(signal=SignalKind.MESSAGE, source="user", external_id="1")],
        SignalReceived(signal=SignalKind.MESSAGE, source="user", external_id="1"),
    ),
    "a signal consumed twice": (
        [SignalReceived(signal=SignalKind.MESSAGE, source="user", external_id="1"), SignalConsumed(received=3)],
        SignalConsumed(received=3),
    ),
    "an exit of a child for no reason": (
        [],
        SignalReceived(signal=SignalKind.CHILD_EXIT, source="process:p", external_id="1", about="p"),
    ),
    "the same segment twice": ([CtxChanged(add=(segment("a"),))], CtxChanged(add=(segment("a"),))),
    "an evicted segment again": (
        [CtxChanged(add=(segment("a"),)), CtxChanged(evict=("a",))],
        CtxChanged(add=(segment("a"),)),
    ),
    "an eviction of what is pinned": ([CtxChanged(add=(segment("a", pinned=True),))], CtxChanged(evict=("a",))),
    "a view of what is shown": ([CtxChanged(add=(segment("a"),))], CtxChanged(add=(segment("v", covers=("a",)),))),
    "a pin of nothing": ([], CtxChanged(pin=("a",))),
    "anything behind the end": ([ProcExited(reason=Reason.OK)], BudgetSettled(used={})),
    "a second end": ([ProcExited(reason=Reason.OK)], ProcExited(reason=Reason.KILLED)),
    "an end for no reason": ([], ProcExited(reason=Reason.TIMER)),
    "work while it waits": ([ProcState(to=State.WAITING, reason=Reason.TIMER)], ASK),
    "an effect while it is paused": (
        [intent("c"), ProcState(to=State.PAUSED, reason=Reason.USER)],
        CallStarted(call_id="c", attempt=1),
    ),
    "a fork of another past": ([], ProcForked(of="proc_2", at_seq=2, at_hash="another")),
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_the_fold_refuses(what: str) -> None:
    before, wrong = ILLEGAL[what]
    after(*before)  # which is legal
    with pytest.raises(Illegal) as refused:
        after(*before, wrong)
    assert PID in refused.value.message
    assert kind_of(wrong) in refused.value.message
    if not isinstance(wrong, ProcForked):  # whose past is in the events
        with pytest.raises(Illegal):
            after(*before).check([wrong])


def test_an_unadopted_fork_begins_no_effect_that_the_world_sees() -> None:
    for effect in Effect:
        view = fold(logged([created(withheld=True), RUNNING, intent("c", effect)]))
        if effect in (Effect.INTERNAL, Effect.PURE):
            view.check([CallStarted(call_id="c", attempt=1)])
            continue
        with pytest.raises(Illegal):
            view.check([CallStarted(call_id="c", attempt=1)])
        view.check([done("c", withheld=True)])
        view.check([Note(about="adopted", text="real now"), CallStarted(call_id="c", attempt=1)])


def test_an_earlier_holders_ask_may_be_begun_anew_or_continued() -> None:
    crash = [ProcState(to=State.READY), RUNNING]
    partial = ModelPartial(ask_id="ask", ids=(1, 2), text="on")
    view = after(ASK, partial, *crash)
    view.check([ModelIntent(ask_id="new", model="demo")])
    on = ModelIntent(ask_id="new", model="demo", continues="ask")
    more = after(ASK, partial, *crash, on, ModelPartial(ask_id="new", ids=(3,), text=" we"))
    assert more.turn is not None
    assert (more.turn.ask_ids, more.turn.emitted, more.turn.text) == (("ask", "new"), (1, 2, 3), "on we")
    anew = after(ASK, partial, *crash, ModelIntent(ask_id="new", model="demo"))
    assert anew.turn is not None
    assert (anew.turn.ask_ids, anew.turn.emitted) == (("new",), ())


def test_a_view_stands_where_what_it_covers_stood() -> None:
    first = CtxChanged(add=tuple(segment(name) for name in "abcde"))
    view = after(first, CtxChanged(evict=("b", "c"), add=(segment("v", covers=("b", "c")), segment("f"))))
    assert [shown.id for shown in view.context] == ["a", "v", "d", "e", "f"]
    wider = CtxChanged(evict=("v", "d"), add=(segment("w", covers=("v", "d")),))
    view = after(first, CtxChanged(evict=("b", "c"), add=(segment("v", covers=("b", "c")),)), wider)
    assert [shown.id for shown in view.context] == ["a", "w", "e"]
    assert set(view.evicted) == {"b", "c", "v", "d"}


def test_a_newer_version_is_refused_by_name_and_changes_nothing() -> None:
    (event,) = logged([created()])
    newer = sealed(msgspec.structs.replace(event, version=2))
    with pytest.raises(FromNewerVersion, match=r"Event 1 of process proc_1 .*proc\.created.*version 2.*newer version"):
        fold([newer])
    unheard = sealed(msgspec.structs.replace(event, kind="proc.dreamt"))
    with pytest.raises(FromNewerVersion, match=r"proc\.dreamt"):
        fold([unheard])


def test_an_older_version_is_lifted_step_by_step() -> None:
    (event,) = logged([Note(about="said", text="words")])
    old = msgspec.structs.replace(event, body=b'{"said":"words"}')
    lifts = {
        ("note", 1): lambda raw: {"words": raw["said"]},
        ("note", 2): lambda raw: {"type": "note", "about": "said", "text": raw["words"]},
    }
    assert decoded(old, versions={"note": 3}, lifts=lifts) == Note(about="said", text="words")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"type":"note"}', b'{"type":"proc.exited","reason":"ok"}', b"\xff"]
)
def test_bytes_that_no_version_wrote_are_named(body: bytes) -> None:
    (event,) = logged([Note(about="said", text="words")])
    with pytest.raises(Unreadable, match="Event 1 of process proc_1"):
        decoded(msgspec.structs.replace(event, body=body))


def test_half_a_character_does_not_stop_a_process() -> None:
    (event,) = logged([CallDenied(call_id="c", by="gate", why="file \udce9.txt")])
    assert decoded(event) == CallDenied(call_id="c", by="gate", why="file ?.txt")


def test_every_kind_can_be_in_a_history() -> None:
    """So that a kind which is added is also folded and tested."""
    places = {"mem.changed", "grant.added", "grant.revoked"}  # kept for what is to come
    seen = {kind_of(body) for before, wrong in ILLEGAL.values() for body in [*before, wrong]} | {"note"}
    assert seen | {"budget.exhausted"} | places == KINDS | {"proc.created"}


def test_a_legal_epoch_never_returns() -> None:
    events = logged([created(), RUNNING, ProcState(to=State.READY), RUNNING])
    stale = [*events[:3], sealed(msgspec.structs.replace(events[3], epoch=1))]
    with pytest.raises(Illegal, match="epoch 1"):
        fold(stale)
    behind: list[Event] = [*events, *logged([ProcState(to=State.READY)], past=events)]
    behind[-1] = sealed(msgspec.structs.replace(behind[-1], epoch=1))
    with pytest.raises(Illegal, match="epoch 1"):
        fold(behind)

"""`ask`, `receive`, `wait` and `sleep`: calls that are answered by what arrives. Each is a pure look at the process's
view, made again after every wake and every crash, so nothing that came meanwhile is missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nimbos.kernel.drivers.answers import Answered
from nimbos.kernel.segments import Segments
from nimbos.kernel.syscall import Wait
from nimbos.kernel.words import Origin, Reason, SignalKind, State, Verb

if TYPE_CHECKING:
    from nimbos.kernel.fold import Child, Received, View


_AROUND_RESULT = 3  # the answer, its `exited`, and the child's entry there
_AROUND_MESSAGE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A call that waits. `arguments`: as `timed` left them. `asking`: children that are out of budget now, where that
    ends a wait, too. `gone`: how children ended of which this process, a fork, was not told."""

    call_id: str
    verb: Verb
    arguments: Mapping[str, Any]
    now_ms: int
    asking: frozenset[str] = frozenset()
    gone: Mapping[str, Any] = field(default_factory=dict)


def timed(verb: Verb, arguments: Any, now_ms: int) -> Any:
    """With the moment at which it is over: a sleep is no longer for a crash in the middle of it, or for a clock that
    somebody sets."""
    names = {Verb.SLEEP: "seconds", Verb.WAIT: "timeout_s", Verb.RECEIVE: "timeout_s"}
    lasts_s = arguments.get(names.get(verb, ""))
    return arguments if lasts_s is None else {**arguments, "due_ms": now_ms + round(lasts_s * 1000)}


async def look(view: View, segments: Segments, at: Look) -> Answered | Wait:
    """Raises: NotFound, StorageUnavailable."""
    if at.verb is Verb.SLEEP:
        return _slept(view, at)
    if at.verb is Verb.ASK:
        return await _asked(view, segments, at)
    if at.verb is Verb.RECEIVE:
        return await _received(view, segments, at)
    return await _waited(view, segments, at)


def signals_about(view: View, kind: SignalKind, about: str) -> Iterator[Received]:
    return (signal for signal in view.signals if signal.signal is kind and signal.about == about)


def _slept(view: View, at: Look) -> Answered | Wait:
    due_ms = at.arguments["due_ms"]
    rung = tuple(signal.seq for signal in signals_about(view, SignalKind.TIMER, at.call_id))
    if rung or at.now_ms >= due_ms:
        return Answered(value={"slept_s": at.arguments["seconds"]}, consumed=rung, origin=Origin.USER)
    return Wait(state=State.WAITING, reason=Reason.TIMER, due_ms=due_ms, about=(at.call_id,))


async def _asked(view: View, segments: Segments, at: Look) -> Answered | Wait:
    answer = next(signals_about(view, SignalKind.ANSWER, at.call_id), None)
    if answer is None:
        return Wait(state=State.ASKING, reason=Reason.INPUT, about=(at.call_id,))
    return Answered(value=await _words(view, segments, answer), consumed=(answer.seq,), origin=Origin.USER)


async def _received(view: View, segments: Segments, at: Look) -> Answered | Wait:
    """The first message that nobody has heard."""
    rung = tuple(signal.seq for signal in signals_about(view, SignalKind.TIMER, at.call_id))
    mail = next((signal for signal in view.signals if signal.signal is SignalKind.MESSAGE), None)
    if mail is not None:
        origin = Origin.TOOL if mail.source.startswith("process:") else Origin.USER
        told = {"from": mail.source, "message": await _words(view, segments, mail)}
        return Answered(value=told, consumed=(mail.seq, *rung), origin=origin, wrapped=_AROUND_MESSAGE)
    due_ms = at.arguments.get("due_ms")
    if due_ms is not None and (rung or at.now_ms >= due_ms):
        return Answered(value=None, consumed=rung, origin=Origin.USER)
    return Wait(state=State.WAITING, reason=Reason.SIGNAL, due_ms=due_ms, about=(at.call_id,))


async def _waited(view: View, segments: Segments, at: Look) -> Answered | Wait:
    """For children: those named, or all. One that is over stays in the view, however often it is waited for."""
    wanted = at.arguments.get("children") or list(view.children)
    strangers = [pid for pid in wanted if pid not in view.children]
    if strangers:
        return Answered(
            value=f"These are no children of this process: {', '.join(strangers)[:500]}.", error="not_found"
        )
    over = dict.fromkeys(pid for pid in wanted if pid in at.gone or view.children[pid].exited is not None)
    due_ms = at.arguments.get("due_ms")
    late = due_ms is not None and at.now_ms >= due_ms
    enough = bool(over) if at.arguments.get("mode") == "any" else len(over) == len(set(wanted))
    short = out_of_budget(view)
    asking = [pid for pid in dict.fromkeys(wanted) if pid in short and pid in at.asking and pid not in over]
    if not (enough or late or asking or not wanted):
        about = tuple(pid for pid in wanted if pid not in over)
        return Wait(state=State.WAITING, reason=Reason.CHILD, due_ms=due_ms, about=(at.call_id, *about))
    exits = {pid: at.gone.get(pid) or await _exit(view, segments, view.children[pid]) for pid in over}
    rung = [signal.seq for signal in signals_about(view, SignalKind.TIMER, at.call_id)]
    told = [signal.seq for pid in over for signal in signals_about(view, SignalKind.CHILD_EXIT, pid)]
    value: dict[str, Any] = {"exited": exits, "running": [pid for pid in wanted if pid not in over]}
    if asking:
        value["asking"] = {pid: await _words(view, segments, short[pid][-1]) for pid in asking}
    told += [signal.seq for pid in (*over, *asking) for signal in short.get(pid, ())]  # nothing of it is news any more
    return Answered(value=value, consumed=(*rung, *told), wrapped=_AROUND_RESULT)


def out_of_budget(view: View) -> dict[str, list[Received]]:
    """What children said that parked for it, each of itself, once for each time (`budgets.exhausted`), and nobody has
    heard. They may have gone on since."""
    said: dict[str, list[Received]] = {}
    for signal in view.signals:
        own = signal.source == f"process:{signal.about}" and signal.about in view.children
        if own and signal.signal is SignalKind.MESSAGE:
            said.setdefault(signal.about, []).append(signal)
    return said


async def _words(view: View, segments: Segments, signal: Received) -> Any:
    return await segments.get(view.account, signal.body) if signal.body else None


async def _exit(view: View, segments: Segments, child: Child) -> dict[str, Any]:
    result = await segments.get(view.account, child.result) if child.result else None
    return {"reason": child.exited, "result": result}

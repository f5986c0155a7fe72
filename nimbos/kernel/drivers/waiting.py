"""`ask`, `wait` and `sleep`: calls that are answered by what arrives. Each is a pure look at the process's view, made
again after every wake and every crash, so nothing that came meanwhile is missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nimbos.kernel.drivers.answers import Answered
from nimbos.kernel.segments import Segments
from nimbos.kernel.syscall import Wait
from nimbos.kernel.words import Origin, Reason, SignalKind, State, Verb

if TYPE_CHECKING:
    from nimbos.kernel.fold import Child, Received, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A call that waits. `arguments`: as `timed` left them."""

    call_id: str
    verb: Verb
    arguments: Mapping[str, Any]
    now_ms: int


def timed(verb: Verb, arguments: Any, now_ms: int) -> Any:
    """With the moment at which it is over: a sleep is no longer for a crash in the middle of it, or for a clock that
    somebody sets."""
    lasts_s = arguments.get({Verb.SLEEP: "seconds", Verb.WAIT: "timeout_s"}.get(verb, ""))
    return arguments if lasts_s is None else {**arguments, "due_ms": now_ms + round(lasts_s * 1000)}


async def look(view: View, segments: Segments, at: Look) -> Answered | Wait:
    """Raises: NotFound, StorageUnavailable."""
    if at.verb is Verb.SLEEP:
        return _slept(view, at)
    if at.verb is Verb.ASK:
        return await _asked(view, segments, at)
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
    value = await segments.get(view.account, answer.body) if answer.body else None
    return Answered(value=value, consumed=(answer.seq,), origin=Origin.USER)


async def _waited(view: View, segments: Segments, at: Look) -> Answered | Wait:
    """For children: those named, or all. One that is over stays in the view, however often it is waited for."""
    wanted = at.arguments.get("children") or list(view.children)
    strangers = [pid for pid in wanted if pid not in view.children]
    if strangers:
        return Answered(
            value=f"These are no children of this process: {', '.join(strangers)[:500]}.", error="not_found"
        )
    over = {pid: view.children[pid] for pid in wanted if view.children[pid].exited is not None}
    due_ms = at.arguments.get("due_ms")
    late = due_ms is not None and at.now_ms >= due_ms
    enough = bool(over) if at.arguments.get("mode") == "any" else len(over) == len(set(wanted))
    if not (enough or late or not wanted):
        about = tuple(pid for pid in wanted if pid not in over)
        return Wait(state=State.WAITING, reason=Reason.CHILD, due_ms=due_ms, about=(at.call_id, *about))
    exits = {pid: await _exit(view, segments, child) for pid, child in over.items()}
    rung = [signal.seq for signal in signals_about(view, SignalKind.TIMER, at.call_id)]
    told = [signal.seq for pid in over for signal in signals_about(view, SignalKind.CHILD_EXIT, pid)]
    running = [pid for pid in wanted if pid not in over]
    return Answered(value={"exited": exits, "running": running}, consumed=(*rung, *told))


async def _exit(view: View, segments: Segments, child: Child) -> dict[str, Any]:
    result = await segments.get(view.account, child.result) if child.result else None
    return {"reason": child.exited, "result": result}

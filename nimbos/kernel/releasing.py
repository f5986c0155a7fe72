"""What a fork only seemed to do, done once it is adopted: each withheld call becomes a new one, through the whole gate,
with a key of its own. The model has gone on since; a note tells it what came of it. A fork that fails does it before
it ends; of one that is ended from outside, or that nothing can drive any more, the log says what was dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nimbos.kernel.events import CallIntent, CtxChanged, Note, Segment
from nimbos.kernel.folding.records import CallStatus
from nimbos.kernel.log import Draft
from nimbos.kernel.segments import Segments, text_of
from nimbos.kernel.syscall import Also, Outcome
from nimbos.kernel.words import Label, Origin

if TYPE_CHECKING:
    from nimbos.kernel.holding import Holding
    from nimbos.kernel.view import View

MARK = ".released"  # behind the id of a call, and behind the key of its step
_TOKEN_BYTES = 3
_NAMED_MAX = 20


def is_released(call_id: str) -> bool:
    return call_id.endswith(MARK)


def to_release(view: View) -> Iterator[tuple[str, CallIntent]]:
    """The ids of the calls to be made, and what they are to do, in their order. None while the fork is not adopted."""
    if view.withheld:
        return
    for call_id, intent in list(view.syscalls.withheld.items()):
        released = f"{call_id}{MARK}"
        if released not in view.syscalls.open and released not in view.syscalls.ended:
            yield released, intent


def dropped(view: View) -> Note | None:
    """What an adopted fork that ends now withheld and will not do."""
    left = [call.intent for id, call in view.calls.items() if is_released(id) and call.status is CallStatus.INTENDED]
    left += [intent for _, intent in to_release(view)]
    if not left:
        return None
    names = ", ".join(intent.resource or intent.verb.value for intent in left[:_NAMED_MAX])
    more = f" and {len(left) - _NAMED_MAX} more" if len(left) > _NAMED_MAX else ""
    return Note(about="dropped", text=f"It was adopted, and ended before it did what it had withheld: {names}{more}.")


def telling(holding: Holding, segments: Segments, intent: CallIntent) -> Also:
    """How an agent's model is told. A durable function waits at that step, and is given what comes of it."""

    async def tell(outcome: Outcome) -> Sequence[Draft]:
        if holding.program.entry:
            return ()
        name = intent.resource or intent.verb.value
        text = f"[This fork was adopted, and the withheld call of {name} was made now. Result: {outcome.shown}]"
        hash = await segments.put(holding.view.account, {"role": "user", "content": text})
        label = Label(origin=Origin.TOOL)
        note = Segment(
            id=outcome.call_id,
            hash=hash,
            kind="note",
            tokens=16 + len(text_of(text).encode("utf-8", "replace")) // _TOKEN_BYTES,
            label=label,
            whole=outcome.whole,
            whole_bytes=outcome.size_bytes if outcome.whole else 0,
        )
        return (Draft(body=CtxChanged(add=(note,)), call_id=outcome.call_id, label=label),)

    return tell

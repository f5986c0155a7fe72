"""How things come into an agent's view: as messages put away and described as segments, ready to be named in the log.

What is large is shown as a head with a handle, so that no input, message or result fills the window by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from nimbos.kernel.calling import context_label
from nimbos.kernel.context import Message, assistant_message, estimate
from nimbos.kernel.drivers.paging import HANDLE_CHARACTERS, head_of
from nimbos.kernel.events import CallWanted, CtxChanged, Segment, SegmentKind
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.segments import Segments, text_of
from nimbos.kernel.syscall import Outcome
from nimbos.kernel.words import Label, Origin

TOOL = Label(origin=Origin.TOOL)
CUT, MISFIT = ".cut", ".misfit"  # ends of ids: words that were interrupted, and what is wrong with an answer


async def shown(
    segments: Segments,
    holding: Holding,
    message: Message,
    *,
    id: str,
    kind: SegmentKind,
    tokens: int | None = None,
    label: Label | None = None,
    pinned: bool = False,
    whole: str | None = None,
    whole_bytes: int = 0,
) -> Segment:
    """`tokens` None: they are estimated. `label` None: the user's own words."""
    return Segment(
        id=id,
        hash=await segments.put(holding.view.account, message),
        kind=kind,
        tokens=estimate(msgspec.json.encode(message)) if tokens is None else tokens,
        label=Label() if label is None else label,
        pinned=pinned,
        whole=whole,
        whole_bytes=whole_bytes,
    )


async def headed(
    segments: Segments,
    holding: Holding,
    value: Any,
    *,
    head_bytes: int,
    id: str,
    kind: SegmentKind,
    label: Label | None = None,
    pinned: bool = False,
) -> Segment:
    """Something given to the process, as the user's message: whole, or its head."""
    size_bytes = len(text_of(value).encode("utf-8", "replace"))
    whole = await segments.put(holding.view.account, value)
    head = head_of(value, handle=whole[:HANDLE_CHARACTERS], head_bytes=head_bytes)
    long = size_bytes > head_bytes
    return await shown(
        segments,
        holding,
        {"role": "user", "content": head},
        id=id,
        kind=kind,
        label=label,
        pinned=pinned,
        whole=whole if long else None,
        whole_bytes=size_bytes if long else 0,
    )


async def spoken(
    segments: Segments, holding: Holding, text: str, thinking: str, calls: Sequence[CallWanted], *, id: str, tokens: int
) -> Draft:
    """What the model said: no more trusted than all it has read."""
    label = context_label(holding)
    message = assistant_message(text, thinking, calls)
    said = await shown(segments, holding, message, id=id, kind="assistant", tokens=tokens, label=label)
    return Draft(body=CtxChanged(add=(said,)), label=label)


async def returned(segments: Segments, holding: Holding, outcome: Outcome) -> tuple[Draft, ...]:
    """What came of a call, or why it was refused."""
    result = await shown(
        segments,
        holding,
        {"role": "tool", "tool_call_id": outcome.call_id, "content": outcome.shown},
        id=outcome.call_id,
        kind="tool",
        label=TOOL,
        whole=outcome.whole,
        whole_bytes=outcome.size_bytes if outcome.whole else 0,
    )
    return (Draft(body=CtxChanged(add=(result,)), call_id=outcome.call_id, label=TOOL),)

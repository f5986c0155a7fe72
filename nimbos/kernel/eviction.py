"""Making room in a full window: the oldest turns go, and the model's own summary of them takes their place.

The summary is a *view*: the log keeps what it stands for, its handle leads to all of it, and people are told. Whatever
goes wrong with the summary, room is made. Read `context.py` for what may go.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from nimbos.chat import Dial
from nimbos.errors import EngineFailed, InvalidRequest
from nimbos.kernel.answering import Thought
from nimbos.kernel.context import (
    Eviction,
    Window,
    estimate,
    load,
    plan_eviction,
    summary_request,
    transcript,
    view_text,
)
from nimbos.kernel.drivers.paging import HANDLE_CHARACTERS
from nimbos.kernel.events import CtxChanged, Note, Segment
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.segments import Segments
from nimbos.kernel.think import Thinker, ThinkRequest
from nimbos.kernel.words import Label
from nimbos.types import Sampling


async def make_room(
    holding: Holding, thinker: Thinker, segments: Segments, *, window: Window, have_tokens: int
) -> None:
    """Raises: ContextFull; what `Thinker.think` raises for whoever must wait or stop."""
    eviction = plan_eviction(holding.view.context, have_tokens=have_tokens, room_tokens=window.room)
    if eviction is None:
        return
    account = holding.view.account
    covered = await load(segments, account, eviction.covered)
    whole = transcript(covered)
    handle = await segments.put(account, whole)

    async def replacing(thought: Thought | None) -> Sequence[Draft]:
        words = thought.text if thought is not None else ""
        id = f"view.{thought.ask_id}" if thought is not None else f"view.{holding.view.seq}"
        return await _replacing(segments, account, eviction, words, id=id, handle=handle, whole=whole)

    request = ThinkRequest(
        messages=summary_request(covered),
        thinking=Dial(budget=0),
        sampling=Sampling(temperature=0.0),
        max_tokens=window.summary_tokens,
        context_tokens=window.tokens,
    )
    try:
        await thinker.think(holding, request, purpose="summary", also=replacing)
    except (InvalidRequest, EngineFailed):
        await holding.append(*await replacing(None))


async def _replacing(
    segments: Segments, account: str, eviction: Eviction, words: str, *, id: str, handle: str, whole: str
) -> tuple[Draft, ...]:
    size_bytes = len(whole.encode("utf-8", "replace"))
    text = view_text(words, covered=len(eviction.covered), handle=handle[:HANDLE_CHARACTERS], whole_bytes=size_bytes)
    label = Label()
    for segment in eviction.covered:
        label = label.join(segment.label)
    message = {"role": "user", "content": text}
    view = Segment(
        id=id,
        hash=await segments.put(account, message),
        kind="view",
        tokens=estimate(msgspec.json.encode(message)),
        label=label,
        whole=handle,
        whole_bytes=size_bytes,
        covers=eviction.ids,
    )
    told = f"{len(eviction.covered)} messages were put aside to make room, and are summed up in {id}."
    return (
        Draft(body=CtxChanged(evict=eviction.ids, add=(view,)), label=label),
        Draft(body=Note(about="compaction", text=told)),
    )

"""Making room in a full window: the oldest turns go, and the model's own summary of them takes their place.

The summary is a *view*: the log keeps what it stands for, its handle leads to all of it, and people are told. Whatever
goes wrong with the summary, room is made. Read `context.py` for what may go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from nimbos.chat import Dial
from nimbos.errors import EngineFailed, InvalidRequest
from nimbos.kernel.answering import Thought
from nimbos.kernel.context import (
    VIEW,
    Eviction,
    Message,
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
    behind = await _behind(segments, account, eviction, covered)

    async def replacing(thought: Thought | None) -> Sequence[Draft]:
        words = thought.text if thought is not None else ""
        id = f"{VIEW}{thought.ask_id if thought is not None else holding.view.seq}"
        return await _replacing(segments, account, eviction, words, id=id, behind=behind)

    if eviction.of_a_view:
        await holding.append(*await replacing(None))
        return
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Behind:
    """What a view leads to: the segment `handle`, which has so many messages."""

    handle: str
    size_bytes: int
    messages: int


async def _behind(segments: Segments, account: str, eviction: Eviction, covered: Sequence[Message]) -> _Behind:
    """Of a view in the place of a view: what that led to."""
    first = eviction.covered[0]
    if eviction.of_a_view and first.whole is not None:
        return _Behind(handle=first.whole, size_bytes=first.whole_bytes, messages=len(first.covers))
    whole = transcript(covered)
    size_bytes = len(whole.encode("utf-8", "replace"))
    return _Behind(handle=await segments.put(account, whole), size_bytes=size_bytes, messages=len(eviction.covered))


async def _replacing(
    segments: Segments, account: str, eviction: Eviction, words: str, *, id: str, behind: _Behind
) -> tuple[Draft, ...]:
    handle = behind.handle[:HANDLE_CHARACTERS]
    text = view_text(words, covered=behind.messages, handle=handle, whole_bytes=behind.size_bytes)
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
        whole=behind.handle,
        whole_bytes=behind.size_bytes,
        covers=eviction.ids,
    )
    summary = f"and are summed up in {id}" if words.strip() else f"without a summary, in {id}"
    told = f"{behind.messages} messages were put aside to make room, {summary}."
    return (
        Draft(body=CtxChanged(evict=eviction.ids, add=(view,)), label=label),
        Draft(body=Note(about="compaction", text=told)),
    )

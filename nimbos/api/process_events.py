"""A process's log for those outside: pages of it, or a stream that follows the process to its end.

The stream's ids are the events' own numbers, so `Last-Event-ID` goes on where a connection broke, at this server or
another. What a generation says between two events comes as `delta`, which has no number and is not sent again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, nullcontext
from typing import Any

import msgspec

from nimbos.api import errors
from nimbos.api import openai_wire as wire
from nimbos.api.process_wire import (
    DeltaTold,
    EventList,
    EventTold,
    FoldedTold,
    LabelTold,
    ProcessTold,
    ReplayedTold,
)
from nimbos.api.sse import Framing
from nimbos.errors import InvalidRequest, NimbosError
from nimbos.kernel import Delta, Event, Kernel, Replayed
from nimbos.types import Account

TEXT_BYTES_MAX = 64 * 1024  # of a segment that is told with its event
PAGE_TEXT_BYTES = 4 << 20  # of all in a page, which ends behind the event that reaches it
SEQ_DIGITS_MAX = 15
_ORIGINS = ("external", "tool", "user")
_SECRECIES = ("public", "private", "credential")

# Where an event names segments. Of `ctx.changed` those that no other event told: `_added`.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "proc.created": ("input",),
    "proc.exited": ("result",),
    "signal.received": ("body",),
    "model.intent": ("request",),
    "model.done": ("message",),
    "call.intent": ("arguments",),
    "call.done": ("result", "printed"),
    "call.resolved": ("result",),
}
_TOLD_ELSEWHERE = ("assistant", "tool")


class EventTeller:
    """Writes events with the texts that they name."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    async def told(self, account: Account, event: Event) -> EventTold:
        body = msgspec.json.decode(event.body)
        texts = {}
        for hash in _named(event.kind, body):
            content = await self._kernel.text(account, hash)
            if len(content) <= TEXT_BYTES_MAX:
                texts[hash] = msgspec.Raw(content)
        return EventTold(
            pid=event.pid,
            seq=event.seq,
            epoch=event.epoch,
            ts_ms=event.ts_ms,
            kind=event.kind,
            cause=event.cause,
            call_id=event.call_id,
            actor=event.actor,
            label=LabelTold(
                origin=_ORIGINS[event.label.origin],  # type: ignore[arg-type]
                secrecy=_SECRECIES[event.label.secrecy],  # type: ignore[arg-type]
            ),
            body=msgspec.Raw(event.body),
            blob=event.blob,
            usage=msgspec.structs.asdict(event.usage) if event.usage is not None else None,
            version=event.version,
            prev_hash=event.prev_hash,
            hash=event.hash,
            texts=texts,
        )

    async def page(self, account: Account, pid: str, *, after: int, limit: int) -> EventList:
        events = await self._kernel.events(account, pid, after=after, limit=limit + 1)
        named = (hash for event in events for hash in _named(event.kind, msgspec.json.decode(event.body)))
        await self._kernel.segments.look_up(account.id, named)
        data, left = list[EventTold](), PAGE_TEXT_BYTES
        for event in events[:limit]:
            if left <= 0:
                break
            data.append(await self.told(account, event))
            left -= sum(len(bytes(text)) for text in data[-1].texts.values())
        return EventList(data=data, has_more=len(events) > len(data))

    async def stream(
        self, account: Account, pid: str, *, after: int, watch: bool, ended: Callable[[], Awaitable[ProcessTold]]
    ) -> AsyncGenerator[bytes, None]:
        """Until the process is done; then `ended` says how. `watch`: a person sees it, and its asks hurry."""
        with self._kernel.watching(pid) if watch else nullcontext():
            async with aclosing(self._kernel.follow(account, pid, after=after)) as followed:
                async for one in followed:
                    if isinstance(one, Event):
                        yield _frame(one.kind, await self.told(account, one), number=one.seq)
                    else:
                        yield _frame("delta", _delta_told(one))
        yield _frame("end", await ended())

    async def replay(self, account: Account, pid: str, *, model: str) -> AsyncGenerator[bytes, None]:
        """Its answers, beside what `model` says now where one is named; and then the end of the fold."""
        async with aclosing(self._kernel.replay(account, pid, model=model)) as replayed:
            async for one in replayed:
                if isinstance(one, Replayed):
                    yield _frame("answer", ReplayedTold.of(one))
                else:
                    yield _frame("end", FoldedTold.of(pid, one))


def _delta_told(delta: Delta) -> DeltaTold:
    return DeltaTold(pid=delta.pid, ask_id=delta.ask_id, channel=delta.channel, text=delta.text, at=delta.at)


def failed(error: NimbosError) -> bytes:
    return b"event: error\ndata: " + errors.body_of(error) + b"\n\n"


FRAMING = Framing(error=failed)


def seq_of(text: str | None, name: str) -> int:
    """Raises: InvalidRequest."""
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= SEQ_DIGITS_MAX):
        raise InvalidRequest(f"`{name}` must be the number of an event.", param=name)
    return int(text)


def _frame(kind: str, told: msgspec.Struct, *, number: int | None = None) -> bytes:
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: {kind}\ndata: ".encode() + wire.encode(told) + b"\n\n"


def _named(kind: str, body: Mapping[str, Any]) -> list[str]:
    if kind == "ctx.changed":
        added = [one["hash"] for one in body.get("add", ()) if one["kind"] not in _TOLD_ELSEWHERE]
        return list(dict.fromkeys(added))
    return [body[name] for name in _NAMES.get(kind, ()) if body.get(name)]

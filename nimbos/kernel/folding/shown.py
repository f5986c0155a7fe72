"""The segments of a context: those shown, in order, and those evicted, whose content stays.

A segment's place is for life, by the order in which they came; a view takes the place of the first it covers. Only the
results of one answer's calls, which may come in any order, share the places they came to in the order of the calls.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from nimbos.kernel.events import CtxChanged, Segment


@dataclass(slots=True, kw_only=True)
class Shown:
    """`places`: of all segments that ever were, the `added` of them."""

    segments: list[Segment] = field(default_factory=list)
    evicted: dict[str, Segment] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    added: int = 0

    def copy(self) -> Shown:
        return Shown(
            segments=list(self.segments), evicted=dict(self.evicted), places=dict(self.places), added=self.added
        )

    def change(self, change: CtxChanged, *, turn: Sequence[str] = ()) -> str | None:
        """`turn`: the ids of the last answer's calls, which their results bear, too. Why it cannot be; then the context
        is of no use any more."""
        why = self._evict(change.evict)
        for segment in change.add:
            why = why or self._add(segment)
            if why is None and segment.kind == "tool" and segment.id in turn[:-1]:
                self._order(turn)
        return why or self._pin(change.pin, pinned=True) or self._pin(change.unpin, pinned=False)

    def _evict(self, ids: tuple[str, ...]) -> str | None:
        if not ids:
            return None
        leaving = set(ids)
        going = {segment.id: segment for segment in self.segments if segment.id in leaving}
        for id in ids:
            if id not in going:
                return f"segment {id} is not shown"
            if going[id].pinned:
                return f"segment {id} is pinned"
        self.segments = [segment for segment in self.segments if segment.id not in going]
        self.evicted.update(going)
        return None

    def _add(self, segment: Segment) -> str | None:
        if segment.id in self.places:
            return f"segment {segment.id} is there already"
        for covered in segment.covers:
            if covered not in self.evicted:
                return f"segment {covered} is covered and not evicted"
        self.added += 1
        self.places[segment.id] = place = min((self.places[id] for id in segment.covers), default=self.added)
        at = bisect_left(self.segments, place, key=lambda shown: self.places[shown.id]) if segment.covers else None
        self.segments.insert(len(self.segments) if at is None else at, segment)
        return None

    def _order(self, turn: Sequence[str]) -> None:
        """A result came: others of its answer that are behind it may have come before."""
        came = [id for id in turn if id in self.places]
        for id, place in zip(came, sorted(self.places[id] for id in came), strict=True):
            self.places[id] = place
        self.segments.sort(key=lambda shown: self.places[shown.id])

    def _pin(self, ids: tuple[str, ...], *, pinned: bool) -> str | None:
        for id in ids:
            at = next((at for at, segment in enumerate(self.segments) if segment.id == id), None)
            if at is None:
                return f"segment {id} is not shown"
            self.segments[at] = msgspec.structs.replace(self.segments[at], pinned=pinned)
        return None

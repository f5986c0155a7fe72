"""From bytes to text that may be sent: thinking marks, stop strings.

Knows nothing of tokens. What these classes have released depends only on the bytes fed so far, never on how they were
cut into pieces' chunks or when somebody looked, so feeding the same tokens again rebuilds the same state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto


class Phase(Enum):
    """Where an answer stands towards its one block of thinking."""

    BEFORE = auto()  # the open mark may still come
    INSIDE = auto()
    AFTER = auto()  # or there never was one


@dataclass(slots=True, eq=False)
class ThinkingBlock:
    """Finds the marks of the first block of thinking in a stream of bytes, and takes them out.

    Neither mark is ever given out, nor the newlines that directly follow one. Marks after the block are ordinary text.
    `seen`: how many bytes were ever fed.
    """

    open: bytes
    close: bytes
    phase: Phase
    seen: int = 0
    _held: bytearray = field(default_factory=bytearray)
    _shown: bytearray = field(default_factory=bytearray)  # for each held byte: 1, or 0 for a control token's name
    _after_mark: bool = False

    def __post_init__(self) -> None:
        self._after_mark = self.phase is Phase.INSIDE

    @property
    def busy(self) -> bool:
        """Whether bytes still have to go through here."""
        return self.phase is not Phase.AFTER or self._after_mark

    @property
    def held_from(self) -> int:
        """Offset, from the first byte ever fed, of what is held back as the possible start of a mark."""
        return self.seen - len(self._held)

    def feed(self, piece: bytes, *, shown: bool) -> tuple[list[tuple[Phase, bytes]], int | None]:
        """What is certain now, each with the phase it belongs to; and where the close mark began, if it ended here.

        A control token's name (`shown` False) takes part in marks and is never given out.
        """
        out: list[tuple[Phase, bytes]] = []
        closed_at: int | None = None
        self._held += piece
        self._shown += (b"\1" if shown else b"\0") * len(piece)
        self.seen += len(piece)
        while self.phase is not Phase.AFTER:
            mark = self.open if self.phase is Phase.BEFORE else self.close
            at = self._held.find(mark)
            if at < 0:
                self._give(out, len(self._held) - _overlap(self._held, mark))
                return out, closed_at
            self._give(out, at)
            if self.phase is Phase.INSIDE:
                closed_at = self.seen - len(self._held)
            self._drop(len(mark))
            self.phase = Phase.INSIDE if self.phase is Phase.BEFORE else Phase.AFTER
            self._after_mark = True
        self._give(out, len(self._held))
        return out, closed_at

    def finish(self) -> list[tuple[Phase, bytes]]:
        """Gives out what was held back as the possible start of a mark."""
        out: list[tuple[Phase, bytes]] = []
        self._give(out, len(self._held))
        return out

    def abandon(self) -> list[tuple[Phase, bytes]]:
        """Ends the block although no close mark came."""
        out = self.finish()
        self.phase = Phase.AFTER
        self._after_mark = True
        return out

    def _give(self, out: list[tuple[Phase, bytes]], count: int) -> None:
        text, shown = bytes(self._held[:count]), self._shown[:count]
        self._drop(count)
        if 0 in shown:
            text = bytes(byte for byte, visible in zip(text, shown, strict=True) if visible)
        if self._after_mark:
            text = text.lstrip(b"\n")
        if text:
            self._after_mark = False
            out.append((self.phase, text))

    def _drop(self, count: int) -> None:
        del self._held[:count], self._shown[:count]


def _overlap(text: bytearray, mark: bytes) -> int:
    """Length of the longest end of `text` that is a start of `mark`, but not all of it."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


class StopMatcher:
    """Ends a text before the first stop string in it; of several that end together, the longest.

    Holds back what may become one. Each character costs the same however long the stop strings are
    (Knuth-Morris-Pratt), because they come from strangers.
    """

    __slots__ = ("_failures", "_held", "_matched", "_stops", "hit")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted({stop for stop in stops if stop}, key=len, reverse=True)
        self._failures = [_failures(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # how much of each stop string the text ends with
        self._held = ""
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """What is certain not to be in a stop string; after `hit` nothing more."""
        if self.hit is not None:
            return ""
        if not self._held and not any(stop[0] in text for stop in self._stops):
            return text
        ends = [self._advance(index, text) for index in range(len(self._stops))]
        first = min((end for end in ends if end is not None), default=None)
        whole = self._held + text
        if first is None:
            keep = max(self._matched, default=0)
        else:
            self.hit = self._stops[ends.index(first)]
            whole = whole[: len(self._held) + first]
            keep = len(self.hit)
        released = whole[: len(whole) - keep]
        self._held = "" if self.hit is not None else whole[len(released) :]
        return released

    def flush(self) -> str:
        """Gives out what was held back; a stop string can no longer begin in it."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, index: int, text: str) -> int | None:
        """Where in `text` this stop string ends first, if it does."""
        stop, failures, matched = self._stops[index], self._failures[index], self._matched[index]
        for at, character in enumerate(text):
            while matched and stop[matched] != character:
                matched = failures[matched - 1]
            if stop[matched] == character:
                matched += 1
                if matched == len(stop):
                    return at + 1
        self._matched[index] = matched
        return None


def _failures(stop: str) -> list[int]:
    """For each prefix the length of its longest proper border."""
    borders = [0] * len(stop)
    length = 0
    for at in range(1, len(stop)):
        while length and stop[at] != stop[length]:
            length = borders[length - 1]
        length += stop[at] == stop[length]
        borders[at] = length
    return borders

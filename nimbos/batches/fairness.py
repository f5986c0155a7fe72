"""Which batch gets the next free place, and how many lines of one may run at once where limits are met. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_KEPT_S = 60.0  # a limit may be raised meanwhile


class Caps:
    """How many lines of a batch may run at once, where a limit was met: half of those that did, and one more with every
    line that ends well, so that a limit is met about once for each line and not once for each place."""

    def __init__(self) -> None:
        self._caps: dict[str, tuple[int, float]] = {}

    def put(self, name: str, cap: int, now_s: float) -> None:
        self._caps[name] = max(1, cap), now_s + _KEPT_S

    def grow(self, name: str) -> None:
        if name in self._caps:
            cap, until_s = self._caps[name]
            self._caps[name] = cap + 1, until_s

    def among(self, names: Iterable[str], now_s: float) -> dict[str, int]:
        """The caps that still count, of these."""
        self._caps = {name: (cap, until_s) for name, (cap, until_s) in self._caps.items() if until_s > now_s}
        return {name: self._caps[name][0] for name in names if name in self._caps}


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A batch whose lines may be answered. `held`: how many are, here; `weight`: of its project."""

    project: str
    held: int
    weight: float = 1.0


def places(free: int, queues: Mapping[str, Queue], caps: Mapping[str, int]) -> dict[str, int]:
    """How many of `free` places each batch gets; the others are left out. A place goes to the project that has fewest
    for its weight, and in it to the batch that has fewest: many batches of one project starve no other. Of those that
    have as few, the first in `queues` goes first."""
    held = {name: queue.held for name, queue in queues.items() if queue.held < caps.get(name, queue.held + 1)}
    of_project: dict[str, int] = {}
    for queue in queues.values():
        of_project[queue.project] = of_project.get(queue.project, 0) + queue.held
    found: dict[str, int] = {}
    for _ in range(free):
        if not held:
            break
        name = min(held, key=lambda one: (of_project[queues[one].project] / queues[one].weight, held[one]))
        held[name] += 1
        of_project[queues[name].project] += 1
        found[name] = found.get(name, 0) + 1
        if held[name] >= caps.get(name, held[name] + 1):
            del held[name]
    return found


class Turns:
    """Who was given something last, so that where there are more names than places none is always the last one."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._given = 0

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Those that had nothing yet first, then whoever waits longest; all others are forgotten."""
        self._last = {name: self._last.get(name, 0) for name in names}
        return sorted(self._last, key=lambda name: self._last[name])

    def given(self, name: str) -> None:
        self._given += 1
        self._last[name] = self._given

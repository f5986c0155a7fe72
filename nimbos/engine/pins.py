"""Pins: prefixes that an account asked to be kept for a while, though nobody uses them (explicit caching).

A pin marks a node of the context tree: forgetting a branch stops there. It is renewed when its prefix is used, ends by
time, and together pins keep at most a share of the cells: beyond it, the account that holds most loses its oldest.
Knows no time but what it is told. `context.py` is the only caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nimbos.engine.context import Node

CELLS_SHARE = 2  # half of the cells
SEQUENCES_SHARE = 4  # a pin may hold a sequence id for as long as it stands, so a quarter of them


@dataclass(slots=True, eq=False)
class Pin:
    node: Node
    account: str
    duration_ms: float
    until_ms: float
    length: int
    used: int  # counts uses; the least recently used pin has the smallest


class Pins:
    def __init__(self, *, cells: int, sequences: int) -> None:
        self._cells_max = cells // CELLS_SHARE
        self._most = max(1, sequences // SEQUENCES_SHARE)
        self._pins: dict[int, Pin] = {}
        self._uses = 0

    def __len__(self) -> int:
        return len(self._pins)

    def __contains__(self, node: Node) -> bool:
        return id(node) in self._pins

    def add(self, node: Node, account: str, now_ms: float, duration_ms: float) -> None:
        """Or renews the one that is there; the longer duration counts."""
        known = self._pins.get(id(node))
        if known is not None:
            duration_ms = max(duration_ms, known.duration_ms)
        self._uses += 1
        self._pins[id(node)] = Pin(node, account, duration_ms, now_ms + duration_ms, node.end, self._uses)
        while len(self._pins) > self._most or self.cells > self._cells_max:
            self.lose_one()

    def use(self, path: Iterator[Node], now_ms: float) -> None:
        for node in path:
            pin = self._pins.get(id(node))
            if pin is not None:
                self._uses += 1
                pin.used, pin.until_ms = self._uses, now_ms + pin.duration_ms

    def expire(self, now_ms: float) -> None:
        for key in [key for key, pin in self._pins.items() if pin.until_ms <= now_ms]:
            del self._pins[key]

    def remove(self, node: Node) -> None:
        """The node is gone."""
        self._pins.pop(id(node), None)

    def kept(self) -> dict[int, Node]:
        """Every node that a pin keeps, by id: the pinned ones and those above them."""
        found: dict[int, Node] = {}
        for pin in self._pins.values():
            node: Node | None = pin.node
            while node is not None and id(node) not in found:
                found[id(node)] = node
                node = node.parent
        return found

    @property
    def cells(self) -> int:
        return sum(len(node.tokens) for node in self.kept().values())

    def check(self, nodes: set[int]) -> None:
        """Asserts that every pin is in the tree and keeps what it was made for; for tests."""
        for key, pin in self._pins.items():
            assert key == id(pin.node) and key in nodes, "a pinned node was forgotten"
            assert pin.node.end == pin.length, "a pin keeps more or less than it should"
        assert self.cells <= self._cells_max and len(self._pins) <= self._most

    def lose_one(self) -> None:
        """The least recently used one of the account that holds most; there must be one."""
        held: dict[str, int] = {}
        for pin in self._pins.values():
            held[pin.account] = held.get(pin.account, 0) + pin.node.end
        loser = min(self._pins.values(), key=lambda pin: (-held[pin.account], pin.used))
        del self._pins[id(loser.node)]

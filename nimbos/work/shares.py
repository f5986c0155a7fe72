"""Which queue gets the next free place: the one that has fewest for its weight, so that a long queue starves no short
one. Pure."""

from __future__ import annotations

from collections.abc import Mapping


def shares_of(free: int, holding: Mapping[str, int], weights: Mapping[str, float] | None = None) -> dict[str, int]:
    """How many of `free` places each queue gets, given how many it has; the others are left out. Of those that have as
    few, the first in `holding` goes first. `weights`: twice the weight is twice the places; 1 is what every queue
    has."""
    weight = weights or {}
    levels = dict(holding)
    shares: dict[str, int] = {}
    for _ in range(free if levels else 0):
        poorest = min(levels, key=lambda name: levels[name] / weight.get(name, 1.0))
        levels[poorest] += 1
        shares[poorest] = shares.get(poorest, 0) + 1
    return shares

"""Which queue gets the next free place: the one that has fewest, so that a long queue starves no short one. Pure."""

from __future__ import annotations


def shares_of(free: int, holding: dict[str, int], caps: dict[str, int] | None = None) -> dict[str, int]:
    """How many of `free` places each queue gets, given how many it has and may have; the others are left out. Of those
    that have as few, the first in `holding` goes first."""
    most = caps or {}
    levels = {name: held for name, held in holding.items() if held < most.get(name, held + 1)}
    shares: dict[str, int] = {}
    for _ in range(free):
        if not levels:
            break
        poorest = min(levels, key=levels.__getitem__)
        levels[poorest] += 1
        shares[poorest] = shares.get(poorest, 0) + 1
        if levels[poorest] >= most.get(poorest, levels[poorest] + 1):
            del levels[poorest]
    return shares

"""Which batch gets the next free place: the one that has fewest, so that a long batch starves no short one. Pure."""

from __future__ import annotations


def shares_of(free: int, holding: dict[str, int]) -> dict[str, int]:
    """How many of `free` places each batch gets, given how many it has; batches that get none are left out."""
    levels = dict(holding)
    shares: dict[str, int] = {}
    for _ in range(free):
        if not levels:
            break
        poorest = min(levels, key=lambda name: (levels[name], name))
        levels[poorest] += 1
        shares[poorest] = shares.get(poorest, 0) + 1
    return shares

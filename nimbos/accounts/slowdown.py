"""Slows down whoever guesses: after a few failures each further one must wait longer. Pure; time is given.

It says nothing of good secrets: whoever asks it decides whom to let pass. Memory is bounded, the oldest is forgotten.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass

_PLACES_MAX = 4096


@dataclass(slots=True)
class _Failures:
    count: int
    last_s: float
    until_s: float


class Slowdown:
    def __init__(self, *, free: int, longest_s: float, forget_s: float, places_max: int = _PLACES_MAX) -> None:
        """`free`: failures that cost nothing. After them the wait doubles from one second to `longest_s`. A place that
        has not failed for `forget_s` is as new."""
        self._free = free
        self._longest_s = longest_s
        self._forget_s = forget_s
        self._places_max = places_max
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    def wait_s(self, place: str, now_s: float) -> float:
        """How long this place must still wait; 0 when it need not."""
        known = self._failures.get(place)
        return max(0.0, known.until_s - now_s) if known is not None else 0.0

    def failed(self, place: str, now_s: float) -> float:
        """Counts a failure; returns how long the place must wait now."""
        known = self._failures.pop(place, None)
        if known is None or now_s - known.last_s >= self._forget_s:
            known = _Failures(count=0, last_s=now_s, until_s=now_s)
        known.count += 1
        known.last_s = now_s
        over = known.count - self._free
        if over > 0:
            known.until_s = now_s + min(self._longest_s, 2.0 ** min(over - 1, 30))
        self._failures[place] = known
        while len(self._failures) > self._places_max:
            self._failures.popitem(last=False)
        return max(0.0, known.until_s - now_s)

    def count(self, place: str) -> int:
        known = self._failures.get(place)
        return known.count if known is not None else 0

    def forget(self, place: str) -> None:
        self._failures.pop(place, None)

    def __len__(self) -> int:
        return len(self._failures)


def place_of(address: str) -> str:
    """An IPv4 address, or the /64 of an IPv6 one: whoever has one address there has all of them."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)

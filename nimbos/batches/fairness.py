"""How many lines of a batch may run at once, where limits are met. Which batch gets a place: `work/shares.py`. Pure."""

from __future__ import annotations

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

    def among(self, names: dict[str, int], now_s: float) -> dict[str, int]:
        """The caps that still count, of these."""
        self._caps = {name: (cap, until_s) for name, (cap, until_s) in self._caps.items() if until_s > now_s}
        return {name: self._caps[name][0] for name in names if name in self._caps}

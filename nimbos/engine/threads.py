"""How many threads compute a step when other processes use the cores as well.

ggml's threads wait for each other by spinning, at hundreds of places in a step. When one of them is not running,
because another process has its core, the rest burn time: two threads beside two busy processes gave 2 tokens/s where
one thread gave 60. So: while the threads get their cores, all of them compute; when they do not, one thread is tried,
and what is faster is kept, with a look at the other now and then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

CONTENDED_SHARE = 0.85  # of wall × threads that the process really computed; below, somebody else has the cores
PROBE_EVERY_MS = 1000.0  # doubled after each look that found nothing better
PROBE_EVERY_MS_MAX = 16_000.0
_FORGET = 0.3


@dataclass(slots=True)
class ThreadChoice:
    """`threads` is for the next step. Times are relative to a fixed expectation of the step's rows, not to one that
    learns, or the two choices could not be compared."""

    all_threads: int
    threads: int = field(init=False)
    _time: dict[int, float] = field(default_factory=dict)
    _share: float = 1.0
    _probing: bool = False
    _next_probe_ms: float = 0.0
    _every_ms: float = PROBE_EVERY_MS

    def __post_init__(self) -> None:
        self.threads = self.all_threads

    @property
    def contended(self) -> bool:
        """Other processes take the cores that this engine counts on."""
        return self.all_threads > 1 and (self.threads == 1 or self._share < CONTENDED_SHARE)

    def observe(self, *, relative: float, cpu_ms: float, wall_ms: float, now_ms: float) -> None:
        """After a step with `threads`: how it went. `cpu_ms`: of the whole process, in the step."""
        if self.all_threads == 1 or wall_ms <= 0:
            return
        known = self._time.get(self.threads)
        self._time[self.threads] = relative if known is None else known + _FORGET * (relative - known)
        if self.threads == self.all_threads:
            share = min(1.0, cpu_ms / (wall_ms * self.threads))
            self._share += _FORGET * (share - self._share)
        if self._probing:
            self._settle(now_ms)
        elif self.contended and now_ms >= self._next_probe_ms:
            self.threads = self.all_threads if self.threads == 1 else 1
            self._time.pop(self.threads, None)
            self._probing = True

    def _settle(self, now_ms: float) -> None:
        one, full = self._time.get(1), self._time.get(self.all_threads)
        before = 1 if self.threads == self.all_threads else self.all_threads
        if one is not None and full is not None:
            self.threads = 1 if one < full else self.all_threads
        self._every_ms = min(PROBE_EVERY_MS_MAX, 2 * self._every_ms) if self.threads == before else PROBE_EVERY_MS
        self._next_probe_ms = now_ms + self._every_ms
        self._probing = False

"""Compute lease: engines on the same cores take turns, a step at a time.

Two thread pools that spin on the same cores collapse each other (seen: 10.1 → 0.12 tokens/s), so whoever computes a
step holds the lease. It is a file lock, so the kernel gives it back when its holder dies, however it dies. Beside the
lock the file has a slot for each engine, in which it says that it waits, how urgent its step is, and how much time it
has had; the one with the least weighted time is next. One engine alone pays two system calls a step.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from nimbos.types import AskClass

WEIGHT = {AskClass.INTERACTIVE: 16.0, AskClass.AGENT: 4.0, AskClass.BATCH: 1.0}
_SLOT = struct.Struct("<IId")  # process id, waiting (0 or 1), virtual milliseconds
_SLOTS = 64
_YIELD_S = 0.0001
_PASSED_OVER_MAX = 10  # after so many times of patience with the lease free, others lose their turn
_PATIENCE_S = 0.02  # a waiting slot whose process does not take its turn for so long may be dead: look


class Lease:
    """`with lease.hold(ask_class):` around a step."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._virtual = 0.0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with self._locked():
            if os.fstat(self._fd).st_size < _SLOT.size * _SLOTS:
                os.ftruncate(self._fd, _SLOT.size * _SLOTS)
            self._table = mmap.mmap(self._fd, _SLOT.size * _SLOTS)
            self._slot = self._claim()

    def close(self) -> None:
        with self._locked():
            self._write(self._slot, 0, False, 0.0)
        self._table.close()
        os.close(self._fd)

    @contextlib.contextmanager
    def hold(self, ask_class: AskClass) -> Iterator[None]:
        """Waits for the turn, holds the cores, and pays for the time with the weight of `ask_class`."""
        self._acquire()
        start = time.monotonic()
        try:
            yield
        finally:
            spent_ms = (time.monotonic() - start) * 1e3 / WEIGHT[ask_class]
            self._virtual += spent_ms
            self._write(self._slot, os.getpid(), False, self._virtual)
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _acquire(self) -> None:
        others = self._others()
        busiest = [virtual for _, _, waiting, virtual in others if waiting]
        if busiest:  # idle time is no credit: who comes back starts where the least of those at work are
            self._virtual = max(self._virtual, min(busiest))
        self._write(self._slot, os.getpid(), True, self._virtual)
        patience, passed_over = time.monotonic() + _PATIENCE_S, 0
        while True:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if not self._somebody_before():
                self._write(self._slot, os.getpid(), False, self._virtual)
                return
            if time.monotonic() > patience:
                passed_over += 1
                self._bury_dead(also_slow=passed_over >= _PASSED_OVER_MAX)
                patience = time.monotonic() + _PATIENCE_S
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            time.sleep(_YIELD_S)

    def _somebody_before(self) -> bool:
        return any(
            waiting and (virtual, slot) < (self._virtual, self._slot) for slot, _, waiting, virtual in self._others()
        )

    def _bury_dead(self, *, also_slow: bool) -> None:
        """The lease is free and those before us do not take it. The dead lose their slot; one that is stopped, or whose
        number another process has now, loses its turn."""
        for slot, pid, waiting, virtual in self._others():
            if waiting and not _alive(pid):
                self._write(slot, 0, False, 0.0)
            elif waiting and also_slow and (virtual, slot) < (self._virtual, self._slot):
                self._write(slot, pid, False, virtual)

    def _claim(self) -> int:
        taken = {slot: pid for slot, pid, _, _ in self._rows() if pid}
        for slot in range(_SLOTS):
            if slot not in taken or not _alive(taken[slot]):
                self._virtual = max((v for _, pid, _, v in self._rows() if pid and _alive(pid)), default=0.0)
                self._write(slot, os.getpid(), False, self._virtual)
                return slot
        raise RuntimeError(f"more than {_SLOTS} engines share one home folder")

    def _others(self) -> list[tuple[int, int, bool, float]]:
        return [row for row in self._rows() if row[1] and row[0] != self._slot]

    def _rows(self) -> list[tuple[int, int, bool, float]]:
        rows = _SLOT.iter_unpack(self._table[:])
        return [(slot, pid, bool(waiting), virtual) for slot, (pid, waiting, virtual) in enumerate(rows)]

    def _write(self, slot: int, pid: int, waiting: bool, virtual: float) -> None:
        _SLOT.pack_into(self._table, slot * _SLOT.size, pid, waiting, virtual)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _alive(pid: int) -> bool:
    """False also for a process that is dead and that its parent has not yet noticed."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True

"""Compute lease: engines on the same cores take turns, a step at a time.

Two thread pools that spin on the same cores collapse each other (seen: 10.1 → 0.12 tokens/s), so whoever computes a
step holds the lease. It is a file lock, so the kernel gives it back when its holder dies, however it dies. Beside the
lock the file has a slot for each engine, in which it says that it waits and how much time it has had, weighted by the
class of what it computed; the one with the least is next. Between two steps an engine is away for a moment and keeps
its place, or two engines would alternate whatever their weights are. Behind the slots stands the clock of all: with how
much the last holder began. Who was idle begins there, so that idle time is neither credit nor debt. One engine alone
pays two system calls a step.

A step of a lower class takes up to seconds where the model is large. To whom an interactive ask comes, it may ask the
holder to stop such a step: it raises the holder's flag behind the clock, which the holder's libllama looks at all the
time. A step after a stopped one runs to its end, so that everybody comes on.
Source: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from nimbos.types import AskClass

WEIGHT = {AskClass.INTERACTIVE: 16.0, AskClass.AGENT: 4.0, AskClass.BATCH: 1.0}
_SLOT = struct.Struct("<IIdd")  # process id, state, virtual milliseconds, since when (seconds; see `_Row`)
_IDLE, _WAITING = 0, 1  # states; these are of one that computes and may be asked to stop:
_YIELDING = {2: AskClass.AGENT, 3: AskClass.BATCH}
_SLOTS = 64
_SINCE = struct.Struct("<d")
_SINCE_AT = _SLOT.size - _SINCE.size
_CLOCK = struct.Struct("<d")  # virtual milliseconds
_CLOCK_AT = _SLOT.size * _SLOTS
_FLAGS_AT = _CLOCK_AT + _CLOCK.size
_FLAG_BYTES = 2  # of each slot: a string that is empty, or one letter long
_FILE_BYTES = _FLAGS_AT + _FLAG_BYTES * _SLOTS
_YIELD_S = 0.0001
_AWAY_S = 0.01  # between two steps: sampling, sending, planning
_ARRIVING_S = 0.3  # from an ask to its first step, which others were stopped for: cells may have to be written out
_PASSED_OVER_MAX = 10  # after so many times of patience with the lease free, others lose their turn
_PATIENCE_S = 0.02  # a waiting slot whose process does not take its turn for so long may be dead: look


class _Row(NamedTuple):
    """`since_s`: when its last step ended; while it computes and may be stopped, when that began; where others were
    stopped for what comes, until when it may take."""

    slot: int
    pid: int
    state: int
    virtual: float
    since_s: float


class Lease:
    """`with lease.hold(ask_class):` around a step."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._virtual = 0.0
        self._stopped = False  # whether the last step was asked to
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with self._locked():
            if os.fstat(self._fd).st_size != _FILE_BYTES:  # new, or of a release with another table
                os.ftruncate(self._fd, 0)
                os.ftruncate(self._fd, _FILE_BYTES)
            self._table = mmap.mmap(self._fd, _FILE_BYTES)
            self._slot = self._claim()

    @property
    def flag(self) -> ctypes.Array[ctypes.c_char]:
        """What `interrupt_others` of the others raises: a C string in the file, that is not empty then. Whoever takes
        it lowers it before a step, and keeps the file mapped: `close` afterwards only."""
        return (ctypes.c_char * _FLAG_BYTES).from_buffer(self._table, self._flag_at(self._slot))

    def close(self) -> None:
        with self._locked():
            self._write(self._slot, 0, _IDLE, 0.0)
        self._table.close()
        os.close(self._fd)

    @contextlib.contextmanager
    def hold(self, ask_class: AskClass, *, interruptible: bool = False) -> Iterator[None]:
        """Waits for the turn, holds the cores, and pays for the time with the weight of `ask_class`. With
        `interruptible` the flag may be raised meanwhile, but not in two steps that follow each other."""
        self._announce()
        self._wait()
        start = time.monotonic()
        yields = interruptible and self._offer(ask_class, start)
        try:
            yield
        finally:
            self._stopped = yields and self._table[self._flag_at(self._slot)] != 0
            self._leave((time.monotonic() - start) * 1e3, ask_class)

    def interrupt_others(self) -> None:
        """An interactive ask came to this engine: a step of a lower class that another one computes is stopped, if this
        engine is next then. For any thread; the engine's own announces itself afterwards, within `_ARRIVING_S`."""
        now, mine = time.monotonic(), max(self._virtual, self._clock())
        for row in self._rows():
            ask_class = _YIELDING.get(row.state)
            if ask_class is None or row.slot == self._slot:
                continue
            if mine < row.virtual + (now - row.since_s) * 1e3 / WEIGHT[ask_class]:
                _SINCE.pack_into(
                    self._table, _SLOT.size * self._slot + _SINCE_AT, now + _ARRIVING_S
                )  # its place is kept
                self._table[self._flag_at(row.slot)] = ord("x")

    def _offer(self, ask_class: AskClass, now_s: float) -> bool:
        state = next((state for state, yielding in _YIELDING.items() if yielding is ask_class), None)
        if state is None or self._stopped:
            return False
        self._write(self._slot, os.getpid(), state, self._virtual, since_s=now_s)
        return True

    def _announce(self) -> None:
        self._virtual = max(self._virtual, self._clock())
        self._write(self._slot, os.getpid(), _WAITING, self._virtual)

    def _wait(self) -> None:
        patience, passed_over = time.monotonic() + _PATIENCE_S, 0
        while not self._enter():
            if time.monotonic() > patience:
                passed_over += 1
                with self._locked():
                    self._bury_dead(also_slow=passed_over >= _PASSED_OVER_MAX)
                patience = time.monotonic() + _PATIENCE_S
            time.sleep(_YIELD_S)

    def _enter(self) -> bool:
        """Waits for the lock, and keeps it if this engine is next. Returns: False when another one is."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        if self._somebody_before():
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            return False
        self._write(self._slot, os.getpid(), _IDLE, self._virtual)
        _CLOCK.pack_into(self._table, _CLOCK_AT, max(self._virtual, self._clock()))
        return True

    def _leave(self, spent_ms: float, ask_class: AskClass) -> None:
        self._virtual += spent_ms / WEIGHT[ask_class]
        self._write(self._slot, os.getpid(), _IDLE, self._virtual, since_s=time.monotonic())
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _somebody_before(self) -> bool:
        now, mine = time.monotonic(), (self._virtual, self._slot)
        return any(
            (row.state == _WAITING or now - _AWAY_S < row.since_s <= now + _ARRIVING_S)
            and (row.virtual, row.slot) < mine
            for row in self._rows()
            if row.slot != self._slot
        )

    def _bury_dead(self, *, also_slow: bool) -> None:
        """Those before us do not take their turn. The dead lose their slot; one that is stopped, or whose
        number another process has now, loses its turn."""
        for row in self._rows():
            if row.slot == self._slot or row.state != _WAITING:
                continue
            if not _alive(row.pid):
                self._write(row.slot, 0, _IDLE, 0.0)
            elif also_slow and (row.virtual, row.slot) < (self._virtual, self._slot):
                self._write(row.slot, row.pid, _IDLE, row.virtual)

    def _claim(self) -> int:
        taken = {row.slot: row.pid for row in self._rows()}
        for slot in range(_SLOTS):
            if slot not in taken or not _alive(taken[slot]):
                self._virtual = self._clock()
                self._write(slot, os.getpid(), _IDLE, self._virtual)
                self._table[self._flag_at(slot)] = 0
                return slot
        raise RuntimeError(f"more than {_SLOTS} engines share one home folder")

    def _clock(self) -> float:
        return float(_CLOCK.unpack_from(self._table, _CLOCK_AT)[0])

    def _rows(self) -> list[_Row]:
        """Of the slots in use."""
        rows = enumerate(_SLOT.iter_unpack(self._table[:_CLOCK_AT]))
        return [_Row(slot, *row) for slot, row in rows if row[0]]

    def _write(self, slot: int, pid: int, state: int, virtual: float, *, since_s: float = 0.0) -> None:
        _SLOT.pack_into(self._table, slot * _SLOT.size, pid, state, virtual, since_s)

    def _flag_at(self, slot: int) -> int:
        return _FLAGS_AT + _FLAG_BYTES * slot

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
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True

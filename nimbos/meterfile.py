"""The meter file: what each ask has used, in memory that outlives the processes that count.

One file for each server, `run/meter-ID.bin`, mapped by the server and by its engines, so that the counts survive
SIGKILL of either. The server allots a row to an ask, whoever computes the ask adds to it before anything is told, and
the ledger reads it when the ask is over. Knows no prices and no database. `engine/tally.py` writes, `ledger` reads.

    file    HEADER (64 bytes: magic, row size, rows), then rows of 128 bytes
    row     0   ask id, the 16 bytes of its UUID
            16  eight counters, signed, 64 bits each, aligned, in the machine's byte order (`_COUNTERS`)
            80  state: 0 free, 1 in use
            88  not used

A row has one writer at a time, and each counter is written whole, so a reader never sees half a number. What is billed
is one counter and what is computed again another (the computed amount is their sum): a process that dies between two
writes leaves every billed number right. After a power cut the file holds what the kernel happened to write back.

The server holds a lock on its file. A file that can be locked belongs to a server that is dead: see `leftovers`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nimbos.errors import Overloaded, StorageUnavailable
from nimbos.types import Usage, new_id

ROWS = 16_384
_MAGIC = b"NBMETER1"
_HEADER = struct.Struct("<8sII48x")
_ROW_BYTES = 128
_WORDS = _ROW_BYTES // 8
_ID_BYTES = 16
_COUNTERS = (
    "input",
    "cached",
    "output",
    "thinking",
    "recomputed_input",
    "recomputed_output",
    "recomputed_thinking",
    "compute_us",
)
_INPUT, _CACHED, _OUTPUT, _THINKING, _AGAIN_INPUT, _AGAIN_OUTPUT, _AGAIN_THINKING, _COMPUTE_US = range(2, 10)
_STATE = 10
_FREE, _IN_USE = 0, 1
_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What one row says. `computed_input`, `output` and `thinking` include what was computed again; `cached_input`
    was found in memory. `thinking` is a part of `output`."""

    computed_input: int = 0
    cached_input: int = 0
    output: int = 0
    thinking: int = 0
    recomputed_input: int = 0
    recomputed_output: int = 0
    recomputed_thinking: int = 0
    compute_us: int = 0

    def usage(self) -> Usage:
        """What is billed: the meter less what was computed again. Tokens that turned out to be none of the thinking may
        have been paid for as such by an earlier ask."""
        return Usage(
            input=self.computed_input - self.recomputed_input + self.cached_input,
            cached=self.cached_input,
            output=self.output - self.recomputed_output,
            thinking=max(0, self.thinking - self.recomputed_thinking),
            recomputed=self.recomputed_input + self.recomputed_output,
        )


class Row:
    """The writer's side of one row. It stops by itself when the row is no longer its ask's."""

    __slots__ = ("_at", "_id", "_words")

    def __init__(self, words: memoryview, row: int, ask_id: str) -> None:
        self._words = words
        self._at = _first_word(row)
        self._id = struct.unpack("=qq", _id_bytes(ask_id))

    @property
    def ours(self) -> bool:
        """False once the server has freed it; the ask is over."""
        words, at = self._words, self._at
        return words[at + _STATE] == _IN_USE and (words[at], words[at + 1]) == self._id

    def add(
        self,
        *,
        input: int = 0,
        cached: int = 0,
        output: int = 0,
        thinking: int = 0,
        recomputed_input: int = 0,
        recomputed_output: int = 0,
        recomputed_thinking: int = 0,
        compute_us: int = 0,
    ) -> None:
        """The first four are billed; what is `recomputed_…` is not, and not in them. Less than zero takes back."""
        self.add_all(
            (
                input,
                cached,
                output,
                thinking,
                recomputed_input,
                recomputed_output,
                recomputed_thinking,
                compute_us,
            )
        )

    def add_all(self, amounts: Sequence[int]) -> None:
        """As `add`, in the order of `_COUNTERS`."""
        if not self.ours:
            return
        words, at = self._words, self._at + _INPUT
        for amount in amounts:
            if amount:
                words[at] += amount
            at += 1

    def counts(self) -> Counts:
        return _counts(self._words, self._at)


class Rows:
    """The file as an engine process has it: mapped once, before it confines itself, and then without a descriptor
    (who has one could cut the file short under the server's feet)."""

    def __init__(self, descriptor: int) -> None:
        """Maps and closes `descriptor`. Raises: ValueError for what is no meter file."""
        try:
            mapped = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self._rows = _check_header(mapped)
        self._words = memoryview(mapped).cast("q")

    def row(self, row: int, ask_id: str) -> Row:
        """Raises: IndexError."""
        if not 0 <= row < self._rows:
            raise IndexError(f"the meter file has {self._rows} rows, not a row {row}")
        return Row(self._words, row, ask_id)


class MeterFile:
    """The server's own. Use from one thread."""

    def __init__(self, path: Path, descriptor: int, rows: int) -> None:
        self.path = path
        self._lock = descriptor  # holds the lock for as long as it is open
        self._words = memoryview(mmap.mmap(descriptor, 0)).cast("q")
        self._free = deque(range(rows))  # reused as late as possible: a writer may be a step late
        self._used: set[int] = set()

    @classmethod
    def create(cls, run_dir: Path, *, rows: int = ROWS) -> MeterFile:
        """A new file that nobody else can read, locked before it has its name.

        Raises: StorageUnavailable where there is no room for it.
        """
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = run_dir / f"{new_id('meter').replace('_', '-')}.bin"
        draft = path.with_suffix(".new")
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = _HEADER.pack(_MAGIC, _ROW_BYTES, rows) + bytes(rows * _ROW_BYTES)
            _write(descriptor, content)  # whole: counting into a hole ends both processes once the disk is full
            draft.rename(path)
            return cls(path, descriptor, rows)
        except OSError as error:
            os.close(descriptor)
            draft.unlink(missing_ok=True)
            raise StorageUnavailable(str(run_dir), reason=f"{error.strerror}.") from error

    def allot(self, ask_id: str) -> int:
        """A row of zeros for this ask. Raises: Overloaded when all are in use; ValueError for an id that is none."""
        identity = struct.unpack("=qq", _id_bytes(ask_id))
        if not self._free:
            raise Overloaded(
                limit="asks at once", value=len(self._used), used=len(self._used), retry_after_s=_RETRY_AFTER_S
            )
        row = self._free.popleft()
        at = _first_word(row)
        for offset in range(_INPUT, _STATE):
            self._words[at + offset] = 0
        self._words[at], self._words[at + 1] = identity
        self._words[at + _STATE] = _IN_USE  # last: a row that is in use is whole
        self._used.add(row)
        return row

    def row(self, row: int, ask_id: str) -> Row:
        """For what is computed in the server's own process."""
        return Row(self._words, row, ask_id)

    def read(self, row: int) -> Counts:
        assert row in self._used, "a row that was not allotted was read"
        return _counts(self._words, _first_word(row))

    def free(self, row: int) -> None:
        """The ask is settled; what a late writer adds from now on is dropped."""
        self._used.remove(row)
        self._words[_first_word(row) + _STATE] = _FREE
        self._free.append(row)

    def descriptor(self) -> int:
        """A new one for an engine process, which shares the contents and not the lock. The caller closes it."""
        return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        """The file goes, unless it has rows that nobody settled: the next server will."""
        if not self._used:
            self.path.unlink(missing_ok=True)
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # the mapping would keep it
        os.close(self._lock)


def leftovers(run_dir: Path) -> Generator[tuple[str, Counts], None, None]:
    """Rows of servers that died, as (ask id, counts). Settle each before taking the next: a file is removed when its
    rows are through, and stays when the iterator is closed before. A living server's file is never read, nor one that
    another server is going through."""
    for path in sorted(run_dir.glob("meter-*.bin")):
        descriptor = _locked(path)
        if descriptor is None:
            continue
        try:
            yield from _used_rows(descriptor)
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
    for draft in run_dir.glob("meter-*.new"):  # of one that died while making it
        descriptor = _locked(draft)
        if descriptor is not None:
            draft.unlink(missing_ok=True)
            os.close(descriptor)


def is_dead(path: Path) -> bool:
    """Whether the server whose file this is has ended, in whatever way."""
    descriptor = _locked(path)
    if descriptor is None:
        return not path.exists()
    os.close(descriptor)
    return True


def _locked(path: Path) -> int | None:
    """A descriptor that holds the file's lock, or None where somebody else does, or has removed it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _used_rows(descriptor: int) -> Iterator[tuple[str, Counts]]:
    """Copies what it reads: while somebody settles a row, nothing of the file is mapped."""
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    try:
        rows = _check_header(content)
    except ValueError:
        return  # nothing of ours, or never finished
    words = memoryview(content).cast("q")
    for row in range(rows):
        at = _first_word(row)
        if words[at + _STATE] == _IN_USE:
            yield f"ask_{content[at * 8 : at * 8 + _ID_BYTES].hex()}", _counts(words, at)


def _write(descriptor: int, content: bytes) -> None:
    at = 0
    while at < len(content):
        at += os.pwrite(descriptor, content[at:], at)


def _check_header(content: bytes | mmap.mmap) -> int:
    """The number of rows. Raises: ValueError."""
    if len(content) < _HEADER.size:
        raise ValueError("shorter than a meter file's header")
    magic, row_bytes, rows = _HEADER.unpack_from(content)
    if (magic, row_bytes, len(content)) != (_MAGIC, _ROW_BYTES, _HEADER.size + rows * _ROW_BYTES):
        raise ValueError("not a meter file of this release")
    return int(rows)


def _first_word(row: int) -> int:
    return _HEADER.size // 8 + row * _WORDS


def _counts(words: memoryview, at: int) -> Counts:
    values = dict(zip(_COUNTERS, words[at + _INPUT : at + _STATE].tolist(), strict=True))
    return Counts(
        computed_input=values["input"] + values["recomputed_input"],
        cached_input=values["cached"],
        output=values["output"] + values["recomputed_output"],
        thinking=values["thinking"] + values["recomputed_thinking"],
        recomputed_input=values["recomputed_input"],
        recomputed_output=values["recomputed_output"],
        recomputed_thinking=values["recomputed_thinking"],
        compute_us=values["compute_us"],
    )


def _id_bytes(ask_id: str) -> bytes:
    prefix, _, digits = ask_id.partition("_")
    if prefix != "ask" or len(digits) != 2 * _ID_BYTES:
        raise ValueError(f"{ask_id[:60]!r} is not the id of an ask")
    return bytes.fromhex(digits)

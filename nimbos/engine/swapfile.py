"""The swap file: room on disk for pieces of contexts, in a file without a name that ends with the engine process.

Made before the process confines itself; afterwards it is only read and written through its descriptor. Nobody else can
open it, and after the process's end its room is free again, whatever the end was. Knows no contexts; `store.py` says
what goes here. Read and written in the step loop: a piece is 16 MiB at most, which the page cache takes in some
milliseconds.
"""

from __future__ import annotations

import os
import tempfile
from bisect import insort
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Bytes [start, start + size) of the file."""

    start: int
    size: int


class SwapFile:
    """`write` gives an extent, which whoever holds it frees."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        """Takes over the descriptor."""
        self.size_bytes = size_bytes
        self.used_bytes = 0
        self._descriptor = descriptor
        self._free = [Extent(0, size_bytes)]  # by start; neighbours are joined

    @classmethod
    def make(cls, folder: Path, size_bytes: int) -> SwapFile | None:
        """None where no file can be made: the engine does without."""
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, name = tempfile.mkstemp(prefix="swap-", dir=folder)
            Path(name).unlink()
        except OSError:
            return None
        return cls(descriptor, size_bytes)

    def write(self, state: Bytes) -> Extent | None:
        """None: there is no room for it in one piece. Raises: OSError when the disk is full, or gone."""
        at = next((at for at, free in enumerate(self._free) if free.size >= state.nbytes), None)
        if at is None or not state.nbytes:
            return None
        free = self._free.pop(at)
        extent = Extent(free.start, state.nbytes)
        if free.size > extent.size:
            self._free.insert(at, Extent(free.start + extent.size, free.size - extent.size))
        self.used_bytes += extent.size
        content, done = np.ascontiguousarray(state).data.cast("B"), 0
        try:
            while done < extent.size:
                done += os.pwrite(self._descriptor, content[done:], extent.start + done)
        except OSError:
            self.free(extent)
            raise
        return extent

    def read(self, extent: Extent) -> Bytes | None:
        """None: the disk does not give it back."""
        state = np.empty(extent.size, np.uint8)
        view, done = state.data, 0
        try:
            while done < extent.size:
                count = os.preadv(self._descriptor, [view[done:]], extent.start + done)
                if count <= 0:
                    return None
                done += count
        except OSError:
            return None
        return state

    def free(self, extent: Extent) -> None:
        self.used_bytes -= extent.size
        insort(self._free, extent)
        at = self._free.index(extent)
        for left in (at, at - 1):
            if 0 <= left < len(self._free) - 1:
                one, other = self._free[left], self._free[left + 1]
                if one.start + one.size == other.start:
                    self._free[left : left + 2] = [Extent(one.start, one.size + other.size)]

    def check(self) -> None:
        """Asserts that what is free is in order, apart and not in use; for tests."""
        ends = [(free.start, free.start + free.size) for free in self._free]
        assert all(end < start for (_, end), (start, _) in pairwise(ends))
        assert sum(free.size for free in self._free) + self.used_bytes == self.size_bytes

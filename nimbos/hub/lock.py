"""One worker at a time on one target, across tasks and processes, and folders that vanish with their maker.
The system frees a lock when its holder dies, so a SIGKILL leaves nothing to clean but scratch folders, which the next
maker of one sweeps away."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)


class FileLock:
    """An exclusive lock. The file stays: removing it would let two holders lock two files of one name."""

    __slots__ = ("_descriptor", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        descriptor = self._open()
        if not _try_lock(descriptor):
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def acquire(self) -> None:
        """Waits; only for what is held for an instant."""
        descriptor = self._open()
        _lock(descriptor)
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder under `parent`, removed at the end. Folders whose makers died are removed first."""
    parent.mkdir(parents=True, exist_ok=True)
    gate = FileLock(parent / ".lock")
    gate.acquire()
    try:
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(prefix="scratch-", dir=parent))
        alive = FileLock(folder.with_suffix(".alive"))
        alive.acquire()
    finally:
        gate.release()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        alive.release()
        alive.path.unlink(missing_ok=True)


def _sweep(parent: Path) -> None:
    for folder in parent.glob("scratch-*"):
        if not folder.is_dir():
            continue
        alive = FileLock(folder.with_suffix(".alive"))
        if alive.try_acquire():
            shutil.rmtree(folder, ignore_errors=True)
            alive.release()
            alive.path.unlink(missing_ok=True)

"""What the server keeps on disk for an engine: learned step times, one file for each model, library and processor."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

from nimbos.config import Settings
from nimbos.engine.confine import model_files
from nimbos.engine.library import candidates, thread_count
from nimbos.errors import NimbosError

HEAD_BYTES = 4 * 1024 * 1024


class StepTimes:
    def __init__(self, settings: Settings, model_hash: str) -> None:
        try:
            library = str(candidates(settings)[0])
        except NimbosError:
            library = "none"
        parts = (model_hash, library, _processor(), str(thread_count(settings.engine)))
        self.path = (
            settings.cache_dir / "steps" / (hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32] + ".json")
        )

    def load(self) -> bytes:
        """The encoded table, or nothing where none was kept."""
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def save(self, table: bytes) -> None:
        """Atomic, and silent when it cannot: it is only a cache."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(table)
            temporary.replace(self.path)


FileMark = tuple[int, int, int, int]


def file_marks(path: Path) -> tuple[FileMark, ...]:
    """What changes when another file takes the place of a model's (or of a part of one), or is written into it; nothing
    where it is gone."""
    try:
        states = [part.stat() for part in sorted(model_files(path))]
    except OSError:
        return ()
    return tuple((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns) for state in states)


def head_hash(path: Path) -> str:
    """A name for weights whose hash nobody has computed: of their size and their first 4 MiB, marked as such."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(HEAD_BYTES))
        digest.update(str(os.fstat(file.fileno()).st_size).encode())
    return "head-" + digest.hexdigest()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""How a file comes to be on this disk: as `name.part` first, by one rename when it is right, and only where there
is room. Knows no network and no formats."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nimbos.errors import DownloadFailed

BLOCK_BYTES = 1 << 20
SPACE_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    path: Path
    size_bytes: int
    sha256: str


def require_space(folder: Path, need_bytes: int, what: str) -> None:
    """Raises: DownloadFailed with the numbers when the disk cannot take `need_bytes` more."""
    free = shutil.disk_usage(folder).free
    if free < need_bytes + SPACE_MARGIN_BYTES:
        raise DownloadFailed(
            f"{what} needs {need_bytes / 1e6:,.0f} MB (and {SPACE_MARGIN_BYTES / 1e6:,.0f} MB to spare) and "
            f"{folder} has {free / 1e6:,.0f} MB free. Free some space, or set NIMBOS_HOME to a larger disk."
        )


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def part_bytes(target: Path) -> int:
    """How much of `target` has come so far."""
    return size_or_nothing(part_of(target))


def size_or_nothing(path: Path) -> int:
    """Whoever pulls may give it its name at this very moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def drop_part(target: Path) -> None:
    part_of(target).unlink(missing_ok=True)
    record_of(target).unlink(missing_ok=True)


def settle(part: Path, target: Path) -> None:
    """Makes the bytes durable, then gives them their name."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_of(target: Path) -> Path:
    return target.with_name(target.name + ".part.json")

"""The swap file of an engine, seen from outside: out of the page cache with it, and how much came back from the disk.

The file has no name, so it is reached through the engine's descriptor in `/proc`, which takes root: an engine lets
nobody else look into it.
"""

from __future__ import annotations

import os
from pathlib import Path

from bench.server import Server


def forget(server: Server) -> None:
    """Written to the disk and then dropped from the page cache: what is read next comes from the disk.

    Raises: RuntimeError where there is no swap file that may be opened.
    """
    descriptor = os.open(_swap_file(server), os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_bytes(server: Server) -> int:
    """What the server's processes had fetched from disks since they began; what the page cache gave is not in it."""
    told = [Path(f"/proc/{pid}/io").read_text() for pid in server.pids()]
    return sum(int(line.split()[1]) for text in told for line in text.splitlines() if line.startswith("read_bytes:"))


def _swap_file(server: Server) -> Path:
    try:
        links = [link for pid in server.pids() for link in Path(f"/proc/{pid}/fd").iterdir()]
        return next(link for link in links if "/swap-" in os.readlink(link))
    except (StopIteration, PermissionError) as error:
        raise RuntimeError("The engine's swap file cannot be reached; run as root, with `swap_disk_mib`.") from error

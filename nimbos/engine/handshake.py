"""Waiting for an engine process's first word, for as long as it gets on.

Loading may take very long (100 GB from a slow disk), so there is no short limit; but a process that neither computes
nor reads for a while is stuck, and its callers are told so.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TypeVar

from nimbos.errors import EngineFailed

LOAD_S_MAX = 30 * 60.0
STUCK_S = 120.0
LOOK_EVERY_S = 5.0

T = TypeVar("T")


async def first_word(
    word: asyncio.Future[T],
    pid: int,
    *,
    load_s_max: float = LOAD_S_MAX,
    stuck_s: float = STUCK_S,
    look_every_s: float = LOOK_EVERY_S,
) -> T:
    """What `word` brings. On failure it is cancelled. Raises: EngineFailed when the process is stuck or too slow."""
    clock = asyncio.get_running_loop().time
    begun = moved_at = clock()
    seen = _work_of(pid)
    try:
        while True:
            done, _ = await asyncio.wait({word}, timeout=look_every_s)
            if done:
                return word.result()
            now, work = clock(), _work_of(pid)
            if work != seen or work is None:
                seen, moved_at = work, now
            if now - moved_at >= stuck_s:
                raise EngineFailed(f"The engine did not start: it has done nothing for {now - moved_at:.0f} s.")
            if now - begun >= load_s_max:
                raise EngineFailed(f"The engine did not start: its model is not loaded after {now - begun:.0f} s.")
    finally:
        word.cancel()


def _work_of(pid: int) -> tuple[str, ...] | None:
    """Processor time, page faults from disk and memory of a process (`man 5 proc`); None where nobody says."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[9], fields[11], fields[12], fields[21]  # majflt, utime, stime, rss

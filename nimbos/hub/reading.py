"""Reading that takes long, in a thread that stops when who waits for it is cancelled: Python waits for its threads
before it exits, and a hash of a large model takes a minute."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_BLOCK_BYTES = 1 << 20
_abandoned: ContextVar[threading.Event | None] = ContextVar("abandoned", default=None)


class Abandoned(Exception):
    """Ends a thread whose result nobody waits for any more; so nobody sees it."""


async def in_thread(read: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Like `asyncio.to_thread`; cancelling it also ends what `read` is hashing, at the next block."""
    abandoned = threading.Event()
    before = _abandoned.set(abandoned)  # the thread gets a copy of this context
    try:
        return await asyncio.to_thread(read, *arguments, **options)
    finally:
        abandoned.set()
        _abandoned.reset(before)


def sha256_of(file: Path) -> str:
    """Raises: Abandoned, in a thread of `in_thread` alone."""
    digest, block, abandoned = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES)), _abandoned.get()
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(block):
            if abandoned is not None and abandoned.is_set():
                raise Abandoned
            digest.update(block[:size])
    return digest.hexdigest()

"""Hashing in a thread: the right hash, and an end when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from pathlib import Path

import pytest

from nimbos.hub.reading import Abandoned, in_thread, sha256_of
from tests.live import PATIENCE_S

MIB = 2**20
TIB = 2**40


@pytest.mark.parametrize("size_bytes", [0, 1, MIB - 1, MIB, 3 * MIB + 5])
async def test_the_hash_is_of_all_bytes(tmp_path: Path, size_bytes: int) -> None:
    file = tmp_path / "some"
    file.write_bytes(bytes(number % 251 for number in range(size_bytes)))
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert (sha256_of(file), await in_thread(sha256_of, file)) == (expected, expected)


async def test_who_is_cancelled_ends_the_thread_and_no_other(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, TIB)
    ends: dict[str, threading.Event] = {"cancelled": threading.Event(), "kept": threading.Event()}
    began = asyncio.Semaphore(0)
    loop = asyncio.get_running_loop()

    def hash_of_large(name: str) -> None:
        loop.call_soon_threadsafe(began.release)
        try:
            sha256_of(large)
        except Abandoned:
            ends[name].set()

    tasks = {name: asyncio.create_task(in_thread(hash_of_large, name)) for name in ends}
    for _ in tasks:
        await began.acquire()
    tasks["cancelled"].cancel()
    assert await asyncio.to_thread(ends["cancelled"].wait, PATIENCE_S)
    assert tasks["cancelled"].cancelled()
    assert not ends["kept"].is_set()
    tasks["kept"].cancel()
    assert await asyncio.to_thread(ends["kept"].wait, PATIENCE_S)

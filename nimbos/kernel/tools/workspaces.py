"""The folders that programs work in: one for each process, its current directory and its home. They outlive the worker,
the server and the machine, and go when somebody drops them. Those of forks are copied late: `copies.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from nimbos.errors import StorageUnavailable
from nimbos.kernel.tools import copies


class Workspaces:
    """`root`: `NIMBOS_HOME/workspaces`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._copying = asyncio.Lock()

    def path(self, pid: str) -> Path:
        return self._root / pid

    def output(self, pid: str) -> Path:
        """A file beside it, with what its last worker printed."""
        return self._root / f"{pid}.output"

    async def ready(self, pid: str) -> Path:
        """Made if there is none, for this user alone; from now on it is shared with no fork.

        Raises: StorageUnavailable.
        """
        await self.settle(pid)
        try:
            await asyncio.to_thread(self.path(pid).mkdir, parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise self._unavailable(error) from error
        return self.path(pid)

    async def fork(self, of: str, forks: Sequence[str]) -> None:
        """They have the files of `of` as they are when one of them is next written to. Raises: StorageUnavailable."""
        await self._changing(partial(copies.owe, self._root, of, forks))

    async def settle(self, pid: str) -> None:
        """Whoever shares the files of `pid` gets their own, now. Raises: StorageUnavailable."""
        await self._changing(partial(copies.settle, self._root, pid))

    async def drop(self, pid: str) -> None:
        """With all that is in it; forks keep what they share. Raises: StorageUnavailable."""
        await self._changing(partial(copies.drop, self._root, pid))
        await asyncio.to_thread(self.output(pid).unlink, missing_ok=True)

    async def _changing(self, change: Callable[[], None]) -> None:
        """Raises: StorageUnavailable."""
        async with self._copying:  # else each that waits would hold a thread
            try:
                await asyncio.to_thread(change)
            except OSError as error:
                raise self._unavailable(error) from error

    def _unavailable(self, error: OSError) -> StorageUnavailable:
        return StorageUnavailable(str(self._root), reason=error.strerror or type(error).__name__)

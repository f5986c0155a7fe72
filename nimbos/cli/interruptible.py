"""Runs a command's coroutine so that Ctrl-C is noticed between two steps of the event loop, never within one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Like `asyncio.run`, whose own handler may cancel in the middle of a callback that is just setting a result.

    The first Ctrl-C cancels the work, which may still put its things in order; a second one does not wait for that.

    Raises: KeyboardInterrupt.
    """
    interrupt = _Interrupt()
    try:
        return asyncio.run(interrupt.watch(work))
    except asyncio.CancelledError:
        if interrupt.seen:
            raise KeyboardInterrupt from None
        raise


class _Interrupt:
    def __init__(self) -> None:
        self.seen = False

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        loop.add_signal_handler(signal.SIGINT, self._take, task)
        try:
            return await task
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    def _take(self, task: asyncio.Task[Any]) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        task.cancel()

"""Runs a command's coroutine so that Ctrl-C is noticed between two steps of the event loop, never within one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_interruptible(work: Coroutine[Any, Any, T], runner: asyncio.Runner | None = None) -> T:
    """Like `asyncio.run`, or `runner.run`, whose own handler may cancel in the middle of a callback that is just
    setting a result.

    The first Ctrl-C (or SIGTERM) cancels the work, which may still put its things in order; a second one does not
    wait for that. Work that takes signals over for itself is not cancelled by them from then on. Python waits for
    threads before it exits: what reads long in one does so by `nimbos.hub.reading`.

    Raises: KeyboardInterrupt; SystemExit with 143 after SIGTERM.
    """
    interrupt = _Interrupt()
    try:
        if runner is not None:
            return runner.run(interrupt.watch(work))
        return asyncio.run(interrupt.watch(work))
    except asyncio.CancelledError:
        if interrupt.seen is not None:
            raise _ending(interrupt.seen) from None
        raise


class _Interrupt:
    def __init__(self) -> None:
        self.seen: signal.Signals | None = None

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._take, number, task)
        try:
            return await task
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _take(self, number: signal.Signals, task: asyncio.Task[Any]) -> None:
        if self.seen is not None:
            raise _ending(number)
        self.seen = number
        task.cancel()


def _ending(number: signal.Signals) -> BaseException:
    return KeyboardInterrupt() if number is signal.SIGINT else SystemExit(128 + number)

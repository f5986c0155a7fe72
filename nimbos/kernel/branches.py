"""Work of one process that runs at once, on one holding. Whoever of it parks waits until nothing else is under way, so
that no outcome is left without a hand to write it. Knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

from nimbos.kernel.holding import Holding

T = TypeVar("T")


class Parting:
    """The end of a run by one of several branches. `running`: their tasks, as they are when it is asked."""

    def __init__(self, running: Callable[[], Iterable[asyncio.Task[Any]]]) -> None:
        self._running = running
        self._parking = asyncio.Lock()  # never let go: whoever has it ends this run
        self._parkers: set[asyncio.Task[Any] | None] = set()
        self._another = asyncio.Event()  # parks, too

    @property
    def begun(self) -> bool:
        """Nothing new is to begin: the next run does that."""
        return self._parking.locked()

    async def alone(self) -> None:
        """Until all that is under way has ended or parks, too. The first goes on, the others wait for ever."""
        self._parkers.add(asyncio.current_task())
        self._another.set()
        await self._parking.acquire()
        while others := {task for task in self._running() if task not in self._parkers and not task.done()}:
            self._another.clear()
            another = asyncio.create_task(self._another.wait())
            try:
                await asyncio.wait({*others, another}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                another.cancel()


async def at_once(holding: Holding, works: Sequence[Callable[[], Awaitable[T]]], *, most: int) -> list[T]:
    """What each brings, in their order; `most` of them run at a time.

    Raises: what the first of them raises that goes wrong; Parked when one parks, after the others have ended. What is
    still under way then is cancelled, and has ended when this returns.
    """
    if len(works) == 1:
        return [await works[0]()]
    tasks: list[asyncio.Task[T]] = []
    parting = Parting(lambda: tasks)
    before, holding.alone = holding.alone, parting.alone
    try:
        while (len(tasks) < len(works) and not parting.begun) or any(not task.done() for task in tasks):
            while len(tasks) < len(works) and not parting.begun and sum(not task.done() for task in tasks) < most:
                tasks.append(asyncio.create_task(_awaited(works[len(tasks)]), name=f"{holding.pid} {len(tasks)}"))
            running = {task for task in tasks if not task.done()}
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        holding.alone = before
        await stopped(tasks)
    return [task.result() for task in tasks]


async def stopped(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancelled, and put away. What they raised is told by what ended the run, or by the log."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()

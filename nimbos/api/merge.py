"""Several asks' chunks as one stream. Closing it closes all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")

_WAITING_MAX = 64  # chunks that may wait for a slow reader


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(number of the source, item), in the order they come. The first failure ends all."""
    queue: asyncio.Queue[tuple[int, T] | None] = asyncio.Queue(_WAITING_MAX)

    async def pump(number: int, source: AsyncGenerator[T, None]) -> None:
        async with aclosing(source):
            async for item in source:
                await queue.put((number, item))
        await queue.put(None)

    async def get() -> tuple[int, T] | None:
        return await queue.get()

    pumps = {asyncio.ensure_future(pump(number, source)) for number, source in enumerate(sources)}
    left = len(pumps)
    waiting = asyncio.ensure_future(get())
    try:
        while left:
            running = {task for task in pumps if not task.done()}
            await asyncio.wait({waiting, *running}, return_when=asyncio.FIRST_COMPLETED)
            for task in pumps:
                if task.done():
                    task.result()
            if not waiting.done():
                continue
            item = waiting.result()
            waiting = asyncio.ensure_future(get())
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        waiting.cancel()
        for task in pumps:
            task.cancel()
        await asyncio.gather(waiting, *pumps, return_exceptions=True)

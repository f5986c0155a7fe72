"""A durable function in a file of its own: the whole file goes with it, and each worker imports it."""

from __future__ import annotations

from nimbos.adk import ask


async def curious(input: object) -> object:
    return await ask("And now?")

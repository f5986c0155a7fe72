"""A thousand mixed asks: memory stays where it was. Minutes on a slow machine, so it is part of `make test-long`."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from pathlib import Path

import pytest

from nimbos.types import AskClass, Grammar, Sampling
from tests.engine.test_engine import PROMPT, ask, started


@pytest.mark.long
async def test_a_thousand_mixed_asks_leave_memory_where_it_was(tmp_path: Path) -> None:
    engine = await started("qwen2", tmp_path)
    rng = random.Random(3)

    async def one(number: int) -> None:
        grammar = Grammar(kind="regex", source="[0-9]{3,9}") if number % 7 == 0 else None
        wanted = ask(
            PROMPT[: rng.randrange(1, 80)] + str(number), account=rng.choice("abcd"), n=rng.choice((1, 1, 3)),
            limit_tokens=rng.randrange(1, 40), ask_class=rng.choice(list(AskClass)), grammar=grammar,
            sampling=Sampling(temperature=rng.choice((0.0, 1.0)), seed=number),
        )  # fmt: skip
        prepared = await engine.prepare(wanted)
        left = rng.randrange(1, 60)
        async with aclosing(engine.generate(prepared.ask)) as chunks:
            async for _ in chunks:
                left -= 1
                if left == 0:
                    return

    async def hundred(first: int) -> None:
        await asyncio.gather(*(one(number) for number in range(first, first + 100)))

    try:
        for first in range(0, 300, 100):  # caches fill
            await hundred(first)
        before = (await engine.stats()).resident_bytes
        for first in range(300, 1000, 100):
            await hundred(first)
        stats = await engine.stats()
        assert stats.resident_bytes < before * 1.02
        assert sum(stats.live.values()) == 0 == sum(stats.waiting.values())
        assert engine.active == 0
        assert engine.restarts == 0
    finally:
        await engine.close()

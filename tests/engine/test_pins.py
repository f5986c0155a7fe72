"""Explicit caching on a real engine: a prefix that was asked to be kept is there later, whatever came in between."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from nimbos.engine import Engine
from tests.engine.asking import PROMPT, answer, ask, started

CELLS = 1024


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    running = await started("qwen2", tmp_path, cells=CELLS, swap_memory_mib=0)
    yield running
    await running.close()


async def flood(engine: Engine, *, account: str = "other") -> None:
    """More contexts than cells."""
    for number in range(12):
        await answer(engine, ask(f"{number} {PROMPT * 3}", account=account, limit_tokens=8))


async def test_a_pinned_prefix_is_found_after_a_flood_and_another_is_not(engine: Engine) -> None:
    pinned, plain = f"keep {PROMPT * 2}", f"lose {PROMPT * 2}"
    prompt = (await engine.prepare(ask(pinned))).prompt_tokens
    await answer(engine, ask(plain))
    await answer(engine, ask(pinned, pin_s=300.0, pin_tokens=prompt - 5))
    assert (await engine.stats()).cells_pinned == prompt - 5
    await flood(engine)
    assert (await answer(engine, ask(pinned))).final.usage.cached >= prompt - 5
    assert (await answer(engine, ask(plain))).final.usage.cached <= 1


async def test_pins_keep_at_most_half_of_the_cells(engine: Engine) -> None:
    for number in range(20):
        text = f"{number} {PROMPT * 3}"
        await answer(engine, ask(text, pin_s=300.0, pin_tokens=10_000, limit_tokens=2))
        assert (await engine.stats()).cells_pinned <= CELLS // 2
    await flood(engine)
    assert (await engine.stats()).cells_pinned > CELLS // 4
    long = await answer(engine, ask(PROMPT * 14, account="third", limit_tokens=8))
    assert long.final.usage.output == 8, "pins left no room for others"


async def test_a_pin_whose_time_is_over_keeps_nothing(engine: Engine) -> None:
    await answer(engine, ask(PROMPT, pin_s=1e-6, pin_tokens=20))
    await flood(engine)
    assert (await engine.stats()).cells_pinned == 0
    assert (await answer(engine, ask(PROMPT))).final.usage.cached <= 1


async def test_a_prompt_that_cannot_fit_beside_the_pins_is_still_answered(engine: Engine) -> None:
    """Half of the cells are pinned; the longest prompt of all needs more than the other half."""
    for number in range(8):
        await answer(engine, ask(f"{number} {PROMPT * 3}", pin_s=300.0, pin_tokens=10_000, limit_tokens=2))
    assert (await engine.stats()).cells_pinned > CELLS // 3
    prompt = PROMPT * 28
    assert (await engine.prepare(ask(prompt))).prompt_tokens > CELLS * 3 // 4
    told = await answer(engine, ask(prompt, limit_tokens=8))
    assert told.final.usage.output == 8

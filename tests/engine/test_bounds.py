"""Settings at their bounds: an engine that is given next to nothing, or asked for too much, answers all the same."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nimbos.errors import Overloaded
from nimbos.types import AskClass
from tests.engine.asking import PROMPT, answer, ask, started


@pytest.mark.parametrize("sequences", [2, 3])
async def test_with_few_sequences_every_ask_is_answered(sequences: int, tmp_path: Path) -> None:
    """One context is pinned, and another holds what the next ask begins with: neither gives its sequence away."""
    engine = await started("qwen2", tmp_path, sequences=sequences)
    try:
        asks = [
            ask(pin_s=600.0, pin_tokens=10, ignore_eos=True),
            *(ask(text, ignore_eos=True) for text in ("there is another", "there is another one", PROMPT + "again")),
            ask(n=3, ignore_eos=True),
        ]
        for wanted in asks:
            told = await asyncio.wait_for(answer(engine, wanted), 60)
            assert [len(ids) for ids in told.ids.values()] == [24] * wanted.n
    finally:
        await engine.close()


async def test_where_nothing_is_shared_every_sequence_computes_and_batch_work_gives_one_up(tmp_path: Path) -> None:
    """Each sequence of a recurrent model costs a state, so it has few."""
    engine = await started("qwen35", tmp_path, sequences=2)
    try:
        long = [ask(f"{n}", ask_class=AskClass.BATCH, limit_tokens=1500, ignore_eos=True) for n in range(2)]
        streams = [engine.generate((await engine.prepare(each)).ask) for each in long]
        for stream in streams:
            await anext(stream)
        assert (await engine.stats()).live[AskClass.BATCH] == 2
        await answer(engine, ask("hello", limit_tokens=3))
        stats = await engine.stats()
        assert stats.live[AskClass.BATCH] + stats.waiting[AskClass.BATCH] == 2, "it waited for one of them to end"
        assert stats.preemptions == 1
        for stream in streams:
            await stream.aclose()
    finally:
        await engine.close()


async def test_a_step_may_be_a_single_row(tmp_path: Path) -> None:
    engine = await started("qwen2", tmp_path, max_step_tokens=1)
    try:
        told = await answer(engine, ask(limit_tokens=4, ignore_eos=True))
        assert len(told.ids[0]) == 4
        stats = await engine.stats()
        assert stats.steps == stats.step_rows > told.usage.input
    finally:
        await engine.close()


async def test_a_longer_step_than_there_are_cells_takes_no_more_memory(tmp_path: Path) -> None:
    engine = await started("qwen2", tmp_path, cells=512, max_step_tokens=100_000)
    try:
        assert engine.ready is not None
        assert engine.ready.cells == 512
        assert len((await answer(engine, ask(ignore_eos=True))).ids[0]) == 24
    finally:
        await engine.close()


async def test_hours_without_asks_do_not_make_the_queue_look_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await started("qwen2", tmp_path, inbox=2)
    try:
        for _ in range(3):
            await answer(engine, ask(limit_tokens=1))
        flood = [(await engine.prepare(ask(f"{n}", account=f"{n}", limit_tokens=300))).ask for n in range(8)]
        hours_later = SimpleNamespace(monotonic=lambda: time.monotonic() + 36_000)
        monkeypatch.setattr("nimbos.engine.engine.time", hours_later)
        streams = [engine.generate(each) for each in flood]
        results = await asyncio.gather(*(anext(stream) for stream in streams), return_exceptions=True)
        refused = [result for result in results if isinstance(result, Overloaded)]
        assert refused
        assert all(result.retry_after_s is not None and result.retry_after_s < 600 for result in refused)
        for stream in streams:
            await stream.aclose()
    finally:
        await engine.close()

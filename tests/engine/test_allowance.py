"""An answer never goes beyond what is paid for: it waits for more, or ends there, and holds nobody up meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from nimbos.engine import Engine
from nimbos.engine.scripted import ScriptedSource
from nimbos.types import Ask, Chunk, FinishReason, Grammar, Sampling, Thinking, TokenSource
from tests.engine.asking import Told, answer, ask, started

LONG = {"text": " ".join(f"word{n}" for n in range(200))}


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    running = await started("qwen2", tmp_path)
    yield running
    await running.close()


@pytest_asyncio.fixture(params=["engine", "scripted"])
async def source(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TokenSource]:
    if request.param == "engine":
        running: TokenSource = await started("qwen2", tmp_path)
    else:
        file = tmp_path / "tiny.json"
        file.write_bytes(msgspec.json.encode({"default": LONG}))
        running = ScriptedSource.load(file)
    yield running
    await running.close()


class Stream:
    """An ask whose chunks are taken by a task, so that a test can wait for the moment when no more come."""

    def __init__(self, source: TokenSource, wanted: Ask) -> None:
        self.source, self.ask, self.told = source, wanted, Told()
        self.moved = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        prepared = await self.source.prepare(self.ask)
        async for chunk in self.source.generate(prepared.ask):
            self._take(chunk)

    def _take(self, chunk: Chunk) -> None:
        self.told.take(chunk)
        self.moved.set()

    async def until(self, tokens: int) -> None:
        while self.told.tokens < tokens:
            self.moved.clear()
            await self.moved.wait()

    def extend(self, tokens: int | None, *, last: bool = False) -> None:
        self.source.extend(self.ask.id, allowance_tokens=tokens, last=last)


async def others_go_on(source: TokenSource) -> None:
    """Steps are made meanwhile, so a branch that could go on would have."""
    assert (await answer(source, ask("someone else", account="other"))).tokens == 24


async def test_an_answer_waits_where_its_allowance_ends_and_goes_on(source: TokenSource) -> None:
    whole = (await answer(source, ask(limit_tokens=60, ignore_eos=True))).ids
    stream = Stream(source, ask(limit_tokens=60, ignore_eos=True, allowance_tokens=10))
    await stream.until(10)
    await others_go_on(source)
    assert stream.told.tokens == 10
    stream.extend(25)
    await stream.until(25)
    await others_go_on(source)
    assert stream.told.tokens == 25
    stream.extend(None)
    await stream.task
    assert stream.told.ids[0][:20] == whole[0][:20]
    assert stream.told.final.usage.output == 60
    assert not stream.told.final.budget_ended


async def test_the_last_allowance_ends_the_answer(source: TokenSource) -> None:
    told = await answer(source, ask(limit_tokens=60, ignore_eos=True, allowance_tokens=7, allowance_last=True))
    assert told.final.budget_ended
    assert told.final.reason is FinishReason.LENGTH
    assert told.tokens == 7 == told.final.usage.output


async def test_one_that_waits_is_ended_by_the_news_that_nothing_follows(source: TokenSource) -> None:
    stream = Stream(source, ask(limit_tokens=60, ignore_eos=True, n=2, allowance_tokens=8))
    await stream.until(16)
    stream.extend(8, last=True)
    await stream.task
    assert all(final.budget_ended and final.usage.output == 8 for final in stream.told.finals)
    assert len(stream.told.finals) == 2


async def test_an_answer_that_ends_by_itself_is_not_ended_by_the_budget(source: TokenSource) -> None:
    told = await answer(source, ask(limit_tokens=12, ignore_eos=True, allowance_tokens=12, allowance_last=True))
    assert not told.final.budget_ended
    assert told.final.reason is FinishReason.LENGTH


async def test_nothing_is_computed_without_an_allowance(engine: Engine) -> None:
    stream = Stream(engine, ask(allowance_tokens=0))
    await others_go_on(engine)
    computed = (await engine.stats()).computed_tokens
    await others_go_on(engine)
    assert (await engine.stats()).waiting[stream.ask.ask_class] == 1
    assert stream.told.tokens == 0
    assert (await engine.stats()).computed_tokens < 2 * computed
    stream.extend(24)
    await stream.task
    assert stream.told.final.usage.output == 24


async def test_forced_tokens_do_not_pass_the_allowance(engine: Engine) -> None:
    grammar = Grammar(kind="json_schema", source='{"const": {"answer": "forty-two is the answer"}}')
    stream = Stream(engine, ask(limit_tokens=90, grammar=grammar, allowance_tokens=3))
    for tokens in range(3, 12):
        await stream.until(tokens)
        await others_go_on(engine)
        assert stream.told.tokens == tokens
        stream.extend(tokens + 1)
    stream.extend(None)
    await stream.task
    assert msgspec.json.decode(stream.told.text[0]) == {"answer": "forty-two is the answer"}


async def test_a_farewell_to_thinking_does_not_pass_the_allowance(tmp_path: Path) -> None:
    engine = await started("qwen3", tmp_path)
    try:
        farewell = "that is what we like to hear</think>"
        thinking = Thinking(open="<think>", close="</think>", budget_tokens=12, started=True, farewell=farewell)
        whole = await answer(engine, ask(limit_tokens=30, thinking=thinking, ignore_eos=True))
        assert whole.final.usage.thinking == 12
        stream = Stream(engine, ask(limit_tokens=30, thinking=thinking, ignore_eos=True, allowance_tokens=5))
        for tokens in range(5, 20):
            await stream.until(tokens)
            await others_go_on(engine)
            assert stream.told.tokens == tokens
            stream.extend(tokens + 1)
        stream.extend(None)
        await stream.task
        assert stream.told.final.usage == msgspec.structs.replace(whole.final.usage, cached=stream.told.usage.cached)
    finally:
        await engine.close()


async def test_extending_while_the_grammar_is_being_compiled_is_not_lost(engine: Engine) -> None:
    grammar = Grammar(kind="regex", source="[a-z]{40}")
    stream = Stream(engine, ask(limit_tokens=60, grammar=grammar, allowance_tokens=2))
    while stream.ask.id not in engine._asks:
        await asyncio.sleep(0)
    stream.extend(60)
    await stream.task
    assert len(stream.told.text[0]) == 40


async def test_a_restart_keeps_the_allowance(engine: Engine) -> None:
    stream = Stream(engine, ask(limit_tokens=40, ignore_eos=True, allowance_tokens=6))
    await stream.until(6)
    stream.extend(11)
    await stream.until(11)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await others_go_on(engine)
    assert engine.restarts == 1
    assert stream.told.tokens == 11
    stream.extend(15, last=True)
    await stream.task
    assert stream.told.tokens == 15 == stream.told.final.usage.output
    assert stream.told.final.budget_ended


async def test_many_that_wait_hold_nobody_up(tmp_path: Path) -> None:
    """More of them than live jobs, sequences and cells would allow; others find room, and all go on in the end."""
    engine = await started("qwen2", tmp_path, cells=512, sequences=8)
    try:
        streams = [
            Stream(engine, ask(f"{n} waits", limit_tokens=30, ignore_eos=True, allowance_tokens=5, account=f"{n}"))
            for n in range(20)
        ]
        for stream in streams:
            await stream.until(5)
        await others_go_on(engine)
        assert [stream.told.tokens for stream in streams] == [5] * 20
        for stream in streams:
            stream.extend(None)
        await asyncio.gather(*(stream.task for stream in streams))
        assert all(stream.told.final.usage.output == 30 for stream in streams)
        assert (await engine.stats()).cells_used <= 512
    finally:
        await engine.close()


async def test_closing_one_that_waits_frees_what_it_held(source: TokenSource) -> None:
    stream = Stream(source, ask(limit_tokens=60, ignore_eos=True, allowance_tokens=4, sampling=Sampling(seed=3)))
    await stream.until(4)
    stream.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream.task
    await others_go_on(source)
    assert source.active == 0  # type: ignore[attr-defined]

"""Preparing in a real engine, one thread for everyone: whose prompt is read next, and what is not read any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nimbos.engine import Engine, protocol
from nimbos.errors import PromptTooLong
from nimbos.types import Ask, AskClass, Grammar
from tests.engine.asking import answer, ask, started

LONG = "word " * 100_000  # far beyond the context, and read to its end all the same, to say how long it is


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    running = await started("qwen2", tmp_path)
    yield running
    await running.close()


async def occupied(engine: Engine) -> asyncio.Task[Any]:
    """The preparer reads a very long prompt first, which is a third one's; what comes meanwhile waits behind it."""
    reading = asyncio.create_task(engine.prepare(ask(LONG, account="first")))
    while not engine._unanswered:
        await asyncio.sleep(0)
    return reading


async def test_a_flood_of_prompts_holds_up_nobody_else_and_people_go_first(engine: Engine) -> None:
    order: list[str] = []

    async def named(name: str, wanted: Ask) -> None:
        await engine.prepare(wanted)
        order.append(name)

    reading = await occupied(engine)
    waiting: list[Coroutine[Any, Any, None]] = [
        *(named(f"flood {n}", ask(f"f {n}", account="flood", ask_class=AskClass.BATCH)) for n in range(5)),
        *(named(f"polite {n}", ask(f"p {n}", account="polite", ask_class=AskClass.BATCH)) for n in range(2)),
        named("person", ask("hello", account="flood")),
    ]
    await asyncio.gather(*waiting)
    with pytest.raises(PromptTooLong):
        await reading
    assert order == [
        "person", "flood 0", "polite 0", "flood 1", "polite 1", "flood 2", "flood 3", "flood 4",
    ]  # fmt: skip


async def test_prompts_of_clients_that_left_are_not_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the bound on waiting prompts would bound nothing: come, go, come again."""
    replies: list[int] = []
    take = engine._take

    def watched(message: protocol.FromEngine) -> None:
        if isinstance(message, protocol.PreparedReply):
            replies.append(message.number)
        take(message)

    monkeypatch.setattr(engine, "_take", watched)
    reading = await occupied(engine)
    leaving = [asyncio.create_task(engine.prepare(ask(f"{n}"))) for n in range(20)]
    while len(engine._unanswered) < 21:
        await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    await asyncio.wait(leaving)
    later = await engine.prepare(ask("later"))
    assert later.prompt_tokens > 0
    with pytest.raises(PromptTooLong):
        await reading
    assert len(replies) == 2


async def test_an_ask_that_left_while_its_grammar_waited_leaves_nothing(engine: Engine) -> None:
    prepared = await engine.prepare(ask(grammar=Grammar(kind="regex", source="[0-9]{3}")))
    reading = await occupied(engine)
    async with aclosing(engine.generate(prepared.ask)) as chunks:
        first = asyncio.ensure_future(anext(chunks))
        while not engine.active:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
    with pytest.raises(PromptTooLong):
        await reading
    assert (await answer(engine, ask(grammar=Grammar(kind="regex", source="[0-9]{4}")))).tokens > 0
    stats = await engine.stats()
    assert sum(stats.waiting.values()) == 0 == sum(stats.live.values())

"""Who waits for the rest of a budget tries again a few at a time, and none is forgotten."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nimbos.db import Database
from nimbos.ledger import Running
from nimbos.ledger.bell import AT_ONCE, Bell
from nimbos.types import Ask, Origin, Prepared
from tests.ledger.books import ACCOUNT, CARD, an_ask
from tests.ledger.shop import Shop, shop

LONG_S = 60.0
NOWHERE = Origin()


async def rounds(count: int = 20) -> None:
    """Of the loop."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_ring_wakes_those_that_wait_longest() -> None:
    bell, woken = Bell(), list[int]()

    async def wait(number: int) -> None:
        await bell.wait(LONG_S, most_s=LONG_S)
        woken.append(number)

    waiting = [asyncio.create_task(wait(number)) for number in range(2 * AT_ONCE + 1)]
    await rounds()
    waiting[0].cancel()
    await rounds()
    bell.ring()
    await rounds()
    assert woken == list(range(1, AT_ONCE + 1))
    bell.ring()
    await rounds()
    assert woken == list(range(1, 2 * AT_ONCE + 1))
    bell.ring()  # for nobody
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_nobody_waits_longer_than_it_may() -> None:
    bell = Bell()
    others = [asyncio.create_task(bell.wait(LONG_S, most_s=LONG_S)) for _ in range(5)]
    await rounds()
    async with asyncio.timeout(LONG_S):
        await bell.wait(LONG_S, most_s=0.01)
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@pytest.fixture
def no_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not woken by a ring waits for good."""
    monkeypatch.setattr("nimbos.ledger.desk.HELD_TICK_S", LONG_S)


def admitted(made: Shop, ask: Ask) -> asyncio.Task[Running]:
    prepared = Prepared(ask=ask, prompt_tokens=1)
    return asyncio.create_task(made.desk.admit(ACCOUNT, prepared, origin=NOWHERE, card=CARD))


async def all_waiting(made: Shop, count: int) -> None:
    async with asyncio.timeout(LONG_S):
        while made.desk.waiting != count:
            await asyncio.sleep(0.001)


@pytest.mark.usefixtures("no_ticks")
async def test_a_settlement_makes_a_few_of_those_that_wait_try_again_and_not_all(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand asks of one key would take the whole server at every settlement of another's."""
    async with shop(database, tmp_path, patience_s=LONG_S) as made:
        budget = await made.books.budget("key", ACCOUNT.key, limit=1000)
        holder = await made.books.reserve(prompt=1000 - 64)
        tries, reserve = 0, made.books.ledger.reserve

        def counted(*arguments: object, **named: object) -> object:
            nonlocal tries
            tries += 1
            return reserve(*arguments, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(made.books.ledger, "reserve", counted)
        asks = [admitted(made, an_ask(limit_tokens=1)) for _ in range(5 * AT_ONCE)]
        await all_waiting(made, len(asks))
        before = tries
        for _ in range(3):
            made.desk.bell.ring()  # as the settlement of an ask of another key does
            await rounds()
            await all_waiting(made, len(asks))
        assert before <= tries <= before + 3 * AT_ONCE
        await made.books.run(lambda: made.books.ledger.abandon(holder.ask_id))
        made.desk.bell.ring()  # once: whoever is let in tells the next ones
        async with asyncio.timeout(LONG_S / 2):
            runnings = await asyncio.gather(*asks)
        for running in runnings:
            _, settling = running.end("cancelled")
            await settling
        assert (await made.books.look(budget)).reserved == 0

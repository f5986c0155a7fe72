"""The service's promise: every ask that is let in is paid for and settled once, whatever ends it."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database, Transaction
from nimbos.db.sqlite import SqliteStore
from nimbos.db.sqlite_file import SqliteFile
from nimbos.errors import BudgetExhausted, Conflict, Forbidden, ModelNotFound, Overloaded, StorageUnavailable
from nimbos.ledger import Extended, Progress, Settled, Settlement, Span, set_limit, usage
from nimbos.meterfile import Counts
from nimbos.types import Account, Admission, Ask, Final, FinishReason, TokenChunk, Usage
from tests import tiny_gguf
from tests.databases import Postgres
from tests.ledger.books import ACCOUNT
from tests.ledger.shop import Shop, Told, an_ask, ledger_of, script, shop

SAY_TOKENS = 1  # of the prompt "say"


@pytest.fixture
async def open_shop(database: Database, tmp_path: Path) -> AsyncIterator[Shop]:
    async with shop(database, tmp_path) as opened:
        yield opened


async def test_what_was_told_is_in_the_ledger_when_the_answer_is_through(open_shop: Shop) -> None:
    told = await open_shop.ask(n=2, limit_tokens=20)
    row = (await open_shop.rows())[told.ask.id]
    assert ledger_of(row) == told.usage == Usage(input=SAY_TOKENS, output=40)
    assert (row["state"], row["outcome"], row["finish"], row["told_output"]) == ("settled", "done", "length,length", 40)
    assert (row["key"], row["project"], row["user"], row["n"], row["model_hash"]) == (
        ACCOUNT.key,
        ACCOUNT.id,
        ACCOUNT.user,
        2,
        "0" * 64,
    )
    assert row["started_ms"] <= row["ended_ms"]
    assert open_shop.rows_in_use == 0


async def test_an_ask_that_is_refused_leaves_no_trace(open_shop: Shop) -> None:
    await open_shop.books.run(lambda: set_limit("key", ACCOUNT.key, requests_per_min=0))
    with pytest.raises(Overloaded, match="until that is changed") as refused:
        await open_shop.ask()
    assert refused.value.retry_after_s is None
    assert await open_shop.rows() == {}
    assert open_shop.rows_in_use == 0


async def test_a_key_may_ask_its_own_models_alone(open_shop: Shop) -> None:
    other = Account(id="proj_a", name="A", models=frozenset({"other"}))
    with pytest.raises(Forbidden, match="demo"):
        await open_shop.ask(account=other)
    with pytest.raises(ModelNotFound) as missing:
        await open_shop.ask(account=other, model="mistyped")
    assert "demo" not in missing.value.message, "it is told of its own models alone"
    assert await open_shop.rows() == {}


async def test_a_model_that_a_key_may_not_ask_is_not_loaded_for_it(database: Database, tmp_path: Path) -> None:
    model = tiny_gguf.write("qwen2", tmp_path)
    for other in (Account(id="proj_a", name="A", models=frozenset({"demo"})), _DENIED):
        async with shop(database, tmp_path, models=(model,)) as opened:
            with pytest.raises(Forbidden):
                await opened.service.card(model.stem, other)
            with pytest.raises(Forbidden):
                await opened.ask(account=other, model=model.stem)
            assert opened.service.engine_pid(model.stem) is None


_DENIED = Account(id="proj_a", name="A", denied_models=frozenset({"tiny-qwen2-1"}))


async def test_headers_tell_the_limits(open_shop: Shop) -> None:
    await open_shop.books.run(lambda: set_limit("key", ACCOUNT.key, requests_per_min=60, tokens_per_min=6000))
    admission = Admission()
    await open_shop.ask(limit_tokens=4, admission=admission)
    assert admission.headers["x-ratelimit-limit-requests"] == "60"
    assert admission.headers["x-ratelimit-remaining-tokens"] == str(6000 - SAY_TOKENS - 4)


async def test_an_answer_longer_than_a_slice_is_paid_for_slice_by_slice(open_shop: Shop) -> None:
    budget = await open_shop.books.budget("key", ACCOUNT.key, limit=10_000)
    told = await open_shop.ask(n=3)
    assert [final.reason for final in told.finals] == [FinishReason.STOP] * 3
    assert told.usage.output == 600
    after = await open_shop.books.look(budget)
    assert (after.used, after.reserved) == (600 + SAY_TOKENS, 0)


async def test_the_meter_is_read_on_the_servers_own_thread(open_shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is for one thread, and what was told of an answer changes while a transaction runs in another."""
    readers = set()
    read = open_shop.meters.read

    def noted(row: int) -> Counts:
        readers.add(threading.get_ident())
        return read(row)

    monkeypatch.setattr(open_shop.meters, "read", noted)
    await open_shop.books.budget("key", ACCOUNT.key, limit=10_000)
    assert (await open_shop.ask()).output == 200
    assert readers == {threading.get_ident()}


async def test_a_budget_that_ends_in_an_answer_ends_it_there(open_shop: Shop) -> None:
    budget = await open_shop.books.budget("key", ACCOUNT.key, limit=100, alerts_at=[50, 90])
    told = await open_shop.ask()
    (final,) = told.finals
    assert (final.reason, final.budget_ended, told.output) == (FinishReason.LENGTH, True, 99)
    assert (await open_shop.books.look(budget)).used == 100
    assert [fired.threshold for fired in open_shop.fired] == [50, 90]
    assert (await open_shop.rows())[told.ask.id]["finish"] == "budget"
    with pytest.raises(BudgetExhausted):
        await open_shop.ask()


@pytest.mark.parametrize("before", ["none", "unlimited", "higher"])
async def test_a_budget_that_is_limited_while_an_answer_runs_ends_it_there(open_shop: Shop, before: str) -> None:
    if before != "none":
        await open_shop.books.budget("project", ACCOUNT.id, limit=None if before == "unlimited" else 10_000)
    told, budget = Told(an_ask()), None
    async with aclosing(open_shop.service.generate(ACCOUNT, told.ask)) as chunks:
        async for chunk in chunks:
            if isinstance(chunk, TokenChunk):
                told.output += len(chunk.ids)
            elif isinstance(chunk, Final):
                told.finals.append(chunk)
            if told.output == 10:
                budget = await open_shop.books.budget("project", ACCOUNT.id, limit=100)
            await extended(open_shop)
    (final,) = told.finals
    assert (final.reason, final.budget_ended, told.output) == (FinishReason.LENGTH, True, 99)
    assert budget is not None
    after = await open_shop.books.look(budget)
    assert (after.used, after.reserved) == (100, 0)


async def test_an_answer_that_no_budget_holds_goes_on_without_the_database(
    open_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def gone(*_: object) -> Transaction[Extended]:
        nonlocal looks
        looks += 1
        raise StorageUnavailable("the database", reason="it is away.")
        yield

    monkeypatch.setattr(open_shop.books.ledger, "extend", gone)
    told = await open_shop.ask()
    assert (told.output, told.finals[0].budget_ended) == (200, False)
    assert looks >= 1


async def extended(opened: Shop) -> None:
    """The source is told what the running asks may still use."""
    extending = [task for running in opened.desk._running.values() if (task := running._extending) is not None]
    await asyncio.gather(*extending)


async def test_fifty_asks_at_once_spend_a_budget_to_the_end_and_not_beyond(database: Database, tmp_path: Path) -> None:
    """All that can be paid is paid: who was refused could not have been given even one token."""
    async with shop(database, tmp_path, says=script(150), patience_s=60) as opened:
        budget = await opened.books.budget("key", ACCOUNT.key, limit=2_000)
        tolds = [Told(an_ask(limit_tokens=random.Random(number).choice([10, 70, 200]))) for number in range(50)]
        outcomes = await asyncio.gather(*(opened.ask(told=told) for told in tolds), return_exceptions=True)
        after = await opened.books.look(budget)
        assert after.reserved == 0
        assert 2_000 - SAY_TOKENS <= after.used <= 2_000
        spent = sum(told.usage.input + told.usage.output for told in tolds)
        assert spent == after.used
        refused = [one for one in outcomes if isinstance(one, BaseException)]
        assert refused
        assert all(isinstance(one, BudgetExhausted) for one in refused)
        for told, outcome in zip(tolds, outcomes, strict=True):
            if not isinstance(outcome, BaseException):
                (final,) = told.finals
                assert final.budget_ended or told.output == min(told.ask.limit_tokens or 0, 150)


async def test_a_budget_large_enough_refuses_nobody_under_load(open_shop: Shop) -> None:
    """LiteLLM #36926: a budget was said to be exceeded by the sum of what ran and what had been used."""
    await open_shop.books.budget("key", ACCOUNT.key, limit=60 * (200 + SAY_TOKENS))
    tolds = await asyncio.gather(*(open_shop.ask() for _ in range(60)))
    assert {told.output for told in tolds} == {200}


async def test_spend_that_is_over_blocks_nobody(open_shop: Shop) -> None:
    """LiteLLM #27735 and #40050: stale spend went on blocking, and what was enforced was twice what was used."""
    budget = await open_shop.books.budget("key", ACCOUNT.key, limit=100)
    for _ in range(10):  # each reserves more than it uses; nothing of that stays
        await open_shop.ask(limit_tokens=60, leave_after=2)
        after = await open_shop.books.look(budget)
        assert after.reserved == 0
        if after.used > 90:
            break
    total = (await usage(open_shop.database, by="key")).total
    assert (await open_shop.books.look(budget)).used == total.input_tokens + total.output_tokens


async def test_no_budget_is_passed_by(open_shop: Shop) -> None:
    """LiteLLM #26672: a budget was bypassed. Here whoever asks meets each of the chain, by whatever route."""
    for kind, owner in (("organisation", "org_default"), ("project", ACCOUNT.id), ("key", ACCOUNT.key)):
        budget = await open_shop.books.budget(kind, owner, limit=0)
        with pytest.raises(BudgetExhausted):
            await open_shop.ask()
        await open_shop.books.budget(kind, owner, limit=10**6)
        assert (await open_shop.books.look(budget)).used == 0


async def test_what_came_before_a_disconnect_is_counted(open_shop: Shop) -> None:
    """LiteLLM #14457: tokens before a disconnect were not."""
    told = await open_shop.ask(leave_after=7)
    row = (await open_shop.rows())[told.ask.id]
    assert row["outcome"] == "cancelled"
    assert 7 <= ledger_of(row).output <= 8
    assert ledger_of(row).input == SAY_TOKENS


async def test_two_hundred_asks_of_which_many_are_left_or_cancelled_at_any_moment(
    database: Database, tmp_path: Path
) -> None:
    rng = random.Random(11)
    async with shop(database, tmp_path, says=script(40, thinking=8)) as opened:
        budget = await opened.books.budget("project", ACCOUNT.id, limit=10**6)
        tolds = [Told(an_ask(n=rng.choice([1, 1, 3]), limit_tokens=rng.choice([None, 5, 30]))) for _ in range(200)]

        async def one(told: Told) -> None:
            leave = rng.choice([None, None, 1, 4, 17])
            task = asyncio.ensure_future(opened.ask(told=told, leave_after=leave))
            for _ in range(rng.randrange(60)):
                await asyncio.sleep(0)
            if rng.random() < 0.3:
                task.cancel()
            await asyncio.wait({task})

        await asyncio.gather(*map(one, tolds))
        await opened.desk.close()
        rows = await opened.rows()
        check_told(tolds, rows)
        charged = await opened.books.look(budget)
        assert charged.reserved == 0
        assert charged.used == sum(ledger_of(row).input + ledger_of(row).output for row in rows.values())
        assert opened.rows_in_use == 0
    assert list((tmp_path / "run").glob("meter-*")) == []


def check_told(tolds: list[Told], rows: dict[str, Any]) -> None:
    for told in tolds:
        row = rows.get(told.ask.id)
        if row is None:
            assert told.output == 0
            continue
        assert row["state"] == "settled"
        found = ledger_of(row)
        assert told.output <= row["told_output"] <= found.output <= row["told_output"] + told.ask.n
        if told.complete:
            assert found == told.usage
    assert {told.ask.id for told in tolds} >= rows.keys()


class Diary:
    """A journal that remembers, and refuses on demand."""

    def __init__(self, refuse: str = "", *, paid: Usage | None = None) -> None:
        self.refuse = refuse
        self.paid = paid or Usage()
        self.seen: list[str] = []

    def _note(self, what: str) -> Transaction[None]:
        self.seen.append(what)
        if self.refuse == what:
            raise Conflict(f"{what} is refused")
        yield from ()

    def reserved(self, ask: Ask, *, prompt_tokens: int) -> Transaction[None]:
        yield from self._note("reserved")

    def extended(self, ask_id: str, progress: Progress, extended: Extended) -> Transaction[None]:
        yield from self._note("extended")

    def settled(self, settlement: Settlement, settled: Settled) -> Transaction[None]:
        yield from self._note("settled")


async def test_a_journal_is_in_the_ledgers_own_transactions(open_shop: Shop) -> None:
    await open_shop.books.budget("key", ACCOUNT.key, limit=400)
    diary = Diary()
    await open_shop.ask(journal=diary)
    assert (diary.seen[0], diary.seen[1], diary.seen[-1]) == ("reserved", "extended", "settled")
    with pytest.raises(Conflict):
        await open_shop.ask(limit_tokens=1, journal=Diary("reserved"))
    assert len(await open_shop.rows()) == 1  # the reservation went with it


@pytest.mark.parametrize("choices", [1, 3])
async def test_what_an_earlier_ask_has_paid_for_is_not_held_nor_paid_again(open_shop: Shop, choices: int) -> None:
    """A budget that has the rest of all choices to the token lets them all go to their end."""
    earlier = Usage(input=SAY_TOKENS, output=choices * 200 - 150)
    budget = await open_shop.books.budget("key", ACCOUNT.key, limit=150)
    told = await open_shop.ask(n=choices, journal=Diary(paid=earlier))
    assert {final.reason for final in told.finals} == {FinishReason.STOP}
    assert (told.usage.input, told.usage.output) == (SAY_TOKENS, choices * 200)
    row = (await open_shop.rows())[told.ask.id]
    assert ledger_of(row) == Usage(output=150, recomputed=earlier.input + earlier.output)
    left = await open_shop.books.look(budget)
    assert (left.used, left.reserved) == (150, 0)


async def test_a_journal_that_refuses_the_end_keeps_nobody_from_what_was_used(open_shop: Shop) -> None:
    budget = await open_shop.books.budget("key", ACCOUNT.key, limit=1_000)
    await open_shop.ask(limit_tokens=5, journal=Diary("settled"))
    assert open_shop.rows_in_use == 0
    found = await open_shop.books.look(budget)
    assert (found.used, found.reserved) == (5 + SAY_TOKENS, 0)


async def test_an_ask_cancelled_while_it_is_being_let_in_holds_nothing(open_shop: Shop) -> None:
    budget = await open_shop.books.budget("key", ACCOUNT.key, limit=10_000)
    for patience in range(12):
        task = asyncio.ensure_future(open_shop.ask())
        for _ in range(patience):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
    await open_shop.desk.close()
    assert (await open_shop.books.look(budget)).reserved == 0
    assert open_shop.rows_in_use == 0


async def test_who_waits_for_what_others_hold_is_let_in_when_they_give_it_back(open_shop: Shop) -> None:
    await open_shop.books.budget("key", ACCOUNT.key, limit=66)
    first = open_shop.service.generate(ACCOUNT, an_ask(limit_tokens=64))
    await anext(first)
    second = asyncio.ensure_future(open_shop.ask(limit_tokens=5))
    while not second.done() and open_shop.desk.waiting == 0:
        await asyncio.sleep(0)
    assert open_shop.desk.waiting == 1
    await first.aclose()
    assert (await second).output == 5


async def test_who_waits_in_vain_is_told_that_others_hold_the_rest(database: Database, tmp_path: Path) -> None:
    async with shop(database, tmp_path, patience_s=0.05) as opened:
        await opened.books.budget("key", ACCOUNT.key, limit=65)
        first = opened.service.generate(ACCOUNT, an_ask(limit_tokens=64))
        await anext(first)
        with pytest.raises(Overloaded) as refused:
            await opened.ask()
        assert not isinstance(refused.value, BudgetExhausted)
        assert (refused.value.value, refused.value.used) == (65, 65)
        await first.aclose()
        assert opened.rows_in_use == 0


async def until(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0.01)


async def impatient(folder: Path) -> Database:
    """SQLite that waits for a lock for half a second."""
    file = SqliteFile(folder / "nimbos.db", lock_patience_s=0.5)
    return Database(await SqliteStore.open(file), dialect="sqlite")


async def test_settlements_wait_for_a_database_that_is_locked(tmp_path: Path) -> None:
    database = await impatient(tmp_path)
    async with shop(database, tmp_path) as opened:
        running = opened.service.generate(ACCOUNT, an_ask())
        for _ in range(5):
            await anext(running)
        other = sqlite3.connect(tmp_path / "nimbos.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        await running.aclose()
        assert (opened.desk.late, opened.rows_in_use) == (1, 1)
        with pytest.raises(StorageUnavailable):
            await opened.ask()
        other.execute("ROLLBACK")
        other.close()
        await until(lambda: opened.desk.late == 0)
        assert opened.rows_in_use == 0
        (row,) = (await opened.rows()).values()
        assert (row["state"], row["told_output"], ledger_of(row).output) == ("settled", 5, 5)
        assert (await opened.ask(limit_tokens=3)).complete
    await database.close()


async def test_settlements_wait_for_a_postgresql_that_is_gone(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.fresh()
    database = await Database.open(Settings(home=str(tmp_path), storage=StorageSettings(database_url=url)))
    async with shop(database, tmp_path) as opened:
        budget = await opened.books.budget("key", ACCOUNT.key, limit=10_000)
        running = opened.service.generate(ACCOUNT, an_ask())
        for _ in range(5):
            await anext(running)
        postgres.stop()
        try:
            await running.aclose()
            assert opened.desk.late == 1
            with pytest.raises(StorageUnavailable):
                await opened.ask()
        finally:
            postgres.start()
        await until(lambda: opened.desk.late == 0)
        assert (await opened.books.look(budget)).used == 5 + SAY_TOKENS
        assert (await opened.books.look(budget)).reserved == 0
    await database.close()
    postgres.drop(url)


async def test_what_still_waits_when_the_server_ends_is_recovered(tmp_path: Path) -> None:
    database = await impatient(tmp_path)
    other = sqlite3.connect(tmp_path / "nimbos.db", isolation_level=None)
    async with shop(database, tmp_path) as opened:
        running = opened.service.generate(ACCOUNT, an_ask())
        for _ in range(5):
            await anext(running)
        other.execute("BEGIN IMMEDIATE")
        await running.aclose()
    other.execute("ROLLBACK")
    other.close()
    async with shop(database, tmp_path) as opened:
        (row,) = (await opened.rows()).values()
        assert (row["state"], row["outcome"], ledger_of(row).output) == ("settled", "recovered", 5)
    assert list((tmp_path / "run").glob("meter-*")) == []
    await database.close()


async def test_usage_told_while_it_runs_is_the_meters(open_shop: Shop) -> None:
    asked = an_ask()
    running = open_shop.service.generate(ACCOUNT, asked)
    for number in range(1, 6):
        await anext(running)
        assert open_shop.service.used(asked.id) == Usage(input=SAY_TOKENS, output=number)
    await running.aclose()
    assert open_shop.service.used(asked.id) == Usage()
    today = await usage(open_shop.database, by="day", span=Span())
    assert today.total.output_tokens == 5


async def test_two_servers_on_one_database_never_spend_a_unit_twice(
    database_settings: Settings, tmp_path: Path
) -> None:
    first, second = await Database.open(database_settings), await Database.open(database_settings)
    try:
        async with (
            shop(first, tmp_path / "one", says=script(150), patience_s=60) as one,
            shop(second, tmp_path / "two", says=script(150), patience_s=60) as two,
        ):
            budget = await one.books.budget("project", ACCOUNT.id, limit=1_000)
            tolds = [Told(an_ask()) for _ in range(20)]
            outcomes = await asyncio.gather(
                *((one, two)[number % 2].ask(told=told) for number, told in enumerate(tolds)), return_exceptions=True
            )
            assert all(isinstance(one, Told | BudgetExhausted) for one in outcomes)
            after = await two.books.look(budget)
            assert (1_000 - SAY_TOKENS <= after.used <= 1_000, after.reserved) == (True, 0)
            assert sum(told.usage.input + told.usage.output for told in tolds) == after.used
    finally:
        await first.close()
        await second.close()

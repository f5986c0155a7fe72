"""Budgets: what they let through, what they hold, when they begin again, and whom they warn."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database, Statement, Transaction
from nimbos.errors import BudgetExhausted, InvalidRequest, NotFound
from nimbos.ledger import Settlement, alerts_of, remove_budget, tree
from nimbos.ledger import ledger as module
from nimbos.ledger.budgets import Held
from nimbos.types import Kind, Usage
from tests.databases import Postgres
from tests.ledger.books import ACCOUNT, Books, an_ask


@pytest.fixture
def books(database: Database) -> Books:
    return Books(database)


async def test_a_key_without_a_budget_is_never_held(books: Books) -> None:
    reserved = await books.reserve(prompt=10**9)
    assert reserved.allowance_tokens is None


async def test_what_is_reserved_is_the_prompt_and_a_slice_of_each_branch(books: Books) -> None:
    budget = await books.budget("key", ACCOUNT.key, limit=1000)
    reserved = await books.reserve(an_ask(n=3), prompt=100)
    assert reserved.allowance_tokens == 64
    assert (await books.look(budget)).reserved == 100 + 3 * 64
    limited = await books.reserve(an_ask(limit_tokens=5), prompt=7)
    assert limited.allowance_tokens == 5
    assert (await books.look(budget)).reserved == 100 + 3 * 64 + 12


async def test_a_smaller_slice_is_given_down_to_one_token(books: Books) -> None:
    await books.budget("key", ACCOUNT.key, limit=20)
    for prompt, allowed in ((10, 10), (18, 2), (19, 1)):
        reserved = await books.reserve(prompt=prompt)
        assert reserved.allowance_tokens == allowed
        await books.settle(reserved.ask_id, Usage())
    with pytest.raises(BudgetExhausted) as refused:
        await books.reserve(prompt=20)  # 20 and one token of answer are 21
    assert (refused.value.limit, refused.value.used, refused.value.retry_after_s) == (20, 0, None)


async def test_an_embedding_needs_its_prompt_alone(books: Books) -> None:
    await books.budget("key", ACCOUNT.key, limit=20)
    reserved = await books.reserve(an_ask(kind=Kind.EMBED), prompt=20)
    assert reserved.allowance_tokens is None
    with pytest.raises(BudgetExhausted):
        await books.settle(reserved.ask_id, Usage(input=20))
        await books.reserve(an_ask(kind=Kind.EMBED), prompt=1)


async def test_every_budget_on_the_way_to_the_root_is_charged_and_the_smallest_decides(books: Books) -> None:
    organisation = await books.budget("organisation", "org_default", limit=1000)
    project = await books.budget("project", ACCOUNT.id, limit=50)
    key = await books.budget("key", ACCOUNT.key, limit=100)
    other = await books.budget("key", "key_b", limit=100)
    reserved = await books.reserve(prompt=10)
    assert reserved.allowance_tokens == 40
    for budget in (organisation, project, key):
        assert (await books.look(budget)).reserved == 50
    await books.settle(reserved.ask_id, Usage(input=10, output=7))
    for budget, used in ((organisation, 17), (project, 17), (key, 17), (other, 0)):
        assert ((await books.look(budget)).reserved, (await books.look(budget)).used) == (0, used)


async def test_a_child_process_draws_on_all_its_ancestors(books: Books) -> None:
    parent = await books.budget("process", "proc_1", limit=100)
    child = await books.budget("process", "proc_2", limit=1000, parent=parent.id)
    grandchild = await books.budget("process", "proc_3", limit=1000, parent=child.id)
    assert [budget.depth for budget in (parent, child, grandchild)] == [3, 4, 5]
    reserved = await books.reserve(prompt=90, process="proc_3")
    assert reserved.allowance_tokens == 10
    await books.settle(reserved.ask_id, Usage(input=90, output=10))
    assert [(await books.look(budget)).used for budget in (parent, child, grandchild)] == [100, 100, 100]
    with pytest.raises(BudgetExhausted, match="proc_1"):
        await books.reserve(prompt=1, process="proc_2")
    assert (await books.reserve(prompt=1)).allowance_tokens is None  # the key itself has no budget


async def test_extending_moves_what_is_used_and_reserves_the_next_slice(books: Books) -> None:
    budget = await books.budget("key", ACCOUNT.key, limit=200)
    reserved = await books.reserve(prompt=10)
    extended = await books.extend(reserved.ask_id, Usage(input=10, output=40), allowance=64)
    assert (extended.allowance_tokens, extended.last) == (128, False)
    after = await books.look(budget)
    assert (after.used, after.reserved) == (50, 24 + 64)
    extended = await books.extend(reserved.ask_id, Usage(input=10, output=100), allowance=128)
    assert (extended.allowance_tokens, extended.last) == (190, False)  # all that there is
    assert (await books.look(budget)).used + (await books.look(budget)).reserved == 200
    extended = await books.extend(reserved.ask_id, Usage(input=10, output=170), allowance=190)
    assert (extended.allowance_tokens, extended.last) == (190, True)
    await books.settle(reserved.ask_id, Usage(input=10, output=190))
    assert ((await books.look(budget)).used, (await books.look(budget)).reserved) == (200, 0)


async def test_an_answer_waits_for_what_another_holds_and_ends_when_nobody_holds_anything(books: Books) -> None:
    await books.budget("key", ACCOUNT.key, limit=148)
    first = await books.reserve(prompt=10)
    second = await books.reserve(prompt=10)
    assert (first.allowance_tokens, second.allowance_tokens) == (64, 64)
    waiting = await books.extend(first.ask_id, Usage(input=10, output=64), allowance=64)
    assert (waiting.wait, waiting.last, waiting.allowance_tokens) == (True, False, 64)
    await books.settle(second.ask_id, Usage(input=10, output=4))
    more = await books.extend(first.ask_id, Usage(input=10, output=64), allowance=64)
    assert (more.wait, more.last, more.allowance_tokens) == (False, False, 124)
    last = await books.extend(first.ask_id, Usage(input=10, output=124), allowance=124)
    assert (last.wait, last.last) == (False, True)


async def test_two_answers_that_used_all_they_held_both_end(books: Books) -> None:
    await books.budget("key", ACCOUNT.key, limit=148)
    first, second = await books.reserve(prompt=10), await books.reserve(prompt=10)
    spent = Usage(input=10, output=64)
    assert (await books.extend(first.ask_id, spent, allowance=64)).wait  # the second's use is not told yet
    assert (await books.extend(second.ask_id, spent, allowance=64)).last
    assert (await books.extend(first.ask_id, spent, allowance=64)).last


async def test_what_running_asks_hold_is_said_to_be_held_and_not_spent(books: Books) -> None:
    await books.budget("key", ACCOUNT.key, limit=80)
    running = await books.reserve(prompt=16)
    with pytest.raises(Held) as held:
        await books.reserve(prompt=10)
    assert (held.value.limit, held.value.value, held.value.used) == ("tokens left in the budget", 80, 80)
    await books.settle(running.ask_id, Usage(input=16, output=4))
    assert (await books.reserve(prompt=10)).allowance_tokens == 50


async def test_a_budget_that_counts_only_refuses_nobody(books: Books) -> None:
    budget = await books.budget("project", ACCOUNT.id, limit=None)
    assert (await books.reserve(prompt=10**6)).allowance_tokens is None
    settled = await books.ask_and_settle(Usage(input=5, output=6))
    assert settled.new
    assert (await books.look(budget)).used == 11


async def test_a_settlement_counts_once(books: Books) -> None:
    budget = await books.budget("key", ACCOUNT.key, limit=1000)
    reserved = await books.reserve(prompt=10)
    assert (await books.settle(reserved.ask_id, Usage(input=10, output=5))).new
    assert not (await books.settle(reserved.ask_id, Usage(input=10, output=9))).new
    assert not (await books.settle("ask_" + "0" * 32, Usage(input=10))).new
    assert ((await books.look(budget)).used, (await books.look(budget)).reserved) == (15, 0)


class Clock:
    """The ledger's clock, to be moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = 0
        monkeypatch.setattr(module, "_now_ms", lambda: self.now_ms)
        monkeypatch.setattr(tree, "_now_ms", lambda: self.now_ms)

    def to(self, *moment: int) -> None:
        self.now_ms = int(datetime(*moment, tzinfo=UTC).timestamp() * 1000)  # type: ignore[misc, arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    ("period", "before", "after", "waits_s"),
    [
        ("day", (2026, 2, 28, 23, 59), (2026, 3, 1, 0, 0), 60.0),
        ("month", (2026, 2, 28, 23, 59), (2026, 3, 1, 0, 0), 60.0),
        ("month", (2026, 12, 31, 23, 0), (2027, 1, 1, 0, 0), 3600.0),
    ],
)
async def test_a_period_that_ends_gives_the_budget_back(
    books: Books, clock: Clock, period: str, before: Any, after: Any, waits_s: float
) -> None:
    clock.to(*before)
    budget = await books.budget("key", ACCOUNT.key, limit=20, period=period)
    running = await books.reserve(prompt=4, ask=an_ask(limit_tokens=6))
    assert (await books.ask_and_settle(Usage(input=4, output=6), prompt=4)).new
    with pytest.raises(BudgetExhausted) as refused:
        await books.reserve(prompt=15)
    assert refused.value.retry_after_s == waits_s
    with pytest.raises(BudgetExhausted, match="more than the whole") as refused:
        await books.reserve(prompt=20)  # and a token of answer
    assert refused.value.retry_after_s is None
    clock.to(*after)
    rolled = await books.look(budget)
    assert (rolled.used, rolled.reserved) == (0, 10)  # what runs keeps what it holds
    await books.settle(running.ask_id, Usage(input=4, output=3))
    assert ((await books.look(budget)).used, (await books.look(budget)).reserved) == (7, 0)


async def test_a_total_is_never_renewed(books: Books, clock: Clock) -> None:
    clock.to(2026, 1, 1)
    await books.budget("key", ACCOUNT.key, limit=20)
    await books.ask_and_settle(Usage(input=4, output=16))
    clock.to(2036, 1, 1)
    with pytest.raises(BudgetExhausted) as refused:
        await books.reserve(prompt=1)
    assert refused.value.retry_after_s is None


async def test_of_two_spent_budgets_the_one_that_is_renewed_last_says_when(books: Books, clock: Clock) -> None:
    clock.to(2026, 1, 30)
    for kind, owner, period in (("project", ACCOUNT.id, "day"), ("key", ACCOUNT.key, "month")):
        await books.budget(kind, owner, limit=20, period=period)
    await books.ask_and_settle(Usage(input=4, output=16))
    with pytest.raises(BudgetExhausted) as refused:
        await books.reserve(prompt=1)
    assert refused.value.retry_after_s == 2 * 86_400


async def test_a_threshold_tells_once_in_each_period(books: Books, clock: Clock) -> None:
    clock.to(2026, 5, 1)
    budget = await books.budget("project", ACCOUNT.id, limit=100, period="day", alerts_at=[10, 50])
    for expected in ([], [10], []):
        settled = await books.ask_and_settle(Usage(input=4, output=4))
        assert [one.threshold for one in settled.fired] == expected
    assert [one.threshold for one in (await books.ask_and_settle(Usage(input=40))).fired] == [50]
    clock.to(2026, 5, 2)
    assert [one.threshold for one in (await books.ask_and_settle(Usage(input=60))).fired] == [10, 50]
    kept = await books.run(lambda: alerts_of(budget.id))
    assert [(alert.threshold, alert.fired_used) for alert in kept] == [(10, 60), (50, 60)]


async def test_a_threshold_is_crossed_while_an_answer_streams(books: Books) -> None:
    await books.budget("key", ACCOUNT.key, limit=1000, alerts_at=[30])
    reserved = await books.reserve(prompt=10)
    extended = await books.extend(reserved.ask_id, Usage(input=10, output=40), allowance=64)
    assert [one.threshold for one in extended.fired] == [30]
    assert (await books.settle(reserved.ask_id, Usage(input=10, output=50))).fired == ()


async def test_a_budget_made_in_the_middle_of_a_period_knows_what_was_used(books: Books) -> None:
    await books.ask_and_settle(Usage(input=10, output=20))
    for kind, owner in (("key", ACCOUNT.key), ("project", ACCOUNT.id), ("organisation", "org_default")):
        for period, used in (("day", 30), ("month", 30), ("total", 0)):
            assert (await books.budget(kind, owner, limit=100, period=period)).used == used
    assert (await books.budget("key", "key_b", limit=100, period="day")).used == 0


async def test_changing_a_limit_keeps_what_is_used_and_reaches_running_answers(books: Books) -> None:
    await books.budget("key", ACCOUNT.key, limit=1000)
    reserved = await books.reserve(prompt=10)
    changed = await books.budget("key", ACCOUNT.key, limit=60)
    assert (changed.limit, changed.reserved) == (60, 74)
    ended = await books.extend(reserved.ask_id, Usage(input=10, output=50), allowance=64)
    assert ended.last
    await books.settle(reserved.ask_id, Usage(input=10, output=64))
    with pytest.raises(BudgetExhausted):
        await books.reserve(prompt=1)
    await books.budget("key", ACCOUNT.key, limit=100)
    assert (await books.reserve(prompt=1)).allowance_tokens == 25


@pytest.mark.parametrize("before", [None, "unlimited"])
async def test_a_budget_made_for_an_answer_that_runs_holds_it_as_if_it_had_been_there(
    books: Books, before: str | None
) -> None:
    if before:
        await books.budget("key", ACCOUNT.key, limit=None)
    reserved = await books.reserve(prompt=10)
    assert reserved.allowance_tokens is None
    unheld = await books.extend(reserved.ask_id, Usage(input=10, output=64), allowance=64)
    assert (unheld.allowance_tokens, unheld.last) == (None, False)
    key = await books.budget("key", ACCOUNT.key, limit=100)
    assert (await books.extend(reserved.ask_id, Usage(input=10, output=70), allowance=70)).allowance_tokens == 90
    assert ((await books.look(key)).used, (await books.look(key)).reserved) == (80, 20)
    project = await books.budget("project", ACCOUNT.id, limit=1000)
    assert (await books.extend(reserved.ask_id, Usage(input=10, output=90), allowance=90)).last
    for budget in (key, project):
        assert ((await books.look(budget)).used, (await books.look(budget)).reserved) == (100, 0)
    await books.settle(reserved.ask_id, Usage(input=10, output=91))
    for budget in (key, project):
        assert ((await books.look(budget)).used, (await books.look(budget)).reserved) == (101, 0)


@pytest.mark.parametrize("period", ["day", "month", "total"])
async def test_a_budget_made_while_an_answer_runs_is_charged_the_whole_of_it_also_without_another_slice(
    books: Books, period: str
) -> None:
    """And once: neither is it in the sums that the budget begins with, nor missing in both."""
    await books.ask_and_settle(Usage(input=3, output=4))
    running, cancelled = await books.reserve(prompt=10), await books.reserve(prompt=10)
    begun = 0 if period == "total" else 7
    budget = await books.budget("key", ACCOUNT.key, limit=1000, period=period, alerts_at=[begun + 20])
    assert ((await books.look(budget)).used, (await books.look(budget)).reserved) == (begun, 0)
    settled = await books.settle(running.ask_id, Usage(input=10, output=20))
    assert [one.threshold for one in settled.fired] == [begun + 20]
    await books.settle(cancelled.ask_id, Usage(), outcome="cancelled")
    assert ((await books.look(budget)).used, (await books.look(budget)).reserved) == (begun + 30, 0)


async def test_a_budget_that_is_made_as_an_answer_is_settled_has_it_once(postgres: Postgres, tmp_path: Path) -> None:
    """On two servers at the same moment: the settlement has looked for budgets and is not committed."""
    url = postgres.with_tables()
    database = await Database.open(Settings(home=str(tmp_path), storage=StorageSettings(database_url=url)))
    holder: Any = await asyncpg.connect(url)
    try:
        books = Books(database)
        reserved = await books.reserve(prompt=10)
        await holder.execute("SELECT pg_advisory_lock(7)")
        settlement = Settlement(ask_id=reserved.ask_id, usage=Usage(input=10, output=20), outcome="done")

        def settle() -> Transaction[None]:
            yield from books.ledger.settle(settlement)
            yield _WAIT_FOR_HOLDER()

        settling = asyncio.create_task(database.run(settle))
        await _waiting(holder, 1, settling)
        making = asyncio.create_task(books.budget("key", ACCOUNT.key, limit=1000, period="day"))
        await _waiting(holder, 2, making)
        await holder.execute("SELECT pg_advisory_unlock(7)")
        await settling
        assert (await making).used == 30
    finally:
        await holder.close()
        await database.close()
        postgres.drop(url)


_WAIT_FOR_HOLDER = Statement(text("SELECT pg_advisory_xact_lock(7)"))


async def _waiting(connection: Any, count: int, task: asyncio.Task[Any]) -> None:
    """Until so many wait for a lock, or the task does not."""
    async with asyncio.timeout(60):
        while not task.done():
            if await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") >= count:
                return


async def test_an_answer_whose_server_was_silent_goes_on_where_no_budget_holds_it(books: Books) -> None:
    reserved = await books.reserve(prompt=10)
    await books.run(lambda: books.ledger.abandon(reserved.ask_id))
    free = await books.extend(reserved.ask_id, Usage(input=10, output=64), allowance=64)
    assert (free.allowance_tokens, free.last) == (None, False)
    await books.budget("key", ACCOUNT.key, limit=10_000)
    assert (await books.extend(reserved.ask_id, Usage(input=10, output=128), allowance=128)).last
    await books.settle(reserved.ask_id, Usage(input=10, output=128))
    assert (await books.extend(reserved.ask_id, Usage(input=10, output=128), allowance=128)).last


async def test_a_removed_budget_holds_nobody(books: Books) -> None:
    budget = await books.budget("key", ACCOUNT.key, limit=80)
    reserved = await books.reserve(prompt=10)
    await books.run(lambda: remove_budget(budget.id))
    extended = await books.extend(reserved.ask_id, Usage(input=10, output=60), allowance=64)
    assert (extended.allowance_tokens, extended.last, extended.wait) == (None, False, False)
    assert (await books.settle(reserved.ask_id, Usage(input=10, output=500))).new
    with pytest.raises(NotFound):
        await books.look(budget)


@pytest.mark.parametrize(
    "wrong",
    [
        {"meter": "coins"},
        {"period": "year"},
        {"limit": -1},
        {"limit": 10**18},
        {"alerts_at": [-5]},
    ],
)
async def test_a_budget_that_cannot_be_is_refused(books: Books, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        await books.budget("key", ACCOUNT.key, **{"limit": 5, **wrong})
    with pytest.raises(InvalidRequest):
        await books.budget("planet", "earth", limit=5)
    with pytest.raises(NotFound):
        await books.budget("process", "proc_1", limit=5, parent="budget_none")
    assert await books.budgets_of("key", ACCOUNT.key) == []


async def test_a_refusal_takes_nothing(books: Books) -> None:
    """Neither from a budget nearer to the root, nor from a limit."""
    project = await books.budget("project", ACCOUNT.id, limit=1000)
    await books.budget("key", ACCOUNT.key, limit=5)
    with pytest.raises(BudgetExhausted):
        await books.reserve(prompt=10)
    assert (await books.look(project)).reserved == 0

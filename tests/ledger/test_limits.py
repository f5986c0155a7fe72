"""Limits: requests and tokens a minute, asks at once; on one database, whichever server asks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.config import Settings
from nimbos.db import Database
from nimbos.errors import InvalidRequest, Overloaded
from nimbos.ledger import limits as module
from nimbos.ledger import limits_of, set_limit
from nimbos.ledger.rate import MINUTE_NS, take
from nimbos.types import Account, Usage
from tests.ledger.books import ACCOUNT, Books, an_ask

PER_MIN = st.integers(1, 10**6)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 10**18
        monkeypatch.setattr(module, "_now_ns", lambda: self.now_ns)

    def wait_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def books(database: Database) -> Books:
    return Books(database)


async def limit(books: Books, kind: str = "key", owner: str = ACCOUNT.key, model: str = "*", **fields: Any) -> None:
    await books.run(lambda: set_limit(kind, owner, model, **fields))


async def test_a_minutes_worth_may_come_at_once_and_then_they_come_at_the_rate(books: Books, clock: Clock) -> None:
    await limit(books, requests_per_min=3, owner_name="laptop")
    for remaining in (2, 1, 0):
        headers = (await books.reserve()).passed.headers()
        assert headers["x-ratelimit-limit-requests"] == "3"
        assert headers["x-ratelimit-remaining-requests"] == str(remaining)
    with pytest.raises(Overloaded) as refused:
        await books.reserve()
    error = refused.value
    assert (error.limit, error.value, error.used, error.owner) == ("requests", 3, 3, "key 'laptop'")
    assert error.retry_after_s == 20.0
    clock.wait_s(19.9)
    with pytest.raises(Overloaded):
        await books.reserve()
    clock.wait_s(0.1)
    await books.reserve()


async def test_a_burst_of_its_own(books: Books, clock: Clock) -> None:
    await limit(books, requests_per_min=60, requests_burst=1)
    await books.reserve()
    with pytest.raises(Overloaded) as refused:
        await books.reserve()
    assert refused.value.retry_after_s == 1.0
    clock.wait_s(1)
    await books.reserve()


async def test_tokens_are_estimated_at_first_and_corrected_in_the_end(books: Books, clock: Clock) -> None:
    await limit(books, tokens_per_min=600)
    reserved = await books.reserve(an_ask(limit_tokens=1000), prompt=36)  # with a slice of 64: 100
    assert reserved.passed.headers()["x-ratelimit-remaining-tokens"] == "500"
    await books.settle(reserved.ask_id, Usage(input=36, output=264))  # 300 in truth
    reserved = await books.reserve(an_ask(limit_tokens=1), prompt=99)
    assert reserved.passed.headers() == {
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "200",
        "x-ratelimit-reset-tokens": "40.000s",
    }
    await books.settle(reserved.ask_id, Usage())  # it failed before anything was computed: all comes back
    reserved = await books.reserve(an_ask(limit_tokens=1), prompt=99)
    assert reserved.passed.headers()["x-ratelimit-remaining-tokens"] == "200"
    with pytest.raises(Overloaded) as refused:
        await books.reserve(an_ask(limit_tokens=1), prompt=299)
    assert (refused.value.limit, refused.value.used, refused.value.retry_after_s) == ("tokens", 400, 10.0)


async def test_what_is_larger_than_the_bucket_is_let_in_when_it_is_full_and_waits_afterwards(
    books: Books, clock: Clock
) -> None:
    await limit(books, tokens_per_min=60)
    reserved = await books.reserve(an_ask(limit_tokens=1), prompt=119)
    assert reserved.passed.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(Overloaded) as refused:
        await books.reserve(an_ask(limit_tokens=1), prompt=9)
    assert refused.value.retry_after_s == 70.0  # 120 are in use; 10 more than 60 must have gone
    clock.wait_s(70)
    await books.reserve(an_ask(limit_tokens=1), prompt=9)


async def test_asks_at_once_are_those_that_are_open(books: Books) -> None:
    await limit(books, "project", ACCOUNT.id, concurrent=2)
    first, _ = await books.reserve(), await books.reserve()
    with pytest.raises(Overloaded) as refused:
        await books.reserve()
    assert (refused.value.limit, refused.value.value, refused.value.used) == ("concurrent asks", 2, 2)
    await books.settle(first.ask_id, Usage())
    await books.reserve()


async def test_a_limit_for_a_model_counts_that_model_alone(books: Books, clock: Clock) -> None:
    await limit(books, model="other", requests_per_min=0)
    await limit(books, model="demo", requests_per_min=1, concurrent=5)
    await books.reserve()
    with pytest.raises(Overloaded, match="for the model 'demo'"):
        await books.reserve()


async def test_a_model_may_be_limited_for_everybody(books: Books, clock: Clock) -> None:
    await limit(books, "model", "demo", requests_per_min=1)
    await books.reserve()
    with pytest.raises(Overloaded, match="model 'demo'"):
        await books.reserve(account=Account(id="proj_b", name="B"))


async def test_the_tightest_limit_is_the_one_that_is_shown_and_a_refusal_takes_from_none(
    books: Books, clock: Clock
) -> None:
    await limit(books, "organisation", "org_default", requests_per_min=1000)
    await limit(books, "project", ACCOUNT.id, requests_per_min=10)
    await limit(books, "key", ACCOUNT.key, tokens_per_min=100)
    headers = (await books.reserve(an_ask(limit_tokens=1), prompt=99)).passed.headers()
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("10", "9")
    with pytest.raises(Overloaded):
        await books.reserve(an_ask(limit_tokens=1), prompt=99)
    clock.wait_s(60)
    headers = (await books.reserve(an_ask(limit_tokens=1), prompt=99)).passed.headers()
    assert headers["x-ratelimit-remaining-requests"] == "9"


async def test_two_servers_on_one_database_share_limits(database_settings: Settings, clock: Clock) -> None:
    first = await Database.open(database_settings)
    second = await Database.open(database_settings)
    try:
        both = [Books(first, server_id="meter-1"), Books(second, server_id="meter-2")]
        await limit(both[0], requests_per_min=7)
        await limit(both[0], "project", ACCOUNT.id, concurrent=5)
        tried = await asyncio.gather(*(books.reserve() for books in both * 20), return_exceptions=True)
        let_in = [one for one in tried if not isinstance(one, BaseException)]
        refused = [one for one in tried if isinstance(one, Overloaded)]
        assert (len(let_in), len(refused)) == (5, 35)
        for one in let_in:
            await both[1].settle(one.ask_id, Usage())
        tried = await asyncio.gather(*(books.reserve() for books in both * 20), return_exceptions=True)
        assert len([one for one in tried if not isinstance(one, BaseException)]) == 2
    finally:
        await first.close()
        await second.close()


async def test_a_higher_rate_lets_in_sooner_and_a_lower_one_keeps_nobody_out_for_long(
    books: Books, clock: Clock
) -> None:
    await limit(books, tokens_per_min=10)
    await books.reserve(prompt=4_000)  # from a full bucket, which then needs hours
    with pytest.raises(Overloaded) as refused:
        await books.reserve(prompt=1)
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s > 3600
    await limit(books, tokens_per_min=100_000)
    await books.reserve(prompt=60_000)
    await limit(books, tokens_per_min=100)
    with pytest.raises(Overloaded) as refused:
        await books.reserve(prompt=1)
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s <= 60


async def test_a_bucket_of_centuries_stays_a_number_that_databases_hold(books: Books, clock: Clock) -> None:
    await limit(books, tokens_per_min=1, tokens_burst=10**12)
    first = await books.reserve(prompt=10**9)
    with pytest.raises(Overloaded):
        await books.reserve(prompt=10**12)
    await books.settle(first.ask_id, Usage(input=10**9, output=10**9))
    with pytest.raises(Overloaded):
        await books.reserve(prompt=10**12)


async def test_limits_are_set_shown_and_removed(books: Books) -> None:
    await limit(books, requests_per_min=5)
    await limit(books, requests_per_min=6, tokens_per_min=70)
    await limit(books, model="demo", concurrent=1)
    found = await books.run(lambda: limits_of("key", ACCOUNT.key))
    assert [(one.model, one.requests_per_min, one.tokens_per_min, one.concurrent) for one in found] == [
        ("*", 6, 70, None),
        ("demo", None, None, 1),
    ]
    await limit(books)
    assert [one.model for one in await books.run(lambda: limits_of("key", ACCOUNT.key))] == ["demo"]
    for wrong in ({"requests_per_min": -1}, {"tokens_burst": 0, "tokens_per_min": 5}, {"concurrent": 10**13}):
        with pytest.raises(InvalidRequest):
            await limit(books, **wrong)


@given(per_min=PER_MIN, burst=st.integers(1, 10**6), asks=st.lists(st.tuples(st.integers(0, 10**9), PER_MIN)))
def test_the_bucket_never_lets_more_through_than_its_burst_and_its_rate(
    per_min: int, burst: int, asks: list[tuple[int, int]]
) -> None:
    """Against the definition: in no span that begins at a taking does more go through than burst + rate × span (a
    taking larger than the bucket counts as the bucket, and is paid for by what follows)."""
    now = due = 10**18
    taken: list[tuple[int, int]] = []
    for wait_ns, amount in asks:
        now += wait_ns
        result = take(due, now, per_min=per_min, burst=burst, amount=amount)
        if result.due_ns is None:
            assert result.retry_after_s is not None
            assert result.retry_after_s > 0
            later = now + round(result.retry_after_s * 1e9) + 10**6
            assert take(due, later, per_min=per_min, burst=burst, amount=amount).due_ns is not None
            continue
        assert result.due_ns >= due
        due = result.due_ns
        taken.append((now, amount))
        for start in range(len(taken)):
            span_ns = now - taken[start][0]
            through = sum(amount for _, amount in taken[start:-1]) + min(amount, burst)
            first_excess = max(0, taken[start][1] - burst) if start < len(taken) - 1 else 0
            assert (through - first_excess - burst) * MINUTE_NS <= per_min * span_ns + MINUTE_NS

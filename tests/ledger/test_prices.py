"""Money: whole millionths, one rounding for each ask, and a past that no change of prices touches."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.db import Database, Transaction
from nimbos.errors import Conflict, InvalidRequest
from nimbos.ledger import (
    Price,
    PriceTable,
    Settlement,
    current_table,
    prices,
    set_prices,
    spent,
    with_what_is_paid,
)
from nimbos.ledger.prices import Rates, quantities, tokens_of
from nimbos.types import AskClass, Usage
from tests.ledger.books import ACCOUNT, ASKS, CARD, METERS, Books, an_ask, of_class
from tests.ledger.shop import script, shop

PRICE = st.integers(0, 10**9)
TOKENS = st.integers(0, 10**7)
RATES = st.builds(
    Rates,
    input=PRICE,
    cached=PRICE,
    cache_write=PRICE,
    cache_read=PRICE,
    output=PRICE,
    thinking=PRICE,
    pin_tokens=st.one_of(st.just(0), TOKENS),
)
TABLE = [
    Price(meter="input", micros_per_million=1_000_000),
    Price(meter="cached", micros_per_million=200_000),
    Price(meter="output", micros_per_million=4_000_000),
    Price(meter="thinking", micros_per_million=3_000_000),
    Price(meter="input", ask_class="batch", micros_per_million=500_000),
    Price(meter="output", ask_class="batch", micros_per_million=2_000_000),
    Price(model="demo", meter="input", micros_per_million=7_000_000),
]


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    given_input, output = draw(TOKENS), draw(TOKENS)
    return Usage(
        input=given_input,
        cached=draw(st.integers(0, given_input)),
        output=output,
        thinking=draw(st.integers(0, output)),
        recomputed=draw(TOKENS),
    )


@given(RATES, usages())
def test_the_cost_is_the_exact_sum_rounded_once(rates: Rates, usage: Usage) -> None:
    kept = set(range(min(100, rates.pin_tokens))) if usage.input <= 100 else None
    read = min(usage.cached, rates.pin_tokens)
    written = sum(1 for at in kept if usage.cached <= at < usage.input) if kept is not None else None
    found = quantities(usage, rates.pin_tokens)
    assert written is None or found.get("cache_write", 0) == written
    exact = (
        Fraction((usage.input - usage.cached - found.get("cache_write", 0)) * rates.input)
        + Fraction(found.get("cache_write", 0) * rates.cache_write)
        + Fraction((usage.cached - read) * rates.cached)
        + Fraction(read * rates.cache_read)
        + Fraction((usage.output - usage.thinking) * rates.output)
        + Fraction(usage.thinking * rates.thinking)
    ) / 10**6
    assert abs(rates.cost_micros(usage) - exact) <= Fraction(1, 2)
    assert sum(count for meter, count in found.items() if meter != "recomputed") == tokens_of(usage)


@given(RATES, usages(), usages())
def test_what_is_held_always_pays_for_what_comes(rates: Rates, before: Usage, more: Usage) -> None:
    if rates.pin_tokens and before.input:  # what is in memory is counted before anything is computed
        more = msgspec.structs.replace(more, cached=0)
    bound = rates.bound_micros(prompt_tokens=more.input, output_tokens=more.output)
    assert rates.cost_micros(before + more) <= rates.cost_micros(before) + bound


@given(RATES, TOKENS, TOKENS, st.integers(0, 10**12))
def test_as_many_tokens_are_let_through_as_money_pays_for_and_not_one_more(
    rates: Rates, prompt: int, most: int, micros: int
) -> None:
    outputs = rates.outputs_for(micros, prompt_tokens=prompt, most=most)
    if outputs >= 0:
        assert rates.bound_micros(prompt_tokens=prompt, output_tokens=outputs) <= micros
    if outputs < most:
        assert rates.bound_micros(prompt_tokens=prompt, output_tokens=max(0, outputs + 1)) > micros


def test_a_models_own_price_goes_before_everybodys_and_a_class_before_all() -> None:
    table = PriceTable(rows={(one.model, one.meter, one.ask_class): one.micros_per_million for one in TABLE})
    assert table.rates("other", "interactive") == Rates(
        input=1_000_000,
        cached=200_000,
        cache_write=1_000_000,
        cache_read=200_000,
        output=4_000_000,
        thinking=3_000_000,
    )
    batch = table.rates("other", "batch")
    assert (batch.input, batch.cached, batch.output, batch.thinking) == (500_000, 200_000, 2_000_000, 3_000_000)
    assert (batch.cache_write, batch.cache_read) == (500_000, 200_000)
    assert table.rates("demo", "batch").input == 7_000_000


def test_a_kind_without_a_price_of_its_own_costs_what_it_is_a_part_of() -> None:
    table = PriceTable(rows={("*", "input", "*"): 5, ("*", "output", "*"): 9})
    assert table.rates("demo", "interactive") == Rates(
        input=5, cached=5, cache_write=5, cache_read=5, output=9, thinking=9
    )


def test_a_marked_prefix_costs_more_to_take_in_and_less_to_find() -> None:
    """Model Studio's: 125 % of the input price to write, 10 % to read, 20 % for what is found by itself."""
    table = PriceTable(
        rows={
            ("*", meter, "*"): micros
            for meter, micros in (("input", 100), ("cached", 20), ("cache_write", 125), ("cache_read", 10))
        }
    )
    first, later = Usage(input=1_000_000, cached=0), Usage(input=1_000_000, cached=900_000)
    marked, plain = table.rates("m", "interactive", 800_000), table.rates("m", "interactive")
    assert quantities(first, 800_000) == {"input": 200_000, "cache_write": 800_000}
    assert quantities(later, 800_000) == {"input": 100_000, "cached": 100_000, "cache_read": 800_000}
    assert (marked.cost_micros(first), plain.cost_micros(first)) == (120, 100)
    assert (marked.cost_micros(later), plain.cost_micros(later)) == (20, 28)


@pytest.mark.parametrize("before", [20, 50, 70, 100])
async def test_a_marked_prefix_that_is_begun_anew_is_taken_in_once(books: Books, before: int) -> None:
    """An ask that was killed had computed `before` of 100 tokens of prompt, of which 60 are marked. The next one
    pays for the others, and takes in what is left of the 60."""
    first = an_ask(pin_tokens=60)
    await books.reserve(first, prompt=100)
    await books.settle(first.id, Usage(input=before))
    known = await books.run(lambda: spent(first.id))
    assert known is not None and known.usage == Usage(input=before)
    second = with_what_is_paid(an_ask(pin_tokens=60), known.usage)
    await books.reserve(second, prompt=100 - before)
    await books.settle(second.id, Usage(input=100 - before, recomputed=before))
    sums: Counter[str] = Counter()
    for row in await books.rows(METERS):
        sums[row["meter"]] += row["quantity"]
    assert (sums["cache_write"], sums["input"]) == (60, 40)


@pytest.fixture
def books(database: Database) -> Books:
    return Books(database)


async def test_without_prices_everything_costs_nothing(books: Books) -> None:
    assert (await books.ask_and_settle(Usage(input=10**6, output=10**6))).cost_micros == 0


async def test_a_change_of_price_never_touches_the_past_nor_what_runs(books: Books) -> None:
    assert await books.run(lambda: set_prices(TABLE)) == 1
    settled = await books.ask_and_settle(Usage(input=1000, cached=400, output=100, thinking=30, recomputed=50))
    assert settled.cost_micros == 600 * 7 + 400 * 200_000 // 10**6 + 70 * 4 + 30 * 3
    running = await books.reserve()
    assert await books.run(lambda: set_prices([Price(model="demo", meter="input", micros_per_million=9_000_000)])) == 2
    assert (await books.settle(running.ask_id, Usage(input=10))).cost_micros == 70
    assert (await books.ask_and_settle(Usage(input=10))).cost_micros == 90
    rows = await books.rows(ASKS)
    assert [(row["price_version"], row["cost_micros"]) for row in rows] == [
        (1, settled.cost_micros),
        (1, 70),
        (2, 90),
    ]
    per_ask = [row for row in await books.rows(METERS) if row["ask"] == rows[0]["id"]]
    assert {row["meter"]: (row["quantity"], row["micros_per_million"]) for row in per_ask} == {
        "input": (600, 7_000_000),
        "cached": (400, 200_000),
        "output": (70, 4_000_000),
        "thinking": (30, 3_000_000),
        "recomputed": (50, 0),
    }
    exact = sum(row["quantity"] * row["micros_per_million"] for row in per_ask)
    assert settled.cost_micros == (exact + 500_000) // 10**6


async def test_prices_that_were_never_committed_are_not_remembered(database: Database, tmp_path: Path) -> None:
    """The number of their version comes again, with other prices."""
    async with shop(database, tmp_path, says=script(10)) as opened:
        books = opened.books
        await books.budget("key", ACCOUNT.key, limit=10**6)

        def lost() -> Transaction[None]:
            assert (yield from set_prices([Price(meter="output", micros_per_million=9_000_000)])) == 1
            ask = an_ask()
            yield from books.ledger.reserve(ACCOUNT, ask, prompt_tokens=1, card=CARD)
            settlement = Settlement(ask_id=ask.id, usage=Usage(output=1), outcome="done")
            assert (yield from books.ledger.settle(settlement)).cost_micros == 9
            raise Conflict("the commit is lost")

        with pytest.raises(Conflict, match="lost"):
            await database.run(lost)
        assert await books.run(lambda: set_prices([Price(meter="output", micros_per_million=2_000_000)])) == 1
        told = await opened.ask()
        assert (await opened.rows())[told.ask.id]["cost_micros"] == 20


async def test_a_table_of_prices_is_read_once(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    load = prices.load_table

    def noted(version: int) -> Transaction[PriceTable]:
        read.append(version)
        return load(version)

    async with shop(database, tmp_path, says=script(10)) as opened:
        await opened.books.run(lambda: set_prices([Price(meter="output", micros_per_million=2_000_000)]))
        monkeypatch.setattr(prices, "load_table", noted)
        for _ in range(3):
            await opened.ask()
        await opened.books.budget("key", ACCOUNT.key, limit=10**6)
        await opened.ask()
        assert read == [1]


async def test_a_batch_costs_what_its_own_rows_say(books: Books) -> None:
    await books.run(lambda: set_prices([price for price in TABLE if price.model == "*"]))
    usage = Usage(input=1000, output=1000)
    full = await books.ask_and_settle(usage, ask=of_class(AskClass.INTERACTIVE))
    half = await books.ask_and_settle(usage, ask=of_class(AskClass.BATCH))
    assert (full.cost_micros, half.cost_micros) == (5000, 2500)


async def test_a_version_is_whole_and_prices_can_be_taken_out(books: Books) -> None:
    await books.run(lambda: set_prices(TABLE))
    await books.run(lambda: set_prices([], removed=[TABLE[6]]))
    table = await books.run(current_table)
    assert (table.version, len(table.rows)) == (2, 6)
    await books.run(lambda: set_prices([TABLE[0]], replace=True))
    assert (await books.run(current_table)).prices() == [TABLE[0]]


async def test_money_holds_an_answer_as_tokens_do(books: Books) -> None:
    await books.run(lambda: set_prices([Price(meter="output", micros_per_million=2_000_000)]))
    budget = await books.budget("key", "key_a", meter="cost_micros", limit=100)
    reserved = await books.reserve(prompt=1000)  # a prompt that costs nothing
    assert reserved.allowance_tokens == 50
    ended = await books.extend(reserved.ask_id, Usage(input=1000, output=50), allowance=50)
    assert ended.last
    assert (await books.settle(reserved.ask_id, Usage(input=1000, output=50))).cost_micros == 100
    assert ((await books.look(budget)).used, (await books.look(budget)).reserved) == (100, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        Price(meter="coffee", micros_per_million=1),
        Price(meter="input", ask_class="first", micros_per_million=1),
        Price(meter="input", micros_per_million=-1),
        Price(meter="input", micros_per_million=10**13),
        Price(meter="input", model="", micros_per_million=1),
    ],
)
async def test_a_price_that_cannot_be_is_refused(books: Books, wrong: Price) -> None:
    with pytest.raises(InvalidRequest):
        await books.run(lambda: set_prices([TABLE[0], wrong]))
    assert (await books.run(current_table)).rows == {}

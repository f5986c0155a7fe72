"""What every part relies on, on both databases."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from nimbos.db import Database, Row, Transaction
from nimbos.errors import Conflict, InvalidRequest, StorageUnavailable
from tests.db.tables import ADD, ADD_ONCE, ALL, FIRST, ONE, REMOVE, SET, SUM, count, everything

pytestmark = pytest.mark.usefixtures("both_ways")


async def test_a_transaction_returns_what_its_generator_returns(things: Database) -> None:
    assert await things.run(lambda: count("a", 2)) == 2
    assert await things.run(lambda: count("a", 3), durable=True) == 5
    assert await everything(things) == {"a": 5}


async def test_transactions_compose(things: Database) -> None:
    def both() -> Transaction[tuple[int, int]]:
        first = yield from count("a", 1)
        second = yield from count("b", first + 1)
        return first, second

    assert await things.run(both) == (1, 2)


async def test_rows_come_back_by_name_and_in_order(things: Database) -> None:
    def fill() -> Transaction[list[Row]]:
        yield ADD(id="b", n=2, content=b"\x00\xff")
        yield ADD(id="a", n=-(2**63), content=None)
        yield ADD(id="_", n=2**63 - 1, content=b"")
        return (yield ONE(name="b"))

    (row,) = await things.run(fill)
    assert (row["id"], row["n"], row["content"], tuple(row.keys())) == ("b", 2, b"\x00\xff", ("id", "n", "content"))
    found = await things.read(ALL())
    assert [tuple(row) for row in found] == [("_", 2**63 - 1), ("a", -(2**63)), ("b", 2)]  # by bytes, on both


async def test_changes_say_what_they_changed(things: Database) -> None:
    def change() -> Transaction[tuple[list[Row], list[Row], list[Row]]]:
        yield ADD(id="a", n=1, content=None)
        return (yield SET(name="a", to=7)), (yield SET(name="none", to=7)), (yield REMOVE(name="a"))

    changed, unchanged, removed = await things.run(change)
    assert [tuple(row) for row in changed] == [("a", 7)]
    assert (unchanged, removed) == ([], [])


async def test_a_sum_is_an_integer(things: Database) -> None:
    await things.run(lambda: count("a", 2**62))
    await things.run(lambda: count("b", 2))
    (row,) = await things.read(SUM())
    assert (row["sum"], row["count"]) == (2**62 + 2, 2)
    assert type(row["sum"]) is int


async def test_a_limit_is_a_parameter(things: Database) -> None:
    for name in "abc":
        await things.run(lambda name=name: count(name))  # type: ignore[misc]
    assert [row["id"] for row in await things.read(FIRST(count=2))] == ["a", "b"]


async def test_an_exception_undoes_its_own_transaction_and_no_other(things: Database) -> None:
    def wrong() -> Transaction[int]:
        yield from count("a", 100)
        yield ADD(id="wrong", n=1, content=None)
        raise LookupError("wrong")

    runs = [things.run(lambda name=name: count(name)) for name in "abc"]  # type: ignore[misc]
    outcomes = await asyncio.gather(*runs[:2], things.run(wrong), runs[2], return_exceptions=True)
    assert outcomes[:2] == [1, 1]
    assert isinstance(outcomes[2], LookupError)
    assert await everything(things) == {"a": 1, "b": 1, "c": 1}


async def test_what_a_unique_key_forbids_is_a_conflict_and_leaves_nothing(things: Database) -> None:
    def twice() -> Transaction[None]:
        yield ADD(id="new", n=1, content=None)
        yield ADD(id="a", n=1, content=None)

    await things.run(lambda: count("a"))
    with pytest.raises(Conflict):
        await things.run(twice)
    assert await everything(things) == {"a": 1}


async def test_insert_ignored_leaves_what_is_there(things: Database) -> None:
    def again() -> Transaction[None]:
        yield ADD_ONCE(id="a", n=5, content=None)
        yield ADD_ONCE(id="b", n=5, content=None)

    await things.run(lambda: count("a"))
    await things.run(again)
    assert await everything(things) == {"a": 1, "b": 5}


@pytest.mark.parametrize(("name", "number"), [("half \ud800", 1), ("a", 2**63), ("a", -(2**63) - 1)])
async def test_what_cannot_be_stored_is_the_callers_error(things: Database, name: str, number: int) -> None:
    def odd() -> Transaction[None]:
        yield ADD(id="before", n=1, content=None)
        yield ADD(id=name, n=number, content=None)

    with pytest.raises(InvalidRequest):
        await things.run(odd)
    assert await everything(things) == {}


async def test_a_value_that_is_missing_or_unknown_is_named(things: Database) -> None:
    with pytest.raises(TypeError, match="content, n, x"):
        await things.read(ADD(id="a", x=3))
    with pytest.raises(TypeError, match="content, n, x"):
        await things.run(lambda: iter_once(ADD(id="a", x=3)))  # type: ignore[arg-type]


def iter_once(bound: object) -> Iterator[object]:
    yield bound


async def test_a_stream_brings_all_rows_as_they_were_at_its_start(things: Database) -> None:
    def fill() -> Transaction[None]:
        for number in range(25):
            yield ADD(id=f"{number:02}", n=number, content=None)

    await things.run(fill)
    seen = []
    async for row in things.stream(ALL(), batch=10):
        if not seen:
            await things.run(lambda: count("99"))
        seen.append(row["n"])
    assert seen == list(range(25))


async def test_a_stream_may_be_left_and_many_may_be_open(things: Database) -> None:
    def fill() -> Transaction[None]:
        for number in range(200):
            yield ADD(id=f"{number:03}", n=number, content=None)

    await things.run(fill)

    async def some() -> int:
        async with aclosing(things.stream(ALL(), batch=5)) as rows:  # type: ignore[type-var]
            total = 0
            async for row in rows:
                total += 1
                if row["n"] == 20:
                    break
            return total

    assert await asyncio.gather(*(some() for _ in range(12))) == [21] * 12
    assert await things.run(lambda: count("x")) == 1


async def test_a_cancelled_caller_leaves_a_whole_transaction_or_none(things: Database) -> None:
    def pair(name: str) -> Transaction[None]:
        yield from count(f"{name}-1")
        yield from count(f"{name}-2")

    for number in range(30):
        names = [f"{number:02}-{letter}" for letter in "abcd"]
        tasks = [asyncio.create_task(things.run(lambda name=name: pair(name))) for name in names]  # type: ignore[misc]
        for _ in range(number % 5):
            await asyncio.sleep(0)
        tasks[1].cancel()
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert await things.run(lambda: count("end")) == 1
    names = [name.rpartition("-")[0] for name in await everything(things)][:-1]
    assert {names.count(name) for name in names} == {2}
    assert len(set(names)) >= 60


async def test_many_at_once_lose_no_count(things: Database) -> None:
    def transfer(start: str, end: str) -> Transaction[None]:
        for name, by in sorted([(start, -1), (end, 1)]):
            yield from count(name, by)

    moves = [("a", "b"), ("b", "c"), ("c", "a"), ("b", "a")]
    await asyncio.gather(*(things.run(lambda move=move: transfer(*move)) for move in moves * 50))  # type: ignore[misc]
    assert await everything(things) == {"a": 50, "b": -50, "c": 0}


async def test_a_deadlock_is_tried_again(things: Database) -> None:
    begun = 0

    def transfer(start: str, end: str) -> Transaction[None]:
        nonlocal begun
        begun += 1
        yield from count(start, -1)
        yield from count(end, 1)

    rounds = 0
    while rounds < 20 and begun == 2 * rounds:  # until one had to be tried again
        rounds += 1
        await asyncio.gather(things.run(lambda: transfer("a", "b")), things.run(lambda: transfer("b", "a")))
    assert await everything(things) == {"a": 0, "b": 0}
    assert (begun > 2 * rounds) == (things.dialect == "postgresql")


async def test_closing_finishes_what_was_started(things: Database) -> None:
    runs = [asyncio.create_task(things.run(lambda: count("a"))) for _ in range(20)]
    await asyncio.sleep(0)
    await things.close()
    assert sorted(await asyncio.gather(*runs)) == list(range(1, 21))
    for call in (things.run(lambda: count("a")), things.read(ALL())):
        with pytest.raises(StorageUnavailable, match="closed"):
            await call

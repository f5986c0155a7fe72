"""What every part relies on, on both databases."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import BigInteger, Column, Table, Text, bindparam, select

from nimbos.db import Database, Row, Statement, Transaction, insert, insert_ignored, upsert
from nimbos.db.tables.metadata import metadata

things = Table(
    "test_things",
    metadata,
    Column("id", Text, primary_key=True),
    Column("n", BigInteger, nullable=False),
    extend_existing=True,
)
ADD = insert(things)
ADD_ONCE = insert_ignored(things, key=("id",))
COUNT = upsert(things, key=("id",), add=("n",))
ALL = Statement(select(things).order_by(things.c.id))
ONE = Statement(select(things).where(things.c.id == bindparam("id")))


def count(name: str, by: int) -> Transaction[int]:
    yield COUNT(id=name, n=by)
    rows = yield ONE(id=name)
    return int(rows[0]["n"])


async def everything(database: Database) -> dict[str, int]:
    return {row["id"]: row["n"] for row in await database.read(ALL())}


async def test_a_transaction_returns_what_its_generator_returns(database: Database) -> None:
    assert await database.run(lambda: count("a", 2)) == 2
    assert await database.run(lambda: count("a", 3), durable=True) == 5
    assert await everything(database) == {"a": 5}


async def test_an_exception_undoes_its_own_transaction_and_no_other(database: Database) -> None:
    def wrong() -> Transaction[int]:
        yield ADD(id="wrong", n=1)
        raise LookupError("wrong")

    runs = [database.run(lambda name=name: count(name, 1)) for name in "abc"]  # type: ignore[misc]
    outcomes = await asyncio.gather(*runs[:2], database.run(wrong), runs[2], return_exceptions=True)
    assert isinstance(outcomes[2], LookupError)
    assert await everything(database) == {"a": 1, "b": 1, "c": 1}


async def test_a_stream_brings_all_rows(database: Database) -> None:
    def fill() -> Transaction[None]:
        for number in range(25):
            yield ADD_ONCE(id=f"{number:02}", n=number)

    await database.run(fill)
    rows: list[Row] = [row async for row in database.stream(ALL(), batch=10)]
    assert [row["n"] for row in rows] == list(range(25))
    assert set(rows[0].keys()) == {"id", "n"}


async def test_a_value_that_is_missing_or_unknown_is_named(database: Database) -> None:
    with pytest.raises(TypeError, match="n, x"):
        await database.read(ADD(id="a", x=3))

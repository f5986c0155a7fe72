"""Statements: compiled once for each database, with values by name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from sqlalchemy import BigInteger, bindparam, literal, select, text

from nimbos import config
from nimbos.db import Database, Dialect, ManyRows, Statement, Transaction, Value
from nimbos.errors import Conflict
from tests.db import tables
from tests.db.tables import ADD, COUNT, FIRST, count


@pytest.mark.parametrize("dialect", get_args(Dialect))
def test_a_statement_is_built_once_for_each_database(dialect: Dialect) -> None:
    built: list[Dialect] = []

    def build(dialect: Dialect) -> object:
        built.append(dialect)
        return select(tables.things.c.n).where(tables.things.c.id == bindparam("name"))

    statement = Statement(build)  # type: ignore[arg-type]
    assert built == []
    first, second = statement(name="a").prepared(dialect), statement(name="b").prepared(dialect)
    assert built == [dialect]
    assert first[0] is second[0]
    assert (first[1], second[1]) == (("a",), ("b",))


@pytest.mark.parametrize("dialect", get_args(Dialect))
def test_values_stand_in_the_order_of_their_marks(dialect: Dialect) -> None:
    written, values = ADD(content=b"c", n=1, id="a").prepared(dialect)
    assert values == ("a", 1, b"c")
    assert written.startswith("INSERT INTO test_things (id, n, content) VALUES")
    assert FIRST(count=3).prepared(dialect)[1][0] == 3


def test_integers_are_wide_on_postgresql() -> None:
    assert "$2::BIGINT" in COUNT(id="a", n=1, content=None).prepared("postgresql")[0]


async def test_values_that_the_statement_brings_may_be_given_anew(things: Database) -> None:
    statement = Statement(
        select(literal("x").label("x"), bindparam("y", 5, type_=BigInteger).label("y")).where(
            bindparam("z", type_=BigInteger) == 1
        )
    )
    assert [tuple(row) for row in await things.read(statement(z=1))] == [("x", 5)]
    assert [tuple(row) for row in await things.read(statement(z=1, y=7))] == [("x", 7)]
    with pytest.raises(TypeError, match="z"):
        await things.read(statement(y=7))


async def test_a_list_of_literals_is_a_list_of_parameters(things: Database) -> None:
    listed = Statement(text("SELECT id FROM test_things WHERE id IN ('a', 'b') ORDER BY id"))
    column = tables.things.c.id
    names = Statement(select(column).where(column.in_(["a", "b", "'"])).order_by(column))

    def fill() -> Transaction[None]:
        for name in "abc'":
            yield from count(name)

    await things.run(fill)
    assert [row["id"] for row in await things.read(listed())] == ["a", "b"]
    assert [row["id"] for row in await things.read(names())] == ["'", "a", "b"]


def test_the_environment_names_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.toml").write_text('[storage]\ndatabase_url = "postgresql://file/x"\nblobs = "database"\n')
    monkeypatch.delenv("NIMBOS_DATABASE_URL", raising=False)
    assert config.load(tmp_path).storage.database_url == "postgresql://file/x"
    monkeypatch.setenv("NIMBOS_DATABASE_URL", "postgresql://environment/x")
    loaded = config.load(tmp_path).storage
    assert (loaded.database_url, loaded.blobs) == ("postgresql://environment/x", "database")


async def test_many_rows_are_written_by_one_statement_and_added_to_what_is_there(things: Database) -> None:
    count_all = ManyRows(tables.things, key=("id",), add=("n",))

    def rows(*named: tuple[str, int]) -> list[dict[str, Value]]:
        return [{"id": name, "n": n, "content": None} for name, n in named]

    def write() -> Transaction[int]:
        statements = (rows(("a", 1)), rows(("a", 2), ("b", 10), ("c", 100)), rows(("c", 5), ("b", 1), ("d", 7)))
        for some in statements:
            yield count_all(some)
        return len(statements)

    assert await things.run(write) == 3
    assert [tuple(row) for row in await things.read(tables.ALL())] == [("a", 3), ("b", 11), ("c", 105), ("d", 7)]


async def test_many_rows_without_a_key_refuse_one_that_is_there(things: Database) -> None:
    add_all = ManyRows(tables.things)

    def write(*names: str) -> Transaction[None]:
        yield add_all([{"id": name, "n": 1, "content": b"x"} for name in names])

    await things.run(lambda: write("a", "b"))
    with pytest.raises(Conflict):
        await things.run(lambda: write("c", "a"))
    assert [tuple(row) for row in await things.read(tables.ALL())] == [("a", 1), ("b", 1)]

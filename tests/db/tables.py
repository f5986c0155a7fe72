"""A table of the tests' own, which is in no schema: `make` is the transaction that makes it."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    LargeBinary,
    MetaData,
    Table,
    Text,
    bindparam,
    delete,
    func,
    select,
    text,
    update,
)

from nimbos.db import Database, Statement, Transaction, insert, insert_ignored, upsert

things = Table(
    "test_things",
    MetaData(),
    Column("id", Text, primary_key=True),
    Column("n", BigInteger, nullable=False),
    Column("content", LargeBinary),
)

ADD = insert(things)
ADD_ONCE = insert_ignored(things, key=("id",))
COUNT = upsert(things, key=("id",), add=("n",), set=("content",))
SET = Statement(
    update(things).where(things.c.id == bindparam("name")).values(n=bindparam("to")).returning(things.c.id, things.c.n)
)
REMOVE = Statement(delete(things).where(things.c.id == bindparam("name")))
ALL = Statement(select(things.c.id, things.c.n).order_by(things.c.id))
FIRST = Statement(select(things.c.id).order_by(things.c.id).limit(bindparam("count")))
ONE = Statement(select(things).where(things.c.id == bindparam("name")).with_for_update())
SUM = Statement(select(func.sum(things.c.n).label("sum"), func.count().label("count")))

_MAKE = {
    "sqlite": "CREATE TABLE test_things (id TEXT PRIMARY KEY, n BIGINT NOT NULL, content BLOB)",
    "postgresql": 'CREATE TABLE test_things (id TEXT COLLATE "C" PRIMARY KEY, n BIGINT NOT NULL, content BYTEA)',
}


MAKE_ONCE = Statement(lambda dialect: text(_MAKE[dialect].replace("TABLE", "TABLE IF NOT EXISTS", 1)))
EMPTY = Statement(delete(things))


def make() -> Transaction[None]:
    yield Statement(lambda dialect: text(_MAKE[dialect]))()


def count(name: str, by: int = 1) -> Transaction[int]:
    """Adds `by` to what `name` has, and returns the sum."""
    yield COUNT(id=name, n=by, content=None)
    rows = yield ONE(name=name)
    return int(rows[0]["n"])


async def everything(database: Database) -> dict[str, int]:
    return {row["id"]: row["n"] for row in await database.read(ALL())}

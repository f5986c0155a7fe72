"""Random transactions against a dictionary: on both databases they do the same, and end the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database, Statement, Transaction
from tests.databases import postgres_server
from tests.db.tables import ADD_ONCE, EMPTY, MAKE_ONCE, ONE, REMOVE, SET, count, everything

NAMES = st.sampled_from(["a", "b", "c", "ä", "'\"; --", ""])
NUMBERS = st.integers(min_value=-(2**31), max_value=2**31)

pytestmark = pytest.mark.usefixtures("both_ways")


@dataclass(frozen=True)
class Step:
    verb: str
    name: str
    number: int


@dataclass(frozen=True)
class Work:
    """One transaction; with `fails` it raises at its end."""

    steps: tuple[Step, ...]
    fails: bool
    durable: bool


STEPS = st.builds(Step, st.sampled_from(["count", "once", "set", "remove", "get"]), NAMES, NUMBERS)
WORKS = st.builds(Work, st.lists(STEPS, max_size=6).map(tuple), st.booleans(), st.booleans())


class Failed(Exception):
    pass


def perform(work: Work) -> Transaction[list[int | None]]:
    seen: list[int | None] = []
    for step in work.steps:
        if step.verb == "count":
            seen.append((yield from count(step.name, step.number)))
        elif step.verb == "once":
            yield ADD_ONCE(id=step.name, n=step.number, content=None)
        elif step.verb == "set":
            rows = yield SET(name=step.name, to=step.number)
            seen.append(rows[0]["n"] if rows else None)
        elif step.verb == "remove":
            yield REMOVE(name=step.name)
        else:
            rows = yield ONE(name=step.name)
            seen.append(rows[0]["n"] if rows else None)
    if work.fails:
        raise Failed
    return seen


def imagine(work: Work, table: dict[str, int]) -> list[int | None]:
    """What `perform` does, to a dictionary."""
    seen: list[int | None] = []
    for step in work.steps:
        if step.verb == "count":
            table[step.name] = table.get(step.name, 0) + step.number
            seen.append(table[step.name])
        elif step.verb == "once":
            table.setdefault(step.name, step.number)
        elif step.verb == "set":
            if step.name in table:
                table[step.name] = step.number
            seen.append(table.get(step.name))
        elif step.verb == "remove":
            table.pop(step.name, None)
        else:
            seen.append(table.get(step.name))
    return seen


async def check(database: Database, works: list[Work]) -> None:
    table: dict[str, int] = {}
    for work in works:
        changed = dict(table)
        expected = imagine(work, changed)
        if work.fails:
            with pytest.raises(Failed):
                await database.run(lambda work=work: perform(work), durable=work.durable)  # type: ignore[misc]
        else:
            table = changed
            assert await database.run(lambda work=work: perform(work)) == expected  # type: ignore[misc]
        assert await everything(database) == table


async def check_sums(database: Database, works: list[Work]) -> None:
    """All at once, in an order that nobody knows: sums do not depend on it."""

    def add(work: Work) -> Transaction[None]:
        for step in sorted(work.steps, key=lambda step: step.name):
            yield from count(step.name, step.number)
        if work.fails:
            raise Failed

    outcomes = await asyncio.gather(
        *(database.run(lambda work=work: add(work), durable=work.durable) for work in works),  # type: ignore[misc]
        return_exceptions=True,
    )
    table: dict[str, int] = {}
    for work, outcome in zip(works, outcomes, strict=True):
        assert isinstance(outcome, Failed) if work.fails else outcome is None
        for step in () if work.fails else work.steps:
            table[step.name] = table.get(step.name, 0) + step.number
    assert await everything(database) == table


def _with_database(kind: str, home: Path, body: Callable[[Database], Awaitable[None]]) -> None:
    """Runs `body` on the test's one database, whose table is empty."""
    url = _url(str(home)) if kind == "postgresql" else ""

    async def run() -> None:
        database = await Database.open(Settings(home=str(home), storage=StorageSettings(database_url=url)))
        try:
            await database.run(lambda: again(MAKE_ONCE, EMPTY))
            await body(database)
        finally:
            await database.close()

    asyncio.run(run())


@cache
def _url(home: str) -> str:
    return postgres_server().with_tables()


def again(*statements: Statement) -> Transaction[None]:
    for statement in statements:
        yield statement()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(works=st.lists(WORKS, max_size=8))
def test_random_transactions_do_what_a_dictionary_does(kind: str, tmp_path: Path, works: list[Work]) -> None:
    _with_database(kind, tmp_path, lambda database: check(database, works))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(works=st.lists(WORKS, max_size=20))
def test_random_transactions_at_once_lose_nothing(kind: str, tmp_path: Path, works: list[Work]) -> None:
    _with_database(kind, tmp_path, lambda database: check_sums(database, works))

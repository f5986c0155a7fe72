"""What was used, told by anything, against the asks themselves; exports; time lines."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import random
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nimbos.db import Bound, Database
from nimbos.errors import InvalidRequest
from nimbos.ledger import Price, Recovery, Span, Used, export_asks, rollups, set_prices, usage, usage_buckets
from nimbos.ledger import ledger as module
from nimbos.ledger.periods import DAY_MS, HOUR_MS
from nimbos.ledger.reports import FILTER_VALUES_MAX
from nimbos.ledger.rollups import fold
from nimbos.ledger.sums import Part, Source, sums
from nimbos.types import Account, AskClass, Usage
from tests.databases import sqlite_template
from tests.ledger.books import ASKS, DAYS, HOURS, METERS, MONTHS, Books, an_ask
from tests.live import PATIENCE_S

BEGIN_MS = int(datetime(2026, 3, 30, 21, 30, tzinfo=UTC).timestamp() * 1000)
MODELS = ("demo",)
KEYS = tuple(
    Account(id=f"proj_{number % 2}", name="", key=f"key_{number}", key_name="", user="u") for number in range(3)
)


@pytest.fixture
async def history(database: Database, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Sixty asks over two days and a half, half an hour apart, as (account, class, process, ended, usage)."""
    books, rng = Books(database), random.Random(7)
    await books.run(lambda: set_prices([Price(meter="input", micros_per_million=3_500_000)]))
    now_ms = BEGIN_MS
    monkeypatch.setattr(module, "_now_ms", lambda: now_ms)
    made = []
    for _ in range(60):
        account, ask_class = rng.choice(KEYS), rng.choice(list(AskClass))
        process = rng.choice(["", "proc_1"])
        given, output = rng.randrange(1, 100), rng.randrange(100)
        used = Usage(input=given, cached=rng.randrange(given), output=output, thinking=output // 3, recomputed=2)
        reserved = await books.reserve(an_ask(ask_class=ask_class), account=account, process=process)
        settled = await books.settle(reserved.ask_id, used)
        made.append(
            {
                "key": account.key,
                "project": account.id,
                "class": ask_class.value,
                "process": process,
                "model": "demo",
                "day": datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%Y-%m-%d"),
                "at_ms": now_ms,
                "usage": used,
                "cost": settled.cost_micros,
            }
        )
        now_ms += HOUR_MS
    return made


def expected(history: list[dict[str, Any]], by: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in history:
        body = found.setdefault(
            one[by],
            dict.fromkeys(
                ("asks", "input_tokens", "cached_tokens", "output_tokens", "thinking_tokens", "cost_micros"), 0
            ),
        )
        body["asks"] += 1
        body["input_tokens"] += one["usage"].input
        body["cached_tokens"] += one["usage"].cached
        body["output_tokens"] += one["usage"].output
        body["thinking_tokens"] += one["usage"].thinking
        body["cost_micros"] += one["cost"]
    return found


SPANS = [(None, None), (0, 5), (3, 30), (None, 40), (20, None), (2.5, 26.5), (26, 28), (59, 60)]


async def test_usage_is_what_the_asks_say(database: Database, history: list[dict[str, Any]]) -> None:
    """Spans begin and end in the middle of a day or not; they are widened to whole hours."""
    for by in ("key", "model", "project", "day", "class", "process"):
        for since, until in SPANS:
            since_ms = None if since is None else BEGIN_MS + int(since * HOUR_MS)
            until_ms = None if until is None else BEGIN_MS + int(until * HOUR_MS)
            first = -1 if since_ms is None else since_ms - since_ms % HOUR_MS
            last = 2**62 if until_ms is None else -(-until_ms // HOUR_MS) * HOUR_MS
            inside = [one for one in history if first <= one["at_ms"] < last]
            report = (await usage(database, by=by, span=Span(since_ms=since_ms, until_ms=until_ms))).body()
            wanted = expected(inside, by)
            assert {row.pop(by): row for row in report["rows"]} == wanted, (by, since, until)
            for name, total in report["total"].items():
                assert total == sum(body[name] for body in wanted.values())


async def test_usage_may_be_filtered(database: Database, history: list[dict[str, Any]]) -> None:
    span = Span(filters={"key": ["key_0", "key_2"], "class": ["batch"]})
    report = (await usage(database, by="project", span=span)).body()
    wanted = expected([one for one in history if one["key"] != "key_1" and one["class"] == "batch"], "project")
    assert {row.pop("project"): row for row in report["rows"]} == wanted


FILTERS = (
    {"project": ["proj_1"]},
    {"project": ["proj_0", "proj_1"], "key": ["key_0", "key_2"]},
    {"project": ["proj_9"]},
    {"process": ["proc_1"]},
    {"process": ["proc_1", "proc_2"], "project": ["proj_0"], "class": ["batch", "agent"]},
    {"process": ["", "proc_1"], "key": ["key_1"]},
)


async def test_what_one_project_or_process_used_is_what_its_asks_say(
    database: Database, history: list[dict[str, Any]]
) -> None:
    """These are looked up and not filtered out: moment by moment, or among the asks."""
    for filters in FILTERS:
        for since, until in SPANS[:4]:
            since_ms = None if since is None else BEGIN_MS + int(since * HOUR_MS)
            until_ms = None if until is None else BEGIN_MS + int(until * HOUR_MS)
            first = -1 if since_ms is None else since_ms - since_ms % HOUR_MS
            last = 2**62 if until_ms is None else -(-until_ms // HOUR_MS) * HOUR_MS
            inside = [one for one in history if first <= one["at_ms"] < last]
            inside = [one for one in inside if all(one[name] in wanted for name, wanted in filters.items())]
            span = Span(since_ms=since_ms, until_ms=until_ms, filters=filters)
            for by in ("model", "day"):
                report = (await usage(database, by=by, span=span)).body()
                assert {row.pop(by): row for row in report["rows"]} == expected(inside, by), (filters, since, until)


async def test_days_and_months_are_added_up_when_nobody_reads(
    database: Database, history: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollups, "FOLD_S", 0.01)
    books = Books(database)
    recovery = Recovery(database=database, ledger=books.ledger, run_dir=tmp_path)
    recovery.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while sum(row["quantity"] for row in await books.rows(MONTHS) if row["meter"] == "asks") < len(history):
                await asyncio.sleep(0.01)
    finally:
        await recovery.close()


async def test_pages_of_a_report_are_the_report(database: Database, history: list[dict[str, Any]]) -> None:
    for by in ("process", "key", "day"):
        whole = await usage(database, by=by)
        assert whole.next_page is None
        assert not whole.body()["has_more"]
        for limit in (1, len(whole.rows) - 1, len(whole.rows)):
            for page in range(0, len(whole.rows), limit):
                report = await usage(database, by=by, limit=limit, page=page)
                assert report.total == whole.total
                assert report.rows == whole.rows[page : page + limit]
                assert report.next_page == (page + limit if page + limit < len(whole.rows) else None)
    beyond = await usage(database, by="process", page=10)
    assert (beyond.rows, beyond.total, beyond.next_page) == ([], whole.total, None)


def plan_of(source: Source, **filters: list[str]) -> list[str]:
    part = Part(source=source, since_ms=0, until_ms=2**62)
    return explained(sums([part], groups=("model",), filters=filters, limit=1))


def explained(asked: Bound) -> list[str]:
    text, values = asked.prepared("sqlite")
    with closing(sqlite3.connect(sqlite_template())) as connection:
        return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", values)]


def test_hours_that_the_days_have_are_not_read_again() -> None:
    first = next(fold())
    assert "SCAN usage_hours USING INDEX ix_usage_hours_unfolded" in explained(first)


def test_what_others_used_is_not_read() -> None:
    for source in ("hours", "days", "months"):
        found = f"SEARCH usage_{source} USING PRIMARY KEY ({source.removesuffix('s')}_ms=? AND project=?"
        assert f"{found})" in plan_of(source, project=["a", "b"])
        assert f"{found} AND key=?)" in plan_of(source, project=["a"], key=["b", "c"])
    plan = plan_of("asks", process=["a", "b"], project=["c"])
    assert plan.count("SEARCH asks USING INDEX ix_asks_process (process=?)") == 2
    assert not [step for step in plan if "ix_asks_ended" in step or step.startswith("SCAN asks")]


WIDTHS: list[tuple[Any, int]] = [("1m", 60_000), ("1h", HOUR_MS), ("1d", DAY_MS)]


async def test_buckets_of_a_time_line(database: Database, history: list[dict[str, Any]]) -> None:
    span = Span(since_ms=BEGIN_MS + 2 * HOUR_MS, until_ms=BEGIN_MS + 40 * HOUR_MS)
    for width, width_ms in WIDTHS:
        rows = await usage_buckets(database, width=width, span=span, group_by=("model", "key"))
        first = (BEGIN_MS + 2 * HOUR_MS) // width_ms * width_ms
        last = -(-(BEGIN_MS + 40 * HOUR_MS) // width_ms) * width_ms
        wanted: dict[tuple[Any, ...], list[int]] = {}
        for one in history:
            if first <= one["at_ms"] < last:
                sums = wanted.setdefault((one["at_ms"] // width_ms * width_ms, "demo", one["key"]), [0, 0, 0, 0])
                for place, amount in enumerate((1, one["usage"].input, one["usage"].output, one["cost"])):
                    sums[place] += amount
        found = {(row.start_ms, *row.group): _four(row.used) for row in rows}
        assert found == wanted, width
        assert [row.start_ms for row in rows] == sorted(row.start_ms for row in rows)


def _four(used: Used) -> list[int]:
    return [used.asks, used.input_tokens, used.output_tokens, used.cost_micros]


async def test_the_sums_are_the_meters_and_the_meters_are_the_asks(
    database: Database, history: list[dict[str, Any]]
) -> None:
    books = Books(database)
    meters = await books.rows(METERS)
    await usage(database)
    for table in (HOURS, DAYS, MONTHS):
        sums: dict[str, int] = {}
        for row in await books.rows(table):
            sums[row["meter"]] = sums.get(row["meter"], 0) + row["quantity"]
        assert sums.pop("asks") == len(history)
        for meter, total in sums.items():
            assert total == sum(row["quantity"] for row in meters if row["meter"] == meter)
        cost = sum(row["cost_micros"] for row in await books.rows(table))
        assert cost == sum(row["cost_micros"] for row in await books.rows(ASKS)) == sum(one["cost"] for one in history)


async def test_an_export_has_every_ask_once(database: Database, history: list[dict[str, Any]]) -> None:
    lines = [json.loads(line) async for line in export_asks(database, "json")]
    rows = list(csv.DictReader(io.StringIO(b"".join([line async for line in export_asks(database, "csv")]).decode())))
    assert len(lines) == len(rows) == len(history)
    assert rows == [{name: str(value) for name, value in line.items()} for line in lines]
    for line, one in zip(lines, history, strict=True):
        assert line["input_tokens"] + line["cached_tokens"] == one["usage"].input
        assert line["output_tokens"] + line["thinking_tokens"] == one["usage"].output
        assert (line["recomputed_tokens"], line["cost_micros"]) == (2, one["cost"])
        assert (line["outcome"], line["route"], line["ended_ms"]) == ("done", "/v1/chat/completions", one["at_ms"])
    part = [line async for line in export_asks(database, "json", since_ms=BEGIN_MS + HOUR_MS, until_ms=BEGIN_MS * 2)]
    assert len(part) == len(history) - 1


async def test_a_table_runs_no_formula(database: Database) -> None:
    books = Books(database)
    await books.ask_and_settle(Usage(input=1), account=Account(id="=1+1", name="", key="@key", key_name="", user="-u"))
    rows = list(csv.DictReader(io.StringIO(b"".join([line async for line in export_asks(database, "csv")]).decode())))
    assert (rows[0]["project"], rows[0]["key"], rows[0]["user"]) == ("'=1+1", "'@key", "'-u")


async def test_a_filter_of_too_many_values_is_refused_and_not_cut(
    database: Database, history: list[dict[str, Any]]
) -> None:
    keys = sorted({ask["key"] for ask in history})
    wanted = [f"key_of_nobody_{number}" for number in range(FILTER_VALUES_MAX)]
    with pytest.raises(InvalidRequest, match="at most"):
        await usage(database, span=Span(filters={"key": [*wanted, *keys]}))
    found = await usage(database, span=Span(filters={"key": keys * FILTER_VALUES_MAX}))
    assert found.total == (await usage(database)).total


async def test_what_cannot_be_told_is_refused(database: Database) -> None:
    with pytest.raises(InvalidRequest):
        await usage(database, by="mood")
    with pytest.raises(InvalidRequest):
        await usage(database, span=Span(filters={"mood": ["good"]}))
    with pytest.raises(InvalidRequest):
        await usage_buckets(database, width="1m", span=Span(since_ms=0))
    with pytest.raises(InvalidRequest):
        await usage_buckets(database, width="1h", span=Span(), group_by=("mood",))

"""How long do reports take, and how long a start, with a ledger of ten million rows?

Fills an empty database (SQLite, or the PostgreSQL of --database-url) with made-up asks over a year, adds up their hours
and days as settlements would have, and then asks what the commands ask: `python -m bench.usage_queries --out FILE`.
A ledger row is a row of `asks` or of `meters`: four for each ask.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database
from nimbos.db.tables.ledger import asks, meters
from nimbos.ledger import Ledger, Settlement, Span, export_asks, usage, usage_buckets
from nimbos.types import Account, Ask, ModelCard, Usage, new_id

DAY_MS, HOUR_MS = 86_400_000, 3_600_000
KEYS, PROJECTS, MODELS, CLASSES = 60, 12, 6, ("interactive", "interactive", "agent", "batch")
ROWS_PER_ASK = 4
BATCH = 20_000
ASK_COLUMNS = tuple(column.name for column in asks.columns)
METER_COLUMNS = tuple(column.name for column in meters.columns)
_DIMENSIONS = 'project, key, model, "class", process'
CARD = ModelCard(id="model-0", model_hash="0" * 64, architecture="scripted", context_tokens=4096)
Asked = Callable[[], Awaitable[Any]]


def made_up(count: int, now_ms: int, days: int) -> Iterator[tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]]:
    """Batches of (rows of asks, rows of meters); the same for the same arguments."""
    rng = random.Random(1)
    for start in range(0, count, BATCH):
        of_asks, of_meters = [], []
        for number in range(start, min(count, start + BATCH)):
            ended_ms = now_ms - days * DAY_MS + number * days * DAY_MS // count
            key = int(KEYS * rng.random() ** 2)
            cost, quantities = 0, {}
            for meter, most, price in (("input", 2000, 100), ("cached", 4000, 20), ("output", 600, 400)):
                quantities[meter] = (quantity := rng.randrange(1, most), price)
                cost += quantity * price
            ask_id = f"ask_{ended_ms:012x}7{number:019x}"
            values = {
                "id": ask_id,
                "organisation": "org_default",
                "project": f"proj_{key % PROJECTS}",
                "key": f"key_{key}",
                "user": f"user_{key}",
                "process": "",
                "batch": "",
                "route": "/v1/chat/completions",
                "model": f"model-{rng.randrange(MODELS)}",
                "model_hash": "0" * 64,
                "kind": "generate",
                "class": rng.choice(CLASSES),
                "state": "settled",
                "server": "meter-0",
                "started_ms": ended_ms - 800,
                "ended_ms": ended_ms,
                "outcome": "done",
                "finish": "stop",
                "budgets": "[]",
                "limits": "[]",
                "cost_micros": cost // 10**6,
                "n": 1,
                "price_version": 1,
            }
            of_asks.append(tuple(values.get(name, 0) for name in ASK_COLUMNS))
            of_meters += [(ask_id, meter, quantity, 1, price) for meter, (quantity, price) in quantities.items()]
        yield of_asks, of_meters


def sums(table: str, start: str, at: str) -> list[str]:
    """What settlements would have added up."""
    names, asked, used = "quantity, cost_micros", "count(*), sum(cost_micros)", "sum(quantity), 0"
    if table == "usage_hours":  # which know what the days and months have of them
        names, asked, used = f"{names}, folded_quantity, folded_cost_micros", f"{asked}, {asked}", f"{used}, {used}"
    columns = f"({start}, {_DIMENSIONS}, meter, {names})"
    return [
        f"insert into {table} {columns} select {at}, {_DIMENSIONS}, 'asks', {asked} from asks"
        f" group by {at}, {_DIMENSIONS}",
        f"insert into {table} {columns} select {at}, {_DIMENSIONS}, meter, {used}"
        f" from asks join meters on meters.ask = asks.id group by {at}, {_DIMENSIONS}, meter",
    ]


def all_sums(month: str) -> list[str]:
    """`month`: the beginning of an ask's month, as the database writes it."""
    hour, day = (f"ended_ms - ended_ms % {width_ms}" for width_ms in (HOUR_MS, DAY_MS))
    tables = (("usage_hours", "hour_ms", hour), ("usage_days", "day_ms", day), ("usage_months", "month_ms", month))
    return [*(statement for table in tables for statement in sums(*table)), "analyze"]


SQLITE_MONTH = "1000 * unixepoch(ended_ms / 1000, 'unixepoch', 'start of month')"
POSTGRESQL_MONTH = (
    "(1000 * extract(epoch from date_trunc('month', to_timestamp(ended_ms / 1000.0) at time zone 'UTC')))::bigint"
)


def fill_sqlite(file: Path, count: int, now_ms: int, days: int) -> None:
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("pragma synchronous = off")
    for table, columns in (("asks", ASK_COLUMNS), ("meters", METER_COLUMNS)):
        assert [row[1] for row in connection.execute(f"pragma table_info({table})")] == list(columns)
    for of_asks, of_meters in made_up(count, now_ms, days):
        connection.execute("begin")
        connection.executemany(f"insert into asks values ({', '.join('?' * len(ASK_COLUMNS))})", of_asks)
        connection.executemany(f"insert into meters values ({', '.join('?' * len(METER_COLUMNS))})", of_meters)
        connection.execute("commit")
    for statement in all_sums(SQLITE_MONTH):
        connection.execute(statement)
    connection.execute("pragma wal_checkpoint(truncate)")
    connection.close()


async def fill_postgresql(url: str, count: int, now_ms: int, days: int) -> None:
    connection: Any = await asyncpg.connect(url)
    for of_asks, of_meters in made_up(count, now_ms, days):
        await connection.copy_records_to_table("asks", records=of_asks, columns=ASK_COLUMNS)
        await connection.copy_records_to_table("meters", records=of_meters, columns=METER_COLUMNS)
    for statement in all_sums(POSTGRESQL_MONTH):
        await connection.execute(statement, timeout=3600)
    await connection.close()


async def exported(lines: AsyncIterator[bytes]) -> int:
    count = 0
    async for _ in lines:
        count += 1
    return count


def questions(database: Database, now_ms: int) -> dict[str, Asked]:
    """What the commands and the Admin API ask."""
    month = Span(since_ms=now_ms - 30 * DAY_MS)
    odd_month = Span(since_ms=now_ms - 30 * DAY_MS - 5 * HOUR_MS, until_ms=now_ms - 7 * HOUR_MS)
    one_key = Span(since_ms=now_ms - 30 * DAY_MS, filters={"key": ["key_3"]})
    today, week = Span(since_ms=now_ms - now_ms % DAY_MS), Span(since_ms=now_ms - 7 * DAY_MS)
    found: dict[str, Asked] = {
        f"usage --by {by}, since the beginning": lambda by=by: usage(database, by=by)  # type: ignore[misc]
        for by in ("key", "project", "model", "day", "class", "process")
    }
    return found | {
        "usage --by key, 30 days": lambda: usage(database, by="key", span=month),
        "usage --by key, 30 days that begin and end within a day": lambda: usage(database, by="key", span=odd_month),
        "usage --by model, 30 days of one key": lambda: usage(database, by="model", span=one_key),
        "usage --by key, today": lambda: usage(database, by="key", span=today),
        "buckets of an hour, 7 days, by model": lambda: usage_buckets(
            database, width="1h", span=week, group_by=("model",)
        ),
        "buckets of a day, 30 days, by project": lambda: usage_buckets(
            database, width="1d", span=month, group_by=("project",)
        ),
        "buckets of a minute, one hour": lambda: usage_buckets(
            database, width="1m", span=Span(since_ms=now_ms - HOUR_MS)
        ),
        "export of one day": lambda: exported(
            export_asks(database, "csv", since_ms=now_ms - 2 * DAY_MS, until_ms=now_ms - DAY_MS)
        ),
    }


async def one_ask(database: Database, ledger: Ledger) -> None:
    """Let in and settled, durably."""
    account = Account(id="proj_1", name="", key="key_1")
    ask = Ask(id=new_id("ask"), account=account.id, model=CARD.id)
    await database.run(lambda: ledger.reserve(account, ask, prompt_tokens=10, card=CARD))
    settlement = Settlement(ask_id=ask.id, usage=Usage(input=10, output=20), outcome="done")
    await database.run(lambda: ledger.settle(settlement), durable=True)


async def timed(ask: Asked, *, times: int) -> float:
    """Median milliseconds."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        await ask()
        took.append(1e3 * (time.perf_counter() - began))
    return statistics.median(took)


def start_ms(home: Path, database_url: str) -> float:
    """From the command to the first good `/health`, with a scripted model."""
    script = home / "bench.json"
    script.write_text('{"default": {"text": "hello"}}')
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("nimbos")),
        "up",
        "--port",
        str(port),
        "--model",
        f"scripted:{script}",
    ]
    environment = {**os.environ, "NIMBOS_HOME": str(home), "NIMBOS_DATABASE_URL": database_url}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    return 1e3 * (time.perf_counter() - began)
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "the server ended"
                time.sleep(0.01)
    finally:
        process.terminate()
        process.wait()


async def measure(settings: Settings, count: int, days: int) -> dict[str, float]:
    now_ms = time.time_ns() // 1_000_000
    database = await Database.open(settings)
    url = settings.storage.database_url
    began = time.perf_counter()
    if url:
        await fill_postgresql(url, count, now_ms, days)
    else:
        await asyncio.to_thread(fill_sqlite, Path(settings.home) / "nimbos.db", count, now_ms, days)
    print(f"filled {count} asks in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    found = {name: await timed(ask, times=5) for name, ask in questions(database, now_ms).items()}
    ledger = Ledger(server_id="meter-bench")
    found["one ask reserved and settled, durably"] = await timed(lambda: one_ask(database, ledger), times=200)
    await database.close()
    return found | await asyncio.to_thread(starts, Path(settings.home), url)


def starts(home: Path, database_url: str) -> dict[str, float]:
    """With these rows and, on SQLite, with none: A B B A A B."""
    took: dict[str, list[float]] = {"start, until /health is good": []}
    if not database_url:
        took["… of an empty home, in between"] = []
    with tempfile.TemporaryDirectory() as empty:
        for turn in range(3):
            arms = list(zip((home, Path(empty)), took.values(), strict=False))
            for place, times in reversed(arms) if turn % 2 else arms:
                times.append(start_ms(place, database_url))
    return {name: statistics.median(times) for name, times in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of asks and meters together")
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--database-url", default="", help="an empty PostgreSQL; SQLite without it")
    parser.add_argument("--folder", type=Path, help="for the home folder; a temporary one without it")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as home:
        settings = Settings(home=home, storage=StorageSettings(database_url=given.database_url))
        found = asyncio.run(measure(settings, given.rows // ROWS_PER_ASK, given.days))
    where = "PostgreSQL" if given.database_url else "SQLite"
    print(f"### Reports from {given.rows:,} ledger rows over {given.days} days, {where}\n")
    print("| question | median ms |\n| --- | ---: |")
    for name, milliseconds in found.items():
        print(f"| {name} | {milliseconds:,.1f} |")
    if given.out is not None:
        given.out.write_text(json.dumps({"rows": given.rows, "days": given.days, "ms": found}, indent=2))


if __name__ == "__main__":
    main()

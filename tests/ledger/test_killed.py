"""The ledger after SIGKILL: of the server at any moment, and of the engine; with clients that come and go meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database
from nimbos.ledger import set_budget, usage
from nimbos.types import Usage
from tests import tiny_gguf
from tests.api.test_up import up
from tests.databases import postgres_server
from tests.ledger.books import ACCOUNT, Books
from tests.ledger.shop import Shop, Told, an_ask, ledger_of, shop
from tests.live import Live, serving, user, write_script

TALK = {"replies": [{"match": "slow", "text": "word " * 400, "tokens_per_second": 400}], "default": {"text": "a b c"}}
LEFT_AFTER = 9  # tokens
LIVE = {"default": {"text": "so it goes " * 40, "thinking": "hm " * 9}}  # more than anybody hears before leaving


@dataclass
class Heard:
    """What one client read from the wire."""

    ask_id: str = ""
    tokens: int = 0
    usage: dict[str, Any] | None = None
    status: int = 0
    branches: int = 1
    texts: list[str] = field(default_factory=list)


async def listen(client: httpx2.AsyncClient, heard: Heard, body: dict[str, Any], leave_after: int | None) -> None:
    """Reads a stream to its end, until `leave_after` tokens were read, or until the connection breaks."""
    wanted = {"model": "demo", "stream": True, "stream_options": {"include_usage": True}, **body}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=wanted) as reply:
            heard.status = reply.status_code
            heard.ask_id = reply.headers.get("x-nimbos-ask-id", "")
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                for choice in event.get("choices", []):
                    delta = choice["delta"]
                    heard.tokens += bool(delta.get("content")) + bool(delta.get("reasoning_content"))
                heard.usage = event.get("usage") or heard.usage
                if leave_after is not None and heard.tokens >= leave_after:
                    return
    except httpx2.HTTPError:
        return


def check_heard(heards: list[Heard], rows: dict[str, Any]) -> None:
    """Per ask: heard ≤ ledger ≤ heard by the server's own count + one step of each branch; what was told is it."""
    for heard in heards:
        if not heard.ask_id:
            continue
        row = rows[heard.ask_id]
        found = ledger_of(row)
        assert row["state"] == "settled"
        assert heard.tokens <= found.output
        if row["outcome"] != "recovered":
            assert heard.tokens <= row["told_output"] <= found.output <= row["told_output"] + heard.branches
        if heard.usage is not None:
            assert heard.usage["completion_tokens"] == found.output
            assert heard.usage["prompt_tokens"] == found.input
            assert heard.usage["completion_tokens_details"]["reasoning_tokens"] == found.thinking
            assert heard.usage["prompt_tokens_details"]["cached_tokens"] == found.cached


async def check_sums(books: Books, rows: dict[str, Any]) -> None:
    total = (await usage(books.database, by="key")).total
    settled = [ledger_of(row) for row in rows.values() if row["state"] == "settled"]
    assert total.asks == len(settled)
    assert total.output_tokens == sum(one.output for one in settled)
    assert total.input_tokens == sum(one.input for one in settled)


@asynccontextmanager
async def reading(settings: Settings) -> AsyncIterator[Shop]:
    """The same database, opened beside the server or after it."""
    database = await Database.open(settings)
    books = Books(database)
    try:
        yield Shop(database, None, None, None, books, [])  # type: ignore[arg-type]
    finally:
        await database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest) -> Iterator[StorageSettings]:
    if request.param == "sqlite":
        yield StorageSettings()
        return
    url = postgres_server().fresh()
    yield StorageSettings(database_url=url)
    postgres_server().drop(url)


def client_of(url: str, key: str) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None)
    return httpx2.AsyncClient(
        base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60, limits=limits, trust_env=False
    )


def test_two_hundred_clients_at_once_that_leave_when_they_like(tmp_path: Path, storage: StorageSettings) -> None:
    with serving(tmp_path, {"demo": LIVE}, database_url=storage.database_url) as live:
        heards = asyncio.run(_crowd(live))
        live.stop()
    settings = Settings(home=str(tmp_path), storage=storage)
    asyncio.run(_check_crowd(settings, heards))
    assert list((tmp_path / "run").glob("meter-*")) == []


async def _crowd(live: Live) -> list[Heard]:
    rng = random.Random(5)
    heards = [Heard(branches=rng.choice([1, 1, 2])) for _ in range(200)]
    key = live.headers["authorization"].removeprefix("Bearer ")
    async with client_of(live.url, key) as client:
        await asyncio.gather(
            *(
                listen(
                    client,
                    heard,
                    {"messages": user("hi"), "n": heard.branches, "enable_thinking": rng.random() < 0.5},
                    rng.choice([None, None, 1, 3, 20, 100]),
                )
                for heard in heards
            )
        )
        metrics = (await client.get("/metrics")).text
    tokens = [line for line in metrics.splitlines() if line.startswith("nimbos_tokens_total{")]
    assert any('meter="output"' in line for line in tokens)
    return heards


async def _check_crowd(settings: Settings, heards: list[Heard]) -> None:
    async with reading(settings) as opened:
        rows = await opened.rows()
        assert len(rows) == 200
        check_heard(heards, rows)
        assert sum(heard.usage is not None for heard in heards) > 30
        await check_sums(opened.books, rows)


@pytest.mark.parametrize("rounds", [pytest.param(2), pytest.param(25, marks=pytest.mark.long)])
def test_a_server_killed_at_any_moment_loses_and_invents_nothing(
    tmp_path: Path, storage: StorageSettings, rounds: int
) -> None:
    """Rounds on one home: stream, SIGKILL, start again; the next start settles what the last one left."""
    rng = random.Random(9)
    home = tmp_path / "home"
    model = f"scripted:{write_script(tmp_path, 'demo', TALK)}"
    more = {"NIMBOS_DATABASE_URL": storage.database_url} if storage.database_url else {}
    settings = Settings(home=str(home), storage=storage)
    heards: list[Heard] = []
    for number in range(rounds):
        with up(home, "--model", model, **more) as server:
            key = (home / "owner.key").read_text().strip()
            if number == 0:
                asyncio.run(_hold_by_a_budget(settings))
            heards += asyncio.run(_stream_until_killed(server.url, key, server.process.pid, rng))
            server.process.wait(60)
    with up(home, "--model", model, **more) as server:
        assert server.stop(signal.SIGTERM) == 0
    asyncio.run(_check_killed(settings, heards))
    assert list((home / "run").glob("meter-*")) == []


async def _hold_by_a_budget(settings: Settings) -> None:
    async with reading(settings) as opened:
        await opened.books.run(
            lambda: set_budget("project", "proj_default", meter="tokens", limit=10**7, period="total")
        )


async def _stream_until_killed(url: str, key: str, pid: int, rng: random.Random) -> list[Heard]:
    heards = [Heard() for _ in range(20)]
    target = rng.randrange(20, 600)
    async with client_of(url, key) as client:

        async def kill() -> None:
            while sum(heard.tokens for heard in heards) < target:
                await asyncio.sleep(0.001)
            os.kill(pid, signal.SIGKILL)

        await asyncio.gather(
            kill(),
            *(
                listen(
                    client,
                    heard,
                    {"messages": user(rng.choice(["slow", "slow", "quick"]))},
                    rng.choice([None, LEFT_AFTER]),
                )
                for heard in heards
            ),
        )
    return heards


async def _check_killed(settings: Settings, heards: list[Heard]) -> None:
    async with reading(settings) as opened:
        rows = await opened.rows()
        check_heard(heards, rows)
        recovered = [row for row in rows.values() if row["outcome"] == "recovered"]
        assert recovered
        by_id = {heard.ask_id: heard for heard in heards}
        for row in recovered:  # a token is counted, then written to the socket: one of them may be on its way
            heard = by_id.get(row["id"], Heard())
            if heard.ask_id and heard.tokens != LEFT_AFTER:
                assert heard.tokens <= ledger_of(row).output <= heard.tokens + 1
        await check_sums(opened.books, rows)
        (budget,) = await opened.books.budgets_of("project", "proj_default")
        assert budget.reserved == 0
        assert budget.used == sum(ledger_of(row).input + ledger_of(row).output for row in rows.values())


@pytest.mark.parametrize("kills", [pytest.param(2), pytest.param(4, marks=pytest.mark.long)])
async def test_an_engine_killed_at_any_moment_bills_nothing_twice(
    database: Database, tmp_path: Path, kills: int
) -> None:
    """Ledger = meter − recomputed, and what was told is the ledger, whatever was computed again."""
    rng = random.Random(3)
    model = tiny_gguf.write("qwen2", tmp_path)
    async with shop(database, tmp_path, models=(model,)) as opened:
        budget = await opened.books.budget("project", ACCOUNT.id, limit=10**6)
        tolds = [
            Told(an_ask(f"the man in the world said {number}", model=model.stem, limit_tokens=rng.randrange(80, 200)))
            for number in range(12)
        ]

        counted: dict[str, Usage] = {}  # by the ask that was left, when it was

        async def kill() -> None:
            for count in range(1, kills + 1):
                while sum(told.output for told in tolds) < 120 * count and not all(told.complete for told in tolds):
                    await asyncio.sleep(0.005)
                pid = opened.service.engine_pid(model.stem)
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)

        async def one(told: Told) -> None:
            with ExitStack() as leaving:

                def leave() -> None:
                    leaving.enter_context(standing(opened.service.engine_pid(model.stem)))
                    counted[told.ask.id] = opened.counted(told.ask.id)

                await opened.ask(told=told, leave_after=rng.choice([None, None, 30]), leave=leave)

        await asyncio.gather(kill(), *map(one, tolds))
        await opened.desk.close()
        rows = await opened.rows()
        assert rows.keys() == {told.ask.id for told in tolds}
        for told in tolds:
            found = ledger_of(rows[told.ask.id])
            if told.complete:
                assert found == told.usage
                assert found.output == told.output == told.ask.limit_tokens
            else:
                assert found == counted[told.ask.id]
                assert told.output <= found.output <= told.ask.limit_tokens
        assert sum(row["recomputed"] for row in rows.values()) > 0
        assert max(row["restarts"] for row in rows.values()) >= 1
        spent = await opened.books.look(budget)
        assert spent.used == sum(_billed(ledger_of(row)) for row in rows.values())
        assert (spent.reserved, opened.rows_in_use) == (0, 0)


@contextmanager
def standing(pid: int | None) -> Iterator[None]:
    """The process computes nothing meanwhile, if there still is one."""
    try:
        if pid is not None:
            os.kill(pid, signal.SIGSTOP)
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZ":
                os.sched_yield()
    except (ProcessLookupError, FileNotFoundError):
        pid = None
    try:
        yield
    finally:
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _billed(usage: Usage) -> int:
    return usage.input + usage.output

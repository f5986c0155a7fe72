"""Every route that makes tokens is counted; LiteLLM #38176: some never were."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from nimbos.db import Database, Statement
from nimbos.db.tables.ledger import servers
from nimbos.ledger import Price, Recovery, recovery, set_budget, set_limit, set_prices
from nimbos.types import Usage
from tests import tiny_gguf
from tests.conftest import DEMO
from tests.ledger.books import ASKS, Books
from tests.ledger.shop import ledger_of
from tests.ledger.test_killed import reading
from tests.live import Live, error_of, serving, user

EMBEDDER, RERANKER = "tiny-qwen3-embedding-1", "tiny-qwen3-reranker-1"
SAY = "aigc/text-generation/generation"
CHATS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "demo", "messages": user("hi")},
    "/compatible-mode/v1/chat/completions": {"model": "demo", "messages": user("hi")},
    "/v1/completions": {"model": "demo", "prompt": "hi"},
    "/v1/responses": {"model": "demo", "input": "hi"},
    "/v1/messages": {"model": "demo", "messages": user("hi"), "max_tokens": 50},
    f"/api/v1/services/{SAY}": {"model": "demo", "input": {"messages": user("hi")}},
    "/api/chat": {"model": "demo", "messages": user("hi")},
    "/api/generate": {"model": "demo", "prompt": "hi"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": EMBEDDER, "input": "hello there"},
    "/api/embed": {"model": EMBEDDER, "input": "hello there"},
    "/v1/rerank": {"model": RERANKER, "query": "hello", "documents": ["there", "you"]},
    "/api/v1/services/embeddings/text-embedding/text-embedding": {
        "model": EMBEDDER,
        "input": {"texts": ["hello there"]},
    },
}


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("models")
    models = (tiny_gguf.write("qwen3-embedding", folder), tiny_gguf.write("qwen3-reranker", folder))
    with serving(folder / "home", {"demo": DEMO}, models=models) as running:
        yield running


async def _rows(live: Live) -> dict[str, Any]:
    async with reading(live.settings) as opened:
        return await opened.rows()


@pytest.mark.parametrize("path", [*CHATS, *OTHERS])
def test_every_route_that_makes_tokens_is_in_the_ledger(every: Live, path: str) -> None:
    before = asyncio.run(_rows(every))
    reply = every.post(path, {**CHATS, **OTHERS}[path])
    assert reply.status_code == 200, reply.text
    after = asyncio.run(_rows(every))
    (added,) = after.keys() - before.keys()
    row = after[added]
    assert (row["state"], row["outcome"]) == ("settled", "done")
    assert ledger_of(row).input > 0
    assert (ledger_of(row).output > 0) == (path in CHATS)
    assert path.endswith(row["route"])


def test_counting_a_prompt_is_free(every: Live) -> None:
    before = asyncio.run(_rows(every))
    body = {"model": "demo", "messages": user("hi")}
    assert every.post("/v1/messages/count_tokens", body).status_code == 200
    assert asyncio.run(_rows(every)).keys() == before.keys()


async def _change(live: Live, *changes: Any) -> None:
    async with reading(live.settings) as opened:
        for change in changes:
            await opened.books.run(change)


def test_limits_and_budgets_as_a_client_meets_them(tmp_path: Path) -> None:
    with serving(tmp_path, {"demo": {"default": {"text": "one two three four five six"}}}) as live:
        asyncio.run(
            _change(
                live,
                lambda: set_limit("project", "proj_default", requests_per_min=3, tokens_per_min=100_000),
                lambda: set_budget("project", "proj_default", meter="cost_micros", limit=5, period="day"),
                lambda: set_prices([Price(meter="output", micros_per_million=1_000_000)]),
            )
        )
        reply = live.chat()
        assert reply.json()["choices"][0]["finish_reason"] == "length"
        assert reply.json()["x_nimbos"]["stop"] == "budget"
        assert reply.json()["usage"]["completion_tokens"] == 5
        assert reply.headers["x-ratelimit-limit-requests"] == "3"
        assert reply.headers["x-ratelimit-remaining-requests"] == "2"
        assert reply.headers["x-ratelimit-limit-tokens"] == "100000"
        spent = live.chat()
        assert error_of(spent, 429)["code"] == "insufficient_quota"
        assert (spent.headers["x-should-retry"], int(spent.headers["retry-after"]) <= 86_400) == ("false", True)
        asyncio.run(_change(live, lambda: set_budget("project", "proj_default", **_MORE)))
        assert live.chat(max_tokens=1).status_code == 200
        assert live.chat(max_tokens=1).status_code == 200
        refused = live.chat(max_tokens=1)
        error = error_of(refused, 429)
        assert (error["code"], "requests" in error["message"], "project" in error["message"]) == (
            "overloaded",
            True,
            True,
        )
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"


_MORE: dict[str, Any] = {"meter": "cost_micros", "limit": 1000, "period": "day"}


async def test_asks_of_a_silent_server_give_back_what_they_hold(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shared database; should that server come back, it settles them as if nothing had been."""
    lost, here = Books(database, server_id="meter-lost"), Books(database, server_id="meter-here")
    elsewhere = Recovery(database=database, ledger=lost.ledger, run_dir=tmp_path / "elsewhere")
    await elsewhere.recover()
    budget = await lost.budget("key", "key_a", limit=1000)
    reserved = await lost.reserve(prompt=10)
    mine = Recovery(database=database, ledger=here.ledger, run_dir=tmp_path / "here")
    await mine.recover()
    assert await mine.release_silent() == 0
    later_ms = recovery._now_ms() + 100_000
    monkeypatch.setattr(recovery, "_now_ms", lambda: later_ms)
    assert await mine.release_silent() == 1
    assert await mine.release_silent() == 0
    assert (await here.look(budget)).reserved == 0
    assert (await lost.settle(reserved.ask_id, Usage(input=10, output=20))).new
    assert ((await here.look(budget)).used, (await here.look(budget)).reserved) == (30, 0)
    assert [row["state"] for row in await here.rows(ASKS)] == ["settled"]


async def test_a_server_that_is_long_gone_is_forgotten_when_nothing_of_it_is_left(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owing, idle, here = (Books(database, server_id=f"meter-{name}") for name in ("owing", "idle", "here"))
    for books, home in ((owing, "one"), (idle, "two")):
        await Recovery(database=database, ledger=books.ledger, run_dir=tmp_path / home).recover()
    reserved = await owing.reserve(prompt=10)
    await idle.ask_and_settle(Usage(input=10, output=5))
    mine = Recovery(database=database, ledger=here.ledger, run_dir=tmp_path / "here")
    await mine.recover()
    assert await mine.forget_gone() == 0
    later_ms = recovery._now_ms() + int(recovery.GONE_AFTER_S * 1000) + 1
    monkeypatch.setattr(recovery, "_now_ms", lambda: later_ms)
    assert await mine.release_silent() == 1
    assert await mine.forget_gone() == 1
    assert {row["id"] for row in await here.rows(_SERVERS)} == {"meter-owing", "meter-here"}
    await owing.settle(reserved.ask_id, Usage(input=10, output=20))
    assert await mine.forget_gone() == 1
    assert {row["id"] for row in await here.rows(_SERVERS)} == {"meter-here"}


_SERVERS = Statement(select(servers))

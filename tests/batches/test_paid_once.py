"""A line that is begun anew is paid for once, and one that has several asks is stored with the last of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nimbos.batches import running
from nimbos.config import Settings
from nimbos.db import Database
from nimbos.types import AskClass
from tests.batches.test_batches import chat_line, over, rows_of, submit
from tests.databases import postgres_server
from tests.ledger.books import ASKS, METERS
from tests.live import PATIENCE_S, Live, serving

WORDS = 60
LONG = {"match": "long", "text": " ".join(["word"] * WORDS)}
SLOW = {"replies": [{**LONG, "tokens_per_second": 30}], "default": {"text": "short"}}
QUICK = {"replies": [LONG], "default": {"text": "short"}}


def completion_line(custom_id: str, prompts: list[str], **fields: Any) -> dict[str, Any]:
    body = {"model": "demo", "prompt": prompts, "max_tokens": 500, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_in_its_middle(live: Live, asks: int) -> bool:
    """All asks have begun, and one of them has said a part of what it will."""
    begun = live.sources["demo"].asks
    used = [(live.runtime.service.used(ask.id).output, ask.n) for ask in list(begun)]
    return len(used) == asks and any(2 * n < output < WORDS * n for output, n in used)


async def books(settings: Settings) -> tuple[list[Any], list[Any]]:
    database = await Database.open(settings)
    try:
        return list(await database.read(ASKS())), list(await database.read(METERS()))
    finally:
        await database.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
@pytest.mark.parametrize(
    ("line", "asks", "choices"),
    [
        (chat_line("a", "long"), 1, 1),
        (chat_line("a", "long", n=3), 1, 3),
        (completion_line("a", ["long"]), 1, 1),
        (completion_line("a", ["one", "long", "two"]), 3, 1),
        (completion_line("a", ["one", "long"], n=2), 2, 2),
    ],
    ids=["chat", "choices", "completion", "several prompts", "choices of several prompts"],
)
def test_a_line_that_is_begun_again_pays_once_for_what_it_is_told(
    tmp_path: Path, kind: str, line: dict[str, Any], asks: int, choices: int
) -> None:
    url = postgres_server().with_tables() if kind == "postgresql" else ""
    home = tmp_path / "home"
    with serving(home, {"demo": SLOW}, database_url=url) as live:
        made = submit(live, [line], endpoint=line["url"])
        until(lambda: is_in_its_middle(live, asks))
    with serving(home, {"demo": QUICK}, database_url=url) as live:
        done = over(live, made.id)
        (row,) = rows_of(live, done.output_file_id)
        again = len(live.sources["demo"].asks)
        settings = live.settings
    assert again == asks
    told = row["response"]["body"]["usage"]
    assert told["completion_tokens"] == choices * (WORDS + asks - 1)
    rows, meters = asyncio.run(books(settings))
    assert len(rows) == 2 * asks
    assert {one["class"] for one in rows} == {AskClass.BATCH.value}
    paid = {name: sum(one["quantity"] for one in meters if one["meter"] == name) for name in ("input", "output")}
    assert (paid["input"], paid["output"]) == (told["prompt_tokens"], told["completion_tokens"])
    assert sum(one["recomputed"] for one in rows) > 0


def test_several_prompts_of_a_line_are_stored_with_the_settlement_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written behind it, so there is no moment in between at which a crash could lose the answer."""

    async def behind(*_: object) -> None:
        raise AssertionError("the answer was not in the settlement")

    monkeypatch.setattr(running.Settling, "write", behind)
    with serving(tmp_path, {"demo": QUICK}) as live:
        prompts = [completion_line(f"{n}", ["long", "short", "short long"][: n + 1], n=2) for n in range(3)]
        done = over(live, submit(live, prompts, endpoint="/v1/completions").id)
        rows = rows_of(live, done.output_file_id)
        assert [len(row["response"]["body"]["choices"]) for row in rows] == [2, 4, 6]

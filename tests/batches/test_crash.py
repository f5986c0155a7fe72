"""A server that is killed at random moments: each custom id has one answer in the end, and the ledger agrees."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import bindparam, select

from nimbos.config import Settings, StorageSettings
from nimbos.db import Database, Statement
from nimbos.db.tables.ledger import asks, meters
from tests.batches.test_batches import OVER, chat_line, content_of
from tests.cli.command import NIMBOS, environment
from tests.databases import postgres_server
from tests.live import OWNER_SECRET, PATIENCE_S, write_script

LINES = 60
KILLS = 4
SCRIPT = {"default": {"text": "a few words that take their time, one after the other", "tokens_per_second": 20}}
# Few at once, so that kills meet lines in every state.
CONFIG = "[batches]\nlines_at_once = 6\n"
_ASKS = Statement(
    select(asks.c.id, asks.c.outcome, asks.c.state, meters.c.meter, meters.c.quantity)
    .join(meters, meters.c.ask == asks.c.id)
    .where(asks.c.batch == bindparam("batch"))
)


class Server:
    """`nimbos up` as a process, to be killed."""

    def __init__(self, home: Path, script: Path, url: str) -> None:
        self._environment = environment(home, NIMBOS_API_KEY=OWNER_SECRET, NIMBOS_DATABASE_URL=url)
        self._command = [NIMBOS, "up", "-m", f"scripted:{script}", "--port", "0"]
        self._running = home / "run" / "server.json"

    def start(self) -> openai.OpenAI:
        self._running.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            self._command, env=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + PATIENCE_S
        while not self._running.exists():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        url = json.loads(self._running.read_text())["url"]
        return openai.OpenAI(base_url=f"{url}/v1", api_key=OWNER_SECRET, max_retries=5, timeout=PATIENCE_S)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_killed_at_random_moments_each_line_is_answered_once_and_the_ledger_agrees(tmp_path: Path, kind: str) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "config.toml").write_text(CONFIG)
    url = postgres_server().fresh() if kind == "postgresql" else ""
    server = Server(home, write_script(tmp_path, "demo", SCRIPT), url)
    moments = random.Random(20)
    try:
        client = server.start()
        file = client.files.create(
            file=("a.jsonl", content_of([chat_line(f"{n:02}") for n in range(LINES)])), purpose="batch"
        )
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        seen = 0
        for _ in range(KILLS):
            seen = until_progress(client, made.id, seen + 1)
            time.sleep(moments.uniform(0, 0.6))  # the random moment itself
            client.close()
            server.kill()
            client = server.start()
        done = until_over(client, made.id)
        assert done.status == "completed"
        assert done.request_counts is not None
        assert (done.request_counts.completed, done.request_counts.failed) == (LINES, 0)
        rows = [json.loads(line) for line in client.files.content(done.output_file_id or "").text.splitlines()]
        client.close()
    finally:
        server.kill()
    assert [row["custom_id"] for row in rows] == [f"{n:02}" for n in range(LINES)]
    asyncio.run(check_ledger(Settings(home=str(home), storage=StorageSettings(database_url=url)), made.id, rows))


def until_progress(client: openai.OpenAI, batch_id: str, least: int) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.request_counts is not None and batch.request_counts.completed >= least:
            return batch.request_counts.completed
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)


def until_over(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    deadline = time.monotonic() + 2 * PATIENCE_S
    while (batch := client.batches.retrieve(batch_id)).status not in OVER:
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
    return batch


async def check_ledger(settings: Settings, batch_id: str, rows: list[dict[str, Any]]) -> None:
    """Each answer that was kept is one settled ask; every other ask of the batch was interrupted by a death, and has no
    answer anywhere. All of them together were paid what the answers tell: nothing was paid for twice."""
    database = await Database.open(settings)
    try:
        found = await database.read(_ASKS(batch=batch_id))
    finally:
        await database.close()
    used: dict[str, dict[str, int]] = {}
    outcomes: dict[str, str] = {}
    for row in found:
        assert row["state"] == "settled"
        outcomes[row["id"]] = row["outcome"]
        used.setdefault(row["id"], {})[row["meter"]] = row["quantity"]
    kept = {row["response"]["request_id"]: row["response"]["body"]["usage"] for row in rows}
    assert len(kept) == LINES
    told = [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in kept.values()]
    assert len(set(told)) == 1
    assert {outcomes[ask_id] for ask_id in kept} == {"done"}
    meter_sum = {name: sum(meter.get(name, 0) for meter in used.values()) for name in ("input", "output")}
    assert (meter_sum["input"], meter_sum["output"]) == (sum(p for p, _ in told), sum(c for _, c in told))
    interrupted = outcomes.keys() - kept.keys()
    assert {outcomes[ask_id] for ask_id in interrupted} <= {"recovered"}

"""`nimbos up` killed by SIGKILL in the middle of a generation: the next server goes on behind the last partial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import openai

from nimbos.config import Settings
from nimbos.db import Database
from tests.batches.test_crash import Server
from tests.kernel.minds import words
from tests.ledger.books import ASKS, METERS, Books
from tests.ledger.shop import ledger_of
from tests.live import PATIENCE_S, write_script

LONG = 400
KILLS = 1
PROMPT_TOKENS = 4
SCRIPT = {"default": words(LONG, rate=200)}
FILES = {"nimbos.toml": 'name = "long"\n', "instructions.md": "Be brief."}


def client_of(client: openai.OpenAI) -> httpx2.Client:
    headers = {"authorization": f"Bearer {client.api_key}"}
    return httpx2.Client(base_url=str(client.base_url), headers=headers, timeout=PATIENCE_S)


def partials_seen(http: httpx2.Client, pid: str, *, after: int, wanted: int) -> int:
    """Reads the events as they come until `wanted` more partials are durable; the seq of the last event."""
    with http.stream("GET", f"processes/{pid}/events", params={"after": after}) as stream:
        kind = ""
        for line in stream.iter_lines():
            if line.startswith("event:"):
                kind = line.removeprefix("event:").strip()
            elif line.startswith("data:") and kind == "model.partial":
                after, wanted = int(json.loads(line.removeprefix("data:"))["seq"]), wanted - 1
                if not wanted:
                    return after
    raise AssertionError("it ended before")


def ended(http: httpx2.Client, pid: str) -> dict[str, Any]:
    """The stream of its events ends when it does."""
    with http.stream("GET", f"processes/{pid}/events") as stream:
        for _ in stream.iter_lines():
            pass
    return dict(http.get(f"processes/{pid}").json())


async def test_a_generation_survives_the_death_of_its_server(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    server = Server(home, write_script(tmp_path, "demo", SCRIPT), "")
    try:
        with server.start() as client, client_of(client) as http:
            program = http.post("programs", json={"files": FILES}).json()["id"]
            pid = http.post("processes", json={"program": program, "input": "go"}).json()["id"]
            seen = partials_seen(http, pid, after=0, wanted=1)
        for _ in range(KILLS):
            server.kill()
            with server.start() as client, client_of(client) as http:
                seen = partials_seen(http, pid, after=seen, wanted=1)
        server.kill()
        with server.start() as client, client_of(client) as http:
            process = ended(http, pid)
        assert process["result"] == SCRIPT["default"]["text"]
    finally:
        server.kill()
    database = await Database.open(Settings(home=str(home)))
    try:
        books = Books(database, server_id="none")
        rows = {row["id"]: {**row, "meters": {}} for row in await books.rows(ASKS)}
        for row in await books.rows(METERS):
            rows[row["ask"]]["meters"][row["meter"]] = row["quantity"]
    finally:
        await database.close()
    assert sorted(row["outcome"] for row in rows.values()) == ["done", *["recovered"] * (KILLS + 1)]
    usages = [ledger_of(row) for row in rows.values()]
    assert sum(usage.input for usage in usages) == PROMPT_TOKENS
    assert sum(usage.output for usage in usages) == LONG
    assert process["usage"]["tokens"] == PROMPT_TOKENS + LONG

"""Characters at which some clients end a line, in streams of JSON lines and in a terminal's chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.test_up import run
from tests.live import Live, serving, user

WORDS = "one\u2028two \u0085 three\u2029four é"
TABLE = "root:x:0:0 :warning:\n\tall:\n\t\tmake [bold]it[/bold]\n"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    replies = [{"match": "table", "text": TABLE}]
    with serving(tmp_path / "home", {"demo": {"replies": replies, "default": {"text": WORDS}}}) as server:
        yield server


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_event_is_one_line_also_for_clients_that_end_lines_elsewhere(live: Live, path: str) -> None:
    body = {"model": "demo", "messages": user("hi")} if "chat" in path else {"model": "demo", "prompt": "hi"}
    with live.http.stream("POST", path, json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]  # as `str.splitlines` does
    assert all(line.startswith("data: ") for line in lines)
    choices = [json.loads(line[6:])["choices"] for line in lines[:-1]]
    told = [c.get("text") or c.get("delta", {}).get("content") or "" for (c,) in choices]
    assert "".join(told) == WORDS


def test_a_piped_chat_gets_the_answer_as_it_is(live: Live, tmp_path: Path) -> None:
    key = live.headers["authorization"].removeprefix("Bearer ")
    asked = ("chat", "--url", live.url, "--key", key, "-m", "demo")
    done = run(tmp_path / "elsewhere", *asked, typed="a table")
    assert (done.returncode, done.stdout, done.stderr) == (0, TABLE + "\n", "")
    spoken = run(tmp_path / "elsewhere", *asked, typed="words")
    assert (spoken.returncode, spoken.stdout) == (0, "onetwo  threefour é\n")

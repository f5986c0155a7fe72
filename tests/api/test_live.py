"""What runs now: the route behind `nimbos top`, and what the command shows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nimbos.cli.top import _shown
from tests.cli.command import make_home, refusal
from tests.live import OWNER_SECRET, error_of, serving, user

SLOW = {"replies": [], "default": {"text": "word " * 500, "tokens_per_second": 50}}
LIVE = "/v1/organization/live"


def test_a_running_ask_is_shown_with_what_it_has_used(tmp_path: Path) -> None:
    with serving(tmp_path, {"demo": SLOW}) as live:
        body = {"model": "demo", "messages": user("three words here"), "stream": True}
        with live.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            for _ in range(7):
                next(lines)
            look = live.http.get(LIVE).json()
            (ask,) = look["asks"]
            assert look["running"] == 1
            assert ask["id"] == stream.headers["x-nimbos-ask-id"]
            assert (ask["model"], ask["class"], ask["route"]) == ("demo", "interactive", "/v1/chat/completions")
            assert ask["input"] == 3 and ask["output"] >= 2 and ask["first_token_ms"] is not None
            assert look["tokens"]["output"] >= ask["output"]
        while live.http.get(LIVE).json()["running"]:
            pass
        after = live.http.get(LIVE).json()
        assert after["asks"] == [] and after["tokens"]["input"] == 3
        assert after["tokens"]["output"] >= ask["output"]


def test_prompts_and_secrets_are_not_in_it(tmp_path: Path) -> None:
    with serving(tmp_path, {"demo": SLOW}) as live:
        body = {"model": "demo", "messages": user("a secret question"), "stream": True}
        with live.http.stream("POST", "/v1/chat/completions", json=body) as stream:
            next(stream.iter_lines())
            text = live.http.get(LIVE).text
        assert "secret question" not in text and OWNER_SECRET not in text


def test_it_needs_a_key(tmp_path: Path) -> None:
    with serving(tmp_path, {"demo": SLOW}) as live:
        error_of(live.http.get(LIVE, headers={"authorization": ""}), 401)


def test_top_without_a_server_says_how_to_start_one(tmp_path: Path) -> None:
    assert "nimbos up" in refusal(make_home(tmp_path), "top", "--once")


@pytest.mark.parametrize("seen", ["first", "second"])
def test_what_is_shown_fits_what_was_looked_at(seen: str) -> None:
    from rich.console import Console

    engine = {
        "waiting": {"interactive": 2, "agent": 0, "batch": 1},
        "running": {"interactive": 1, "agent": 0, "batch": 0},
        "cells_used": 10,
        "cells": 100,
        "steps": 30,
        "step_rows": 60,
        "prompt_tokens": 40,
        "cached_tokens": 10,
        "output_tokens": 7,
        "preemptions": 0,
        "stalls": 3,
        "restarts": 1,
        "resident_bytes": 2**20,
    }
    look = {
        "server": "srv_1",
        "at_ms": 3_000,
        "running": 1,
        "asks": [
            {
                "id": "ask_000000000000000abcdef",
                "account": "team",
                "key": "laptop",
                "model": "m",
                "class": "interactive",
                "route": "/v1/chat/completions",
                "process": "",
                "batch": "",
                "age_ms": 3_000,
                "first_token_ms": 1_000,
                "input": 5,
                "cached": 2,
                "output": 20,
            }
        ],
        "engines": {"m": engine},
        "tokens": {"input": 5, "output": 120},
        "spent_today_micros": 2_500_000,
    }
    before = json.loads(json.dumps(look)) | {"at_ms": 1_000, "tokens": {"input": 5, "output": 20}}
    before["engines"]["m"] |= {"steps": 20, "step_rows": 30}
    console = Console(width=160, record=True)
    console.print(_shown(look, before if seen == "second" else None))
    text = console.export_text()
    assert "1 running · 3 waiting" in text and "spent today 2.50" in text
    assert "laptop" in text and "10.0" in text  # 20 tokens in the two seconds since its first
    assert ("50.0 tokens/s" in text) is (seen == "second")
    assert ("3.0" in text.split("m ")[1]) is (seen == "second")

"""`server.unknown_fields`: one way for all dialects, where the operator wants one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nimbos.config import ServerSettings, UnknownFieldsPolicy
from tests.live import Live, serving

SAYS = {"demo": {"default": {"text": "hi"}}}
MESSAGES = [{"role": "user", "content": "say"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "demo", "messages": MESSAGES},
    "/v1/completions": {"model": "demo", "prompt": "say"},
    "/v1/responses": {"model": "demo", "input": "say"},
    "/v1/messages": {"model": "demo", "messages": MESSAGES, "max_tokens": 9},
    "/api/v1/services/aigc/text-generation/generation": {"model": "demo", "input": {"messages": MESSAGES}},
    "/api/chat": {"model": "demo", "messages": MESSAGES, "stream": False},
}
OWN_WAY = {path: 400 if path.startswith("/v1/") and path != "/v1/messages" else 200 for path in BODIES}


@pytest.fixture(scope="module", params=["", "strict", "warn"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Live]]:
    policy: UnknownFieldsPolicy = request.param
    with serving(tmp_path_factory.mktemp("home"), SAYS, server=ServerSettings(unknown_fields=policy)) as live:
        yield policy, live


@pytest.mark.parametrize("path", BODIES)
def test_a_field_that_nobody_knows(served: tuple[str, Live], path: str) -> None:
    policy, live = served
    answer = live.http.post(path, json={**BODIES[path], "wibble": {"a": 1}})
    assert answer.status_code == {"": OWN_WAY[path], "strict": 400, "warn": 200}[policy], answer.text
    if answer.status_code == 200:
        assert answer.headers.get_list("x-nimbos-ignored") == ["wibble"]
    else:
        assert "wibble" in answer.text
    known = live.http.post(path, json=BODIES[path])
    assert known.status_code == 200
    assert "x-nimbos-ignored" not in known.headers


def test_a_stream_names_it_too(served: tuple[str, Live]) -> None:
    policy, live = served
    body = {**BODIES["/v1/chat/completions"], "wibble": 1, "stream": True}
    with live.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers.get("x-nimbos-ignored") == ("wibble" if policy == "warn" else None)


def test_what_a_dialect_knows_and_never_does_is_no_error(served: tuple[str, Live]) -> None:
    _, live = served
    answer = live.http.post("/api/chat", json={**BODIES["/api/chat"], "truncate": True})
    assert (answer.status_code, answer.headers["x-nimbos-ignored"]) == (200, "truncate")


def test_administration_is_always_strict(served: tuple[str, Live]) -> None:
    _, live = served
    answer = live.http.post("/v1/organization/projects", json={"name": "a", "wibble": 1})
    assert answer.status_code == 400


def test_lines_of_a_batch_are_read_the_same_way(tmp_path: Path) -> None:
    path = "/v1/chat/completions"
    line = {"custom_id": "a", "method": "POST", "url": path, "body": {**BODIES[path], "wibble": 1}}
    with serving(tmp_path, SAYS, server=ServerSettings(unknown_fields="warn")) as live:
        file = live.client.files.create(file=("a.jsonl", json.dumps(line).encode()), purpose="batch")
        batch = live.client.batches.create(input_file_id=file.id, endpoint=path, completion_window="24h")
        while batch.status not in ("completed", "failed"):
            batch = live.client.batches.retrieve(batch.id)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 0)

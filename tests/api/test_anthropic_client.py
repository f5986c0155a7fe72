"""A request as a Claude-style coding client sends it, beta fields and all, and the small calls it makes beside."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nimbos.config import ServerSettings
from tests.api.test_anthropic import events_in
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving

RECORD = json.loads((Path(__file__).parent / "coding_client.json").read_text())
EDIT = {"file_path": "/srv/app/parser.py", "old_string": "int", "new_string": "float"}
SCRIPT = {
    "replies": [
        {"match": "quota", "text": "Fine."},
        {
            "match": "Please fix it",
            "thinking": "An easy fix.",
            "text": "I fix it.",
            "tool_calls": [{"name": "Edit", "arguments": EDIT}],
        },
    ],
    "default": {"text": "Done."},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    aliases = {"claude-sonnet-4-5-20250929": "demo", "claude-haiku-4-5": "demo"}
    home: Path = tmp_path_factory.mktemp("home")
    with serving(home, {"demo": SCRIPT}, server=ServerSettings(aliases=aliases)) as running:
        yield running


@pytest.fixture(params=["x-api-key", "authorization"])
def terminal(server: Live, request: pytest.FixtureRequest) -> Iterator[httpx2.Client]:
    """With a key in either header: clients have one variable for each."""
    value = f"Bearer {OWNER_SECRET}" if request.param == "authorization" else OWNER_SECRET
    headers = {**RECORD["headers"], request.param: value}
    with httpx2.Client(base_url=server.url, headers=headers, timeout=PATIENCE_S) as client:
        yield client


def test_the_recorded_request_is_answered_with_thinking_words_and_a_call(terminal: httpx2.Client) -> None:
    response = terminal.post(RECORD["path"], json=RECORD["body"])
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"].startswith("req_")
    assert "x-nimbos-ignored" not in response.headers
    events = events_in(response.text)
    started = [data["content_block"]["type"] for name, data in events if name == "content_block_start"]
    assert started == ["thinking", "text", "tool_use"]
    pieces = [data["delta"] for name, data in events if name == "content_block_delta"]
    written = "".join(piece["partial_json"] for piece in pieces if piece["type"] == "input_json_delta")
    assert json.loads(written) == EDIT
    (start,) = (data["message"] for name, data in events if name == "message_start")
    assert start["model"] == RECORD["body"]["model"]
    (delta,) = (data for name, data in events if name == "message_delta")
    assert (delta["delta"]["stop_reason"], delta["delta"]["stop_sequence"]) == ("tool_use", None)
    assert delta["context_management"] == {"applied_edits": []}
    assert delta["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    assert events[-1] == ("message_stop", {"type": "message_stop"})


def test_what_the_model_sees_of_it(server: Live, terminal: httpx2.Client) -> None:
    terminal.post(RECORD["path"], json=RECORD["body"])
    ask = server.sources["demo"].asks[-1]
    text = "".join(part.text for part in ask.parts)  # type: ignore[union-attr]
    prompt, _ = json.JSONDecoder().raw_decode(text)
    assert [message["role"] for message in prompt] == ["system", "user", "assistant", "tool", "tool", "user"]
    assert prompt[0]["content"].startswith("x-client-billing")
    assert prompt[2]["reasoning_content"] == "I should look at the test first."
    assert [call["function"]["name"] for call in prompt[2]["tool_calls"]] == ["Read", "Bash"]
    assert prompt[4]["content"] == "Error: 1 failed\nAssertionError"
    assert ask.limit_tokens == 32_000
    assert ask.thinking is not None
    assert ask.thinking.budget_tokens == 31_999


def test_its_next_turn_is_answered_too(terminal: httpx2.Client) -> None:
    """With the answer sent back as it came, and the result of the call."""
    body = copy.deepcopy(RECORD["body"])
    whole = terminal.post(RECORD["path"], json={**body, "stream": False}).json()
    (call,) = (block for block in whole["content"] if block["type"] == "tool_use")
    assert call["input"] == EDIT
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "The file was changed."}
    turn = [{"role": "assistant", "content": whole["content"]}, {"role": "user", "content": [result]}]
    answer = terminal.post(RECORD["path"], json={**body, "stream": False, "messages": [*body["messages"], *turn]})
    (block,) = answer.json()["content"]
    assert (block["type"], block["text"]) == ("text", "Done.")
    assert answer.json()["stop_reason"] == "end_turn"


def test_fields_that_are_not_invented_yet_are_ignored_and_named(terminal: httpx2.Client) -> None:
    body = {**copy.deepcopy(RECORD["body"]), "effort_2027": "herculean", "stream": False}
    body["tools"][0]["shape_2027"] = 1
    response = terminal.post(RECORD["path"], json=body)
    assert response.status_code == 200
    assert set(response.headers["x-nimbos-ignored"].split(", ")) == {"effort_2027", "tools[].shape_2027"}


def test_its_tokens_are_counted_before(terminal: httpx2.Client) -> None:
    kept = ("model", "messages", "system", "tools", "thinking", "context_management")
    body = {name: RECORD["body"][name] for name in kept}
    counted = terminal.post("/v1/messages/count_tokens?beta=true", json=body).json()
    answered = terminal.post(RECORD["path"], json={**RECORD["body"], "stream": False}).json()
    usage = answered["usage"]
    parts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert counted["input_tokens"] == sum(usage[part] for part in parts) > 50
    assert counted["context_management"] == {"original_input_tokens": counted["input_tokens"]}


def test_its_probe_of_the_quota_is_answered(terminal: httpx2.Client) -> None:
    body: dict[str, Any] = {
        "model": "claude-haiku-4-5",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "quota"}],
        "metadata": {"user_id": "x"},
    }
    response = terminal.post("/v1/messages?beta=true", json=body)
    assert (response.status_code, response.json()["stop_reason"]) == (200, "max_tokens")


def test_its_greeting_and_its_telemetry_do_no_harm(server: Live, terminal: httpx2.Client) -> None:
    assert terminal.head("/").status_code in (200, 404)
    events = {"events": [{"event_type": "x"}]}
    for response in (
        terminal.post("/api/event_logging/batch", json=events),
        server.http.post("/api/event_logging/batch", json=events),  # without the header of a version
        terminal.get("/api/hello"),
    ):
        assert response.status_code == 404
        error = response.json()
        assert (error["type"], error["error"]["type"]) == ("error", "not_found_error")


def test_its_models_can_be_looked_up(terminal: httpx2.Client) -> None:
    found = terminal.get(f"/v1/models/{RECORD['body']['model']}").json()
    assert (found["type"], found["id"]) == ("model", RECORD["body"]["model"])

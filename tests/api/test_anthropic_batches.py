"""Message batches with Anthropic's client, on a real server with the scripted model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from nimbos.api.anthropic_batch_wire import fault_of, result_of
from nimbos.config import BatchSettings, ServerSettings
from tests.conftest import DEMO
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving, user

BATCHES = "/v1/messages/batches"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    home: Path = tmp_path_factory.mktemp("home")
    (home / "keys.toml").parent.mkdir(parents=True, exist_ok=True)
    (home / "keys.toml").write_text('[keys.other]\nkey = "nb-other"\naccount = "other"\n')
    with serving(home, {"demo": DEMO}, server=ServerSettings(max_body_bytes=200_000)) as running:
        yield running


@pytest.fixture(scope="module")
def claude(own: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=own.url, api_key=OWNER_SECRET, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def request(custom_id: str, text: str = "hi", **params: Any) -> Any:
    return {"custom_id": custom_id, "params": {"model": "demo", "max_tokens": 50, "messages": user(text), **params}}


def ended(claude: anthropic.Anthropic, batch_id: str) -> anthropic.types.messages.MessageBatch:
    """Asked again and again, as its users do; each ask is a round trip, so nothing here sleeps."""
    for _ in range(2_000):
        batch = claude.messages.batches.retrieve(batch_id)
        if batch.processing_status == "ended":
            return batch
    raise AssertionError(batch)


def results_of(claude: anthropic.Anthropic, batch_id: str) -> dict[str, Any]:
    return {line.custom_id: line.result for line in claude.messages.batches.results(batch_id)}


def test_each_request_has_its_own_result(own: Live, claude: anthropic.Anthropic) -> None:
    batch = claude.messages.batches.create(
        requests=[
            request("plain"),
            request("tool", "weather", tools=[{"name": "get_weather", "input_schema": {"type": "object"}}]),
            request("wrong", temperature=7),
            request("nowhere", model="nowhere"),
            request("streamed", stream=True),
            request("kept", cache_control={"type": "ephemeral"}),
        ]
    )
    assert batch.id.startswith("msgbatch_")
    assert (batch.type, batch.request_counts.processing, batch.results_url) == ("message_batch", 6, None)
    over = ended(claude, batch.id)
    assert over.ended_at is not None
    assert over.request_counts.to_dict() == {"canceled": 0, "errored": 3, "expired": 0, "processing": 0, "succeeded": 3}
    found = results_of(claude, batch.id)
    assert {custom_id: result.type for custom_id, result in found.items()} == {
        "plain": "succeeded",
        "tool": "succeeded",
        "wrong": "errored",
        "nowhere": "errored",
        "streamed": "errored",
        "kept": "succeeded",
    }
    message = found["plain"].message
    assert message.content[0].text == "Hello there, friend!"
    assert message.usage.service_tier == "batch"
    assert message.model_extra["x_nimbos"]["class"] == "batch"
    assert found["tool"].message.stop_reason == "tool_use"
    assert found["wrong"].error.error.type == "invalid_request_error"
    assert "temperature" in found["wrong"].error.error.message
    assert found["nowhere"].error.error.type == "not_found_error"
    assert "stream" in found["streamed"].error.error.message


def test_a_batch_is_cancelled_and_says_what_it_never_came_to(own: Live, claude: anthropic.Anthropic) -> None:
    many = [request(f"slow-{number}", "endless", max_tokens=400) for number in range(60)]
    batch = claude.messages.batches.create(requests=many)
    cancelled = claude.messages.batches.cancel(batch.id)
    assert cancelled.processing_status == "canceling"
    assert cancelled.cancel_initiated_at is not None
    assert claude.messages.batches.cancel(batch.id).id == batch.id  # twice is no error
    over = ended(claude, batch.id)
    counts = over.request_counts
    assert counts.canceled > 0
    assert counts.canceled + counts.succeeded == 60
    found = results_of(claude, batch.id)
    assert set(found) == {one["custom_id"] for one in many}
    assert [result.type for result in found.values()].count("canceled") == counts.canceled
    assert claude.messages.batches.cancel(batch.id).processing_status == "ended"
    name = f"{batch.id.replace('msgbatch', 'batch')}_error.jsonl"
    for errors in [file.id for file in own.client.files.list() if file.filename == name]:  # none, if it read no line
        own.client.files.delete(errors)  # counts are of the batch itself: a list of a thousand opens no file
    assert claude.messages.batches.list(limit=1).data[0].request_counts == counts
    finished = claude.messages.batches.create(requests=[request("one")])
    ended(claude, finished.id)
    with pytest.raises(anthropic.ConflictError):
        claude.messages.batches.cancel(finished.id)


def test_results_are_there_when_it_has_ended_and_not_before(claude: anthropic.Anthropic, own: Live) -> None:
    batch = claude.messages.batches.create(requests=[request("slow", "endless", max_tokens=1_000)])
    response = own.http.get(f"{BATCHES}/{batch.id}/results")
    assert response.status_code == 409
    assert response.json()["error"]["type"] == "conflict_error"
    with pytest.raises(anthropic.ConflictError):
        claude.messages.batches.delete(batch.id)
    claude.messages.batches.cancel(batch.id)
    ended(claude, batch.id)


def test_batches_are_listed_newest_first_and_in_pages(claude: anthropic.Anthropic) -> None:
    made = [claude.messages.batches.create(requests=[request("one")]).id for _ in range(3)]
    listed = [batch.id for batch in claude.messages.batches.list(limit=2)]
    assert listed[:3] == made[::-1]
    assert len(listed) == len(set(listed))
    page = claude.messages.batches.list(limit=1, before_id=made[0])
    assert [batch.id for batch in page.data] == [made[1]]
    assert page.has_more
    page = claude.messages.batches.list(limit=1, after_id=made[1])
    assert [batch.id for batch in page.data] == [made[0]]


def test_a_deleted_batch_is_gone_with_its_files(own: Live, claude: anthropic.Anthropic) -> None:
    batch = claude.messages.batches.create(requests=[request("one"), request("bad", temperature=5)])
    ended(claude, batch.id)
    before = {file.id for file in own.client.files.list()}
    deleted = claude.messages.batches.delete(batch.id)
    assert (deleted.id, deleted.type) == (batch.id, "message_batch_deleted")
    assert len(before - {file.id for file in own.client.files.list()}) == 3
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.batches.retrieve(batch.id)


def test_a_batch_that_is_one_too_many_leaves_no_file_behind(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "home", {"demo": DEMO}, batches=BatchSettings(open_batches=1)) as live,
        anthropic.Anthropic(base_url=live.url, api_key=OWNER_SECRET, max_retries=0, timeout=PATIENCE_S) as claude,
    ):
        batch = claude.messages.batches.create(requests=[request("slow", "endless", max_tokens=10_000)])
        with pytest.raises(anthropic.RateLimitError, match="open batches"):
            claude.messages.batches.create(requests=[request("more")])
        assert len(live.http.get("/v1/files").json()["data"]) == 1
        claude.messages.batches.cancel(batch.id)


def test_another_projects_batch_is_not_there(own: Live, claude: anthropic.Anthropic) -> None:
    batch = claude.messages.batches.create(requests=[request("one")])
    with anthropic.Anthropic(base_url=own.url, api_key="nb-other", max_retries=0) as other:
        for look in (other.messages.batches.retrieve, other.messages.batches.cancel, other.messages.batches.delete):
            with pytest.raises(anthropic.NotFoundError):
                look(batch.id)
        assert other.messages.batches.list().data == []
    assert own.client.batches.list().data == []  # nor is it one of the other dialect's


def test_params_over_several_lines_are_one_request(own: Live, claude: anthropic.Anthropic) -> None:
    body = json.dumps({"requests": [request("pretty", "umlaut")]}, indent=2).replace("\n", "\r\n")
    response = own.http.post(BATCHES, content=body)
    assert response.status_code == 200, response.text
    ended(claude, response.json()["id"])
    (result,) = results_of(claude, response.json()["id"]).values()
    assert result.message.content[0].text == "Grüße, 世界! 🌍 naïve"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"requests": []},
        {"requests": "x"},
        {"requests": [5]},
        {"requests": [{"custom_id": "x"}]},
        {"requests": [{"params": {}}]},
        {"requests": [request("")]},
        {"requests": [request("x" * 65)]},
        {"requests": [request('x"\n')]},
        {"requests": [request("same"), request("same")]},
        {"requests": [{"custom_id": "x", "params": []}]},
        {"requests": [{"custom_id": "x", "params": None}]},
    ],
    ids=lambda body: json.dumps(body)[:50],
)
def test_what_is_no_batch_is_told(own: Live, body: dict[str, Any]) -> None:
    response = own.post(BATCHES, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_batch_that_is_larger_than_a_body_may_be_is_refused_whole(own: Live, claude: anthropic.Anthropic) -> None:
    before = [batch.id for batch in claude.messages.batches.list(limit=1).data]
    with pytest.raises(anthropic.APIStatusError, match="at most 200000 bytes") as refused:
        claude.messages.batches.create(requests=[request(f"n{number}", "word " * 100) for number in range(400)])
    assert refused.value.status_code == 413
    body: Any = refused.value.body
    assert body["error"]["type"] == "request_too_large"
    assert [batch.id for batch in claude.messages.batches.list(limit=1).data] == before


def test_a_nest_without_end_is_told(own: Live) -> None:
    nest = b'{"requests": [{"custom_id": "x", "params": ' + b'{"a":' * 30_000 + b"1" + b"}" * 30_000 + b"}]}"
    assert own.http.post(BATCHES, content=nest).status_code in (200, 400, 413)
    assert own.http.get("/health").status_code == 200


@pytest.mark.parametrize("path", [f"{BATCHES}/none", f"{BATCHES}/msgbatch_none", f"{BATCHES}/batch_1/results"])
def test_a_batch_that_is_not_there_is_a_404_in_shape(own: Live, path: str) -> None:
    response = own.http.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


async def test_the_asynchronous_client_reads_results(own: Live, claude: anthropic.Anthropic) -> None:
    batch = claude.messages.batches.create(requests=[request("one")])
    ended(claude, batch.id)
    async with anthropic.AsyncAnthropic(base_url=own.url, api_key=OWNER_SECRET, max_retries=0) as client:
        found = [line async for line in await client.messages.batches.results(batch.id)]
    assert [line.custom_id for line in found] == ["one"]


# --- the lines of the files a batch leaves


@pytest.mark.parametrize(
    ("line", "result"),
    [
        (
            {"custom_id": "a", "response": {"status_code": 200, "request_id": "", "body": {"x": 1}}, "error": None},
            {"type": "succeeded", "message": {"x": 1}},
        ),
        (
            {"custom_id": "a", "response": {"status_code": 400, "request_id": "", "body": {"x": 1}}, "error": None},
            {"type": "errored", "error": {"x": 1}},
        ),
        (
            {"custom_id": "a", "response": None, "error": {"code": "batch_expired", "message": "x"}},
            {"type": "expired"},
        ),
        (
            {"custom_id": "a", "response": None, "error": {"code": "batch_cancelled", "message": "x"}},
            {"type": "canceled"},
        ),
    ],
)
def test_a_line_of_a_file_is_a_result(line: dict[str, Any], result: dict[str, Any]) -> None:
    content = json.dumps(line).encode()
    assert json.loads(result_of(content)) == {"custom_id": "a", "result": result}


def test_a_line_that_was_given_up_is_an_error_in_shape() -> None:
    line = {"custom_id": "a", "response": None, "error": {"code": "line_abandoned", "message": "Gone."}}
    result = json.loads(result_of(json.dumps(line).encode()))["result"]
    assert (result["type"], result["error"]["type"]) == ("errored", "error")
    assert result["error"]["error"]["message"] == "Gone."
    fault = json.loads(fault_of(b'{"custom_id": "b", "method": "POST", "url": "x", "body": {}}', "Too long."))
    assert (fault["custom_id"], fault["result"]["error"]["error"]["message"]) == ("b", "Too long.")

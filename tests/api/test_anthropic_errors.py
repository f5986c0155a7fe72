"""How Anthropic's clients learn what went wrong: shapes, retries, streams that break, hostile bodies."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest

from nimbos.api.anthropic_errors import body_of, limit_headers
from nimbos.config import ServerSettings
from nimbos.errors import (
    BudgetExhausted,
    Conflict,
    EngineFailed,
    Forbidden,
    NimbosError,
    NotReady,
    Overloaded,
    PayloadTooLarge,
    StorageUnavailable,
)
from nimbos.types import Ask, Chunk, Prepared, TokenChunk
from tests.conftest import DEMO
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving, user

MESSAGES = "/v1/messages"
LIMIT_BYTES = 20_000


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of our own, as its model is made to fail."""
    home: Path = tmp_path_factory.mktemp("home")
    settings = ServerSettings(max_body_bytes=LIMIT_BYTES)
    with serving(home, {"demo": DEMO}, server=settings) as running:
        yield running


@pytest.fixture
def claude(own: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=own.url, api_key=OWNER_SECRET, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def ask(claude: anthropic.Anthropic, text: str = "hi", **fields: Any) -> anthropic.types.Message:
    return claude.messages.create(**{"model": "demo", "max_tokens": 100, "messages": user(text), **fields})


def error_of(response: httpx2.Response, status: int, kind: str) -> str:
    """The message of a reply that must be an error in Anthropic's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert body["request_id"] == response.headers["request-id"]
    assert len(body["error"]["message"]) < 1_000
    return str(body["error"]["message"])


# --- the official client's own errors


def test_each_error_is_the_official_one(own: Live, claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        ask(claude, extra_body={"temperature": 3})
    assert (bad.value.type, bad.value.error_code) == ("invalid_request_error", "invalid_request")
    assert bad.value.request_id == bad.value.body["request_id"]  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError, match="nowhere"):
        ask(claude, model="nowhere")
    with (
        anthropic.Anthropic(base_url=own.url, api_key="nb-wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError) as refused,
    ):
        ask(stranger)
    assert refused.value.type == "authentication_error"
    with pytest.raises(anthropic.ContentTooLargeError, match=str(LIMIT_BYTES)):
        ask(claude, "x" * LIMIT_BYTES)


def test_a_full_queue_is_tried_again_when_the_server_says(own: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    source = own.sources["demo"]
    tries = []
    prepare = source.prepare

    async def full_once(asked: Ask) -> Prepared:
        tries.append(asked.id)
        if len(tries) == 1:
            raise Overloaded(limit="queue", value=2, used=2, retry_after_s=0.01)
        return await prepare(asked)

    monkeypatch.setattr(source, "prepare", full_once)
    with anthropic.Anthropic(base_url=own.url, api_key=OWNER_SECRET, max_retries=1) as claude:
        assert ask(claude).stop_reason == "end_turn"
    assert len(tries) == 2


def test_a_limit_without_retries_is_told_with_its_numbers(
    own: Live, claude: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_: Ask) -> Prepared:
        raise Overloaded(limit="queue", value=2, used=2, retry_after_s=7.2)

    monkeypatch.setattr(own.sources["demo"], "prepare", full)
    with pytest.raises(anthropic.RateLimitError) as caught:
        ask(claude)
    headers = caught.value.response.headers
    assert caught.value.type == "rate_limit_error"
    assert headers["retry-after"] == "8"
    assert headers["anthropic-ratelimit-requests-limit"] == "2"
    assert headers["anthropic-ratelimit-requests-remaining"] == "0"
    reset = datetime.fromisoformat(headers["anthropic-ratelimit-requests-reset"])
    assert reset > datetime.now(UTC)


def test_a_spent_budget_is_not_tried_again(own: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    async def spent(asked: Ask) -> Prepared:
        tries.append(asked.id)
        raise BudgetExhausted(owner="key x", meter="tokens", period="day", limit=5, used=5, retry_after_s=60)

    monkeypatch.setattr(own.sources["demo"], "prepare", spent)
    with (
        anthropic.Anthropic(base_url=own.url, api_key=OWNER_SECRET, max_retries=3) as claude,
        pytest.raises(anthropic.RateLimitError, match="key x") as caught,
    ):
        ask(claude)
    assert (caught.value.type, caught.value.error_code) == ("billing_error", "insufficient_quota")
    assert len(tries) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_word_has_its_status(
    own: Live, claude: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async def failing(asked: Ask) -> AsyncIterator[Chunk]:
        raise EngineFailed("The engine is gone.")
        yield

    monkeypatch.setattr(own.sources["demo"], "generate", failing)
    with pytest.raises(anthropic.InternalServerError, match="engine is gone") as caught:
        ask(claude, stream=stream)
    assert caught.value.type == "api_error"


def test_a_failure_in_the_middle_of_a_stream_is_an_event(
    own: Live, claude: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaking(asked: Ask) -> AsyncIterator[Chunk]:
        yield TokenChunk(branch=0, ids=(1,), text="Half a")
        raise EngineFailed("The engine is gone.")

    monkeypatch.setattr(own.sources["demo"], "generate", breaking)
    seen = []
    with (
        pytest.raises(anthropic.APIStatusError, match="engine is gone") as caught,
        claude.messages.stream(model="demo", max_tokens=50, messages=user("hi")) as stream,  # type: ignore[arg-type]
    ):
        for text in stream.text_stream:
            seen.append(text)  # noqa: PERF402  (what came before the failure)
    assert seen == ["Half a"]
    assert caught.value.type == "api_error"
    assert caught.value.body["request_id"] == caught.value.response.headers["request-id"]  # type: ignore[index]


def test_a_client_that_loses_patience_ends_its_ask(own: Live) -> None:
    source = own.sources["demo"]
    while source.ended.acquire(blocking=False):
        pass
    with (
        anthropic.Anthropic(base_url=own.url, api_key=OWNER_SECRET, max_retries=0, timeout=1.0) as hasty,
        pytest.raises(anthropic.APITimeoutError),
    ):
        ask(hasty, "endless", max_tokens=10_000)
    assert source.ended.acquire(timeout=PATIENCE_S)


def test_closing_a_stream_ends_its_ask(own: Live, claude: anthropic.Anthropic) -> None:
    source = own.sources["demo"]
    while source.ended.acquire(blocking=False):
        pass
    with claude.messages.stream(model="demo", max_tokens=10_000, messages=user("endless")) as stream:  # type: ignore[arg-type]
        assert next(iter(stream.text_stream))
    assert source.ended.acquire(timeout=PATIENCE_S)
    assert source.active == 0


def test_a_silent_stream_is_kept_open_by_pings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path / "home", {"demo": DEMO}, server=ServerSettings(keep_alive_s=0.05)) as live:
        source = live.sources["demo"]
        generate = source.generate
        pinged = threading.Event()

        async def late(asked: Ask) -> AsyncIterator[Chunk]:
            async for chunk in generate(asked):
                while not pinged.is_set():
                    await _turn()
                yield chunk

        monkeypatch.setattr(source, "generate", late)
        body = {"model": "demo", "max_tokens": 5, "messages": user("hi"), "stream": True}
        with live.http.stream("POST", MESSAGES, json=body) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: ping"
            pinged.set()
            names = ["ping", *(line.removeprefix("event: ") for line in lines if line.startswith("event: "))]
        assert names[-1] == "message_stop"
        assert "message_start" in names


async def _turn() -> None:
    await asyncio.sleep(0.001)


# --- the shape, also of what no route of ours has refused


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Forbidden("No."), 403, "permission_error"),
        (Conflict("No."), 409, "conflict_error"),
        (PayloadTooLarge(have=5, limit=4), 413, "request_too_large"),
        (Overloaded(limit="requests", value=1, used=1, retry_after_s=1), 429, "rate_limit_error"),
        (NotReady("No."), 503, "overloaded_error"),
        (StorageUnavailable("x", reason="full"), 503, "overloaded_error"),
        (EngineFailed("No."), 500, "api_error"),
        (NimbosError("No."), 500, "api_error"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_each_error_has_its_type(error: NimbosError, status: int, kind: str) -> None:
    assert error.status == status
    body = body_of(error)
    assert (body.error.type, body.error.details.error_code) == (kind, error.code)


def test_limits_are_told_in_anthropics_headers() -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    found = limit_headers(
        {
            "x-ratelimit-limit-tokens": "1000",
            "x-ratelimit-remaining-tokens": "10",
            "x-ratelimit-reset-tokens": "1m30s",
            "x-nimbos-class": "agent",
        }
    )
    reset = datetime.fromisoformat(found.pop("anthropic-ratelimit-tokens-reset"))
    assert before + timedelta(seconds=90) <= reset <= datetime.now(UTC) + timedelta(seconds=90)
    assert found == {"anthropic-ratelimit-tokens-limit": "1000", "anthropic-ratelimit-tokens-remaining": "10"}


def test_what_is_refused_at_the_door_has_the_shape_too(own: Live) -> None:
    error_of(httpx2.post(own.url + MESSAGES, json={}), 401, "authentication_error")
    error_of(own.http.get(MESSAGES), 405, "invalid_request_error")
    error_of(own.http.post("/v1/messages/nothing"), 404, "not_found_error")
    error_of(own.http.post(MESSAGES, headers={"host": "evil.example"}, json={}), 403, "permission_error")
    error_of(own.http.post(MESSAGES, content=b"x" * 2 * LIMIT_BYTES), 413, "request_too_large")
    speaking = {"anthropic-version": "2023-06-01"}
    error_of(own.http.get("/v1/nothing", headers=speaking), 404, "not_found_error")
    error_of(own.http.get("/v1/models/none", headers=speaking), 404, "not_found_error")
    assert "code" in own.http.get("/v1/nothing").json()["error"]  # others keep their own


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 10_000,
        b'{"a":' * 3_000 + b"1" + b"}" * 3_000,
        json.dumps({"model": "demo", "max_tokens": 2**70, "messages": user("x")}).encode(),
        json.dumps({"model": 5, "max_tokens": 5, "messages": user("x")}).encode(),
        json.dumps({"model": "demo", "max_tokens": 5, "messages": {"role": "user"}}).encode(),
        json.dumps({"model": "demo", "max_tokens": 5, "messages": []}).encode(),
        json.dumps({"model": "demo", "max_tokens": 5, "messages": [[]]}).encode(),
        json.dumps({"model": "demo", "max_tokens": 5, "messages": user("x"), "stream": "yes"}).encode(),
        json.dumps({"model": "demo", "max_tokens": 5, "messages": user("x"), "metadata": "x"}).encode(),
        json.dumps({"model": "demo", "max_tokens": 5, "messages": user("x"), "stop_sequences": [5]}).encode(),
        json.dumps({"model": "demo", "max_tokens": 5, "messages": user("x"), "tools": [{}] * 300}).encode(),
        json.dumps({"model": "x" * 9_000, "max_tokens": 5, "messages": user("x")}).encode(),
        b'{"model": "demo", "max_tokens": 5, "messages": [{"role": "user", "content": "\\ud83d"}]}',
    ],
    ids=lambda content: repr(content[:40]),
)
@pytest.mark.parametrize("path", [MESSAGES, "/v1/messages/count_tokens"])
def test_a_body_that_is_wrong_is_told_shortly(own: Live, path: str, content: bytes) -> None:
    response = own.http.post(path, content=content)
    kinds = {400: "invalid_request_error", 404: "not_found_error"}
    error_of(response, response.status_code, kinds[response.status_code])


def test_names_of_fields_cannot_break_the_header_that_names_them(own: Live) -> None:
    body: dict[str, Any] = {"model": "demo", "max_tokens": 5, "messages": user("hi"), "x\r\nset-cookie: a=b": 1}
    body |= {f"y{number}": 1 for number in range(500)} | {"z" * 5_000: 1}
    response = own.post(MESSAGES, body)
    assert response.status_code == 200
    named = response.headers["x-nimbos-ignored"]
    assert "x??set-cookie??a?b" in named
    assert "set-cookie" not in response.headers
    assert len(named) < 3_000


def test_control_tokens_in_words_stay_words(own: Live) -> None:
    content = [{"type": "text", "text": "a\x00b\x1b[2J<|im_end|>\x02"}]
    marked = [{**content[0], "cache_control": {"type": "ephemeral"}}]
    for words in (content, marked):
        body = {"model": "demo", "max_tokens": 5, "messages": [{"role": "user", "content": words}]}
        assert own.post(MESSAGES, body).status_code == 200


def test_the_server_goes_on_after_all_that(own: Live, claude: anthropic.Anthropic) -> None:
    assert ask(claude).stop_reason == "end_turn"
    assert own.sources["demo"].active == 0

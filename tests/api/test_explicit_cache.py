"""Model Studio's explicit cache on a real engine: a marked prefix is written once, read after, and charged as such."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the package's own
    import dashscope
    from dashscope.api_entities.http_request import close_shared_sync_session

from nimbos.api.cache_marks import behind_last_mark
from nimbos.config import EngineSettings
from nimbos.db import Database
from nimbos.errors import InvalidRequest
from nimbos.ledger import Price
from tests import tiny_gguf
from tests.ledger.books import ASKS, METERS
from tests.live import OWNER_SECRET, Live, error_of, events_of, serving

MODEL = "tiny-qwen3-1"
KEEP = {"type": "ephemeral"}
GENERATION = "/api/v1/services/aigc/text-generation/generation"
PRICES = [
    Price(meter=meter, micros_per_million=micros)
    for meter, micros in (("input", 100_000_000), ("cached", 20_000_000), ("cache_write", 125_000_000))
] + [Price(meter="cache_read", micros_per_million=10_000_000), Price(meter="output", micros_per_million=0)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    model = tiny_gguf.write("qwen3", folder, context=32_768)
    engine = EngineSettings(threads=1, cells=32_768, sequences=16)
    with serving(folder / "home", models=(model,), engine=engine) as running:
        yield running


@pytest.fixture
def official(tiny: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dashscope, "base_http_api_url", f"{tiny.url}/api/v1")
    monkeypatch.setattr(dashscope, "api_key", OWNER_SECRET)
    yield
    close_shared_sync_session()


def marked(rules: str, question: str) -> list[Any]:
    return [
        {"role": "system", "content": [{"type": "text", "text": rules, "cache_control": KEEP}]},
        {"role": "user", "content": question},
    ]


def details_of(completion: openai.types.chat.ChatCompletion) -> tuple[int, int, int]:
    """(prompt, written, read)."""
    assert completion.usage is not None
    details = completion.usage.prompt_tokens_details
    assert details is not None
    more = details.model_extra or {}
    assert more["cache_type"] == "ephemeral"
    assert more["cache_creation"] == {"ephemeral_5m_input_tokens": more["cache_creation_input_tokens"]}
    assert details.cached_tokens is not None
    return completion.usage.prompt_tokens, more["cache_creation_input_tokens"], details.cached_tokens


def test_openais_package_is_told_what_was_written_and_read(tiny: Live) -> None:
    def ask(question: str) -> Any:
        return tiny.client.chat.completions.create(
            model=MODEL, messages=marked("You are a careful helper. " * 20, question), max_tokens=4, temperature=0
        )

    prompt, written, read = details_of(ask("hello one"))
    assert written > 100
    assert read < 10
    assert 0 < prompt - written - read < 60
    again_prompt, again_written, again_read = details_of(ask("other two"))
    assert again_written == 0
    assert again_read >= written + read
    assert abs(again_prompt - prompt) <= 4


def test_what_is_not_marked_is_told_as_ever(tiny: Live) -> None:
    plain = tiny.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": [{"type": "text", "text": "plain words"}]}], max_tokens=2
    )
    assert plain.usage is not None and plain.usage.prompt_tokens_details is not None
    assert not plain.usage.prompt_tokens_details.model_extra


def test_a_stream_and_the_compatible_path_tell_the_same(tiny: Live) -> None:
    body = {
        "model": MODEL,
        "messages": marked("Streams have rules, too. " * 20, "hi"),
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first, second = (
        events_of(tiny.post("/compatible-mode/v1/chat/completions", body))[-1]["usage"]["prompt_tokens_details"]
        for _ in range(2)
    )
    assert first["cache_creation_input_tokens"] > 100
    assert second["cache_creation_input_tokens"] == 0
    assert second["cached_tokens"] >= first["cache_creation_input_tokens"]


@pytest.mark.usefixtures("official")
def test_dashscopes_package_is_told_what_was_written_and_read() -> None:
    def ask(question: str) -> Any:
        response = dashscope.Generation.call(
            model=MODEL, messages=marked("DashScope has its rules. " * 20, question), max_tokens=4
        )
        assert response.status_code == 200, response
        return response.usage["prompt_tokens_details"], response.usage["input_tokens"]

    first, tokens = ask("hello one")
    written = first["cache_creation_input_tokens"]
    assert first["cache_creation"] == {"ephemeral_5m_input_tokens": written}
    assert 100 < written < tokens
    again, _ = ask("other two")
    assert again["cache_creation_input_tokens"] == 0
    assert again["cached_tokens"] >= written


@pytest.mark.usefixtures("official")
def test_dashscopes_streams_tell_it_with_each_event() -> None:
    pieces = list(
        dashscope.Generation.call(
            model=MODEL, messages=marked("Streams of events. " * 30, "hi"), max_tokens=4, stream=True
        )
    )
    written = {piece.usage["prompt_tokens_details"]["cache_creation_input_tokens"] for piece in pieces[-2:]}
    assert len(written) == 1
    assert written.pop() > 100


def test_it_is_charged_as_what_it_was(tmp_path: Path) -> None:
    """Written at a premium, read at the discount of a marked prefix; what is behind the marker as ever."""
    model = tiny_gguf.write("qwen3", tmp_path, context=32_768)
    engine = EngineSettings(threads=1, cells=32_768, sequences=16)
    with serving(tmp_path / "home", models=(model,), engine=engine, database_url="") as live:
        prices = [{"meter": price.meter, "micros_per_million": price.micros_per_million} for price in PRICES]
        assert live.post("/v1/organization/prices", {"prices": prices}).status_code == 200
        told = [
            details_of(
                live.client.chat.completions.create(
                    model=MODEL, messages=marked("Rules that cost. " * 30, question), max_tokens=2
                )
            )
            for question in ("hello one", "other two")
        ]
        settings = live.settings

    async def books() -> tuple[list[Any], list[Any]]:
        database = await Database.open(settings)
        try:
            return list(await database.read(ASKS())), list(await database.read(METERS()))
        finally:
            await database.close()

    asks, meters = asyncio.run(books())
    for row, (prompt, written, read) in zip(asks, told, strict=True):
        by_meter = {one["meter"]: one["quantity"] for one in meters if one["ask"] == row["id"]}
        from_mark = by_meter.get("cache_read", 0)
        assert by_meter.get("cache_write", 0) == written
        assert from_mark + by_meter.get("cached", 0) == read
        assert by_meter["input"] == prompt - written - read
        assert row["cost_micros"] == 100 * by_meter["input"] + 125 * written + 10 * from_mark + 20 * (read - from_mark)
    assert asks[1]["cost_micros"] < asks[0]["cost_micros"] / 3


@pytest.mark.parametrize("marker", [{"type": "forever"}, {"type": "ephemeral", "ttl": "1d"}, "ephemeral", 5], ids=str)
def test_a_marker_that_is_none_is_refused_by_its_place(tiny: Live, marker: Any) -> None:
    part = {"type": "text", "text": "hi", "cache_control": marker}
    messages = [{"role": "user", "content": [part]}]
    refused = error_of(tiny.post("/v1/chat/completions", {"model": MODEL, "messages": messages}), 400)
    assert refused["param"] == "messages[0].content[0].cache_control"
    own = tiny.post(GENERATION, {"model": MODEL, "input": {"messages": messages}})
    assert own.status_code == 400
    assert "input.messages[0].content[0].cache_control" in json.loads(own.content)["message"]


def test_the_last_of_all_markers_counts() -> None:
    part: dict[str, Any] = {"type": "text", "text": "a"}
    messages: list[Any] = [
        {"role": "system", "content": "no parts"},
        {"role": "user", "content": [{**part, "cache_control": KEEP}, part]},
        {"role": "user", "content": [part, {**part, "cache_control": KEEP}, {**part, "cache_control": None}]},
    ]
    changed = behind_last_mark(messages)
    assert changed is not None
    assert changed[:2] == messages[:2]
    assert [one["text"] for one in changed[2]["content"]] == ["a", "a", "\x02", "a"]
    assert behind_last_mark([{"role": "user", "content": [part]}, {"role": "user"}]) is None
    with pytest.raises(InvalidRequest, match="five minutes"):
        behind_last_mark([{"role": "user", "content": [{**part, "cache_control": {}}]}])

"""Anthropic's Messages on a real engine process with tiny random models: what is in memory, and what is charged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from nimbos.config import EngineSettings, ServerSettings
from tests import tiny_gguf
from tests.api.test_anthropic import events_in
from tests.api.test_anthropic_client import RECORD
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving, user

MODEL = "tiny-qwen3-1"
KEEP = {"type": "ephemeral"}
RULES = "You are a careful helper. " * 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    model = tiny_gguf.write("qwen3", folder, context=32_768)
    engine = EngineSettings(threads=1, cells=32_768, sequences=16)
    aliases = {RECORD["body"]["model"]: MODEL}
    with serving(folder / "home", models=(model,), engine=engine, server=ServerSettings(aliases=aliases)) as running:
        yield running


@pytest.fixture(scope="module")
def claude(tiny: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=tiny.url, api_key=OWNER_SECRET, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def ask(claude: anthropic.Anthropic, text: str, **fields: Any) -> anthropic.types.Message:
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "messages": user(text), "extra_body": {"temperature": 0}}
    return claude.messages.create(**{**given, **fields})


def parts_of(usage: anthropic.types.Usage) -> tuple[int, int, int]:
    assert usage.cache_creation_input_tokens is not None
    assert usage.cache_read_input_tokens is not None
    assert usage.cache_creation is not None
    assert usage.cache_creation.ephemeral_5m_input_tokens == usage.cache_creation_input_tokens
    return usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens


def test_what_was_in_memory_is_read_and_not_input(claude: anthropic.Anthropic) -> None:
    first = ask(claude, "one", system="Plain rules. " * 20).usage
    again = ask(claude, "two", system="Plain rules. " * 20).usage
    assert parts_of(first)[1] == 0
    assert parts_of(first)[2] < 10  # what every prompt begins with
    _, written, read = parts_of(again)
    assert written == 0
    assert read > 200
    assert abs(sum(parts_of(again)) - sum(parts_of(first))) <= 2  # "one" and "two" are other tokens


def test_a_marked_prefix_is_written_once_and_read_after(tiny: Live, claude: anthropic.Anthropic) -> None:
    system: Any = [{"type": "text", "text": RULES, "cache_control": KEEP}]
    first = ask(claude, "hello one", system=system)
    again = ask(claude, "other two", system=system)
    input_tokens, written, read = parts_of(first.usage)
    assert read < 10
    assert written > 100
    assert 0 < input_tokens < 60
    _, after_written, after_read = parts_of(again.usage)
    assert after_written == 0
    assert after_read >= written + read
    counted = claude.messages.count_tokens(model=MODEL, system=system, messages=user("hello one"))  # type: ignore[arg-type]
    assert counted.input_tokens == sum(parts_of(first.usage))
    receipt = (again.model_extra or {})["x_nimbos"]
    assert receipt["cached_tokens"] == after_read


def test_the_marker_ends_where_it_stands(claude: anthropic.Anthropic) -> None:
    """What is behind it is input, not written."""
    words = "A long question about nothing. " * 10
    marked: Any = [{"type": "text", "text": words, "cache_control": KEEP}, {"type": "text", "text": "short"}]
    plain: Any = [{"type": "text", "text": words}, {"type": "text", "text": "short"}]
    messages: Any = [{"role": "user", "content": marked}]
    input_tokens, written, read = parts_of(ask(claude, "", messages=messages).usage)
    whole = claude.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": plain}]).input_tokens
    assert input_tokens + written + read == whole
    assert written > 150
    tail = claude.messages.count_tokens(model=MODEL, messages=user("short")).input_tokens  # type: ignore[arg-type]
    assert abs(input_tokens - tail) <= 5


def test_a_stream_tells_the_same_usage_from_its_start(tiny: Live, claude: anthropic.Anthropic) -> None:
    system = [{"type": "text", "text": "Other rules. " * 30, "cache_control": KEEP}]
    body = {"model": MODEL, "max_tokens": 4, "system": system, "messages": user("hi"), "stream": True}
    for _ in range(2):
        events = events_in(tiny.post("/v1/messages", body).text)
        (start,) = (data["message"]["usage"] for name, data in events if name == "message_start")
        (end,) = (data["usage"] for name, data in events if name == "message_delta")
        names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "cache_creation")
        assert {name: start[name] for name in names} == {name: end[name] for name in names}
    assert start["cache_read_input_tokens"] > 50


def test_greedy_words_are_those_of_the_other_dialect(tiny: Live, claude: anthropic.Anthropic) -> None:
    message = ask(claude, "hello world")
    other = tiny.client.chat.completions.create(
        model=MODEL,
        messages=user("hello world"),
        temperature=0,
        max_tokens=8,
        extra_body={"enable_thinking": False},  # type: ignore[arg-type]
    )
    assert "".join(block.text for block in message.content if block.type == "text") == other.choices[0].message.content
    assert message.stop_reason == "max_tokens"
    assert other.usage is not None
    assert sum(parts_of(message.usage)) == other.usage.prompt_tokens


def test_thinking_is_a_block_of_its_own_within_its_budget(claude: anthropic.Anthropic) -> None:
    message = ask(claude, "hello", max_tokens=120, thinking={"type": "enabled", "budget_tokens": 40})
    assert [block.type for block in message.content] == ["thinking", "text"]
    details = message.usage.output_tokens_details
    assert details is not None
    assert 0 < details.thinking_tokens <= 40


def test_a_forced_tool_is_called_with_what_its_schema_asks(claude: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    tools: Any = [{"name": "decide", "description": "Decides.", "input_schema": schema}]
    message = ask(claude, "Decide!", max_tokens=60, tools=tools, tool_choice={"type": "tool", "name": "decide"})
    assert message.stop_reason == "tool_use"
    (call,) = message.content
    assert call.type == "tool_use"
    assert isinstance(call.input["yes"], bool)


def test_an_answer_goes_on_in_the_middle(claude: anthropic.Anthropic) -> None:
    """The tokens after a prefill are those the model itself would write there."""
    whole = ask(claude, "hello world", max_tokens=12)
    text = "".join(block.text for block in whole.content if block.type == "text")
    start = next(
        text[:end] for end in range(len(text) // 2, len(text)) if text[:end] == text[:end].rstrip() and text[:end]
    )
    messages: Any = [*user("hello world"), {"role": "assistant", "content": start}]
    rest = ask(claude, "", messages=messages, max_tokens=40)
    assert rest.usage.output_tokens == 40
    assert sum(parts_of(rest.usage)) > sum(parts_of(whole.usage))


def test_the_coding_clients_request_compiles_and_is_answered(tiny: Live) -> None:
    """All its tools become one grammar; twice, and the second time its prompt is in memory."""
    body = {**RECORD["body"], "max_tokens": 30, "thinking": {"type": "enabled", "budget_tokens": 10}}
    for _ in range(2):
        response = tiny.http.post(RECORD["path"], json=body, headers=RECORD["headers"])
        assert response.status_code == 200, response.text
        events = events_in(response.text)
        assert events[-1][0] == "message_stop", events[-1]
        (end,) = (data for name, data in events if name == "message_delta")
    usage = end["usage"]
    assert usage["cache_read_input_tokens"] > 0.9 * sum(
        usage[name] for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    )


def test_a_prompt_that_does_not_fit_names_both_counts(claude: anthropic.Anthropic) -> None:
    long = "word " * 40_000
    marked: Any = [{"type": "text", "text": long, "cache_control": KEEP}]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
        ask(claude, "hi", system=marked)


def test_json_of_a_schema_is_what_comes(claude: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = ask(claude, "json", max_tokens=60, output_config=wanted)
    if message.stop_reason == "end_turn":
        assert isinstance(json.loads(message.content[0].text)["a"], int)  # type: ignore[union-attr]
    else:
        assert message.content[0].text.startswith('{"a": ')  # type: ignore[union-attr]

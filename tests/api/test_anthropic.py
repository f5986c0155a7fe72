"""Anthropic's Messages with its official client, on a real server with the scripted model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pydantic
import pytest
from anthropic import beta_tool

from nimbos.config import ServerSettings
from tests.conftest import DEMO, WEATHER_CALL
from tests.live import OWNER_SECRET, PATIENCE_S, Live, serving, user

TOOLS: Any = [
    {
        "name": name,
        "description": "Tells it.",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    }
    for name in ("get_weather", "get_time")
]


@pytest.fixture(scope="module")
def claude(live: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=live.url, api_key=OWNER_SECRET, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def ask(claude: anthropic.Anthropic, text: str, **fields: Any) -> anthropic.types.Message:
    return claude.messages.create(**{"model": "demo", "max_tokens": 1000, "messages": user(text), **fields})


def test_answers_with_text_usage_and_receipt(claude: anthropic.Anthropic) -> None:
    raw = claude.messages.with_raw_response.create(model="demo", max_tokens=100, messages=user("hi you"))  # type: ignore[arg-type]
    message = raw.parse()
    assert (message.type, message.role, message.model) == ("message", "assistant", "demo")
    (block,) = message.content
    assert block.to_dict() == {"type": "text", "text": "Hello there, friend!", "citations": None}
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (2, 0, 0)
    assert usage.output_tokens == 5
    assert usage.service_tier == "standard"
    receipt = (message.model_extra or {})["x_nimbos"]
    assert raw.headers["x-nimbos-ask-id"] == receipt["ask_id"]
    digits = receipt["ask_id"].removeprefix("ask_")
    assert (message.id, message._request_id) == (f"msg_{digits}", f"req_{digits}")


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": user("hi")},
        {"messages": user("count"), "stop_sequences": ["thr"]},
        {"messages": user("count"), "max_tokens": 3},
        {"messages": user("think"), "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"messages": user("think"), "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}},
        {"messages": user("weather?"), "tools": TOOLS},
        {"messages": user("two calls"), "tools": TOOLS},
        {"messages": user("umlaut")},
        {"messages": user("count"), "max_tokens": 0},
    ],
    ids=lambda fields: json.dumps(fields)[14:70],
)
def test_a_stream_and_a_whole_reply_say_the_same(claude: anthropic.Anthropic, fields: dict[str, Any]) -> None:
    given = {"model": "demo", "max_tokens": 2000, **fields}
    whole = claude.messages.create(**given)
    with claude.messages.stream(**given) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.type == "message"
    ours, theirs = (
        message.to_dict(mode="json")
        | {"id": "", "x_nimbos": None, "stop_details": None}
        | {"usage": message.usage.to_dict() | {"cache_creation": None}}
        for message in (whole, streamed)
    )
    assert [block | {"id": ""} for block in ours.pop("content")] == [
        block | {"id": ""} for block in theirs.pop("content")
    ]
    assert ours == theirs


def test_the_events_of_a_stream_come_in_the_official_order(live: Live) -> None:
    body = {
        "model": "demo",
        "max_tokens": 2000,
        "stream": True,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "messages": user("think"),
    }
    events = events_in(live.post("/v1/messages", body).text)
    assert [name for name, _ in events if name != "content_block_delta"] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_stop",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(data["type"] == name for name, data in events)
    deltas = [(data["index"], data["delta"]["type"]) for name, data in events if name == "content_block_delta"]
    assert deltas == [*[(0, "thinking_delta")] * 6, (0, "signature_delta"), *[(1, "text_delta")] * 3]
    (start,) = (data for name, data in events if name == "message_start")
    assert start["message"]["usage"]["input_tokens"] == 1
    assert start["message"]["content"] == []


def events_in(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Each event's name and data."""
    found = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


# --- why an answer stopped


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic) -> None:
    message = ask(claude, "count", stop_sequences=["four", "thr"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "thr")
    assert text_of(message) == "one, two, "


def test_the_limit_on_tokens_is_told(claude: anthropic.Anthropic) -> None:
    message = ask(claude, "count", max_tokens=3)
    assert (message.stop_reason, text_of(message)) == ("max_tokens", "one, two")
    assert message.usage.output_tokens == 3


def test_an_answer_that_fills_the_context_says_so(claude: anthropic.Anthropic) -> None:
    message = ask(claude, "flood", max_tokens=1_000_000)
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.input_tokens + message.usage.output_tokens == 32_768


def test_no_tokens_at_all_only_warm_the_cache(claude: anthropic.Anthropic) -> None:
    message = ask(claude, "count", max_tokens=0)
    assert (message.content, message.stop_reason) == ([], "max_tokens")
    assert message.usage.output_tokens == 1  # the engine cannot compute a prompt without one


# --- tools


def test_a_tool_is_called_and_its_result_answered(claude: anthropic.Anthropic) -> None:
    first = ask(claude, "What is the weather?", tools=TOOLS)
    assert first.stop_reason == "tool_use"
    (call,) = first.content
    assert call.type == "tool_use"
    assert (call.name, call.input) == (WEATHER_CALL["name"], WEATHER_CALL["arguments"])
    assert call.id.startswith("toolu_")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "21 degrees"}]}
    messages: Any = [
        *user("What is the weather?"),
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = claude.messages.create(model="demo", max_tokens=100, messages=messages, tools=TOOLS)
    assert (text_of(second), second.stop_reason) == ("It is 21 degrees.", "end_turn")


def test_the_tool_runner_runs_tools_to_the_end(claude: anthropic.Anthropic) -> None:
    cities = []

    @beta_tool
    def get_weather(city: str, days: int) -> str:
        """Tells the weather.

        Args:
            city: Where.
            days: For how long.
        """
        cities.append((city, days))
        return "21 degrees"

    runner = claude.beta.messages.tool_runner(
        model="demo",
        max_tokens=500,
        tools=[get_weather],
        messages=user("weather?"),  # type: ignore[arg-type]
    )
    last = runner.until_done()
    assert cities == [("Paris", 2)]
    assert last.content[0].text == "It is 21 degrees."  # type: ignore[union-attr]


def test_calls_stream_as_pieces_of_json(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model="demo", max_tokens=500, messages=user("two calls"), tools=TOOLS) as stream:  # type: ignore[arg-type]
        seen = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
    assert [block.input for block in message.content if block.type == "tool_use"] == [WEATHER_CALL["arguments"], {}]
    assert len(seen) > 2


def test_a_call_that_was_cut_keeps_what_was_whole(claude: anthropic.Anthropic) -> None:
    message = ask(claude, "weather", tools=TOOLS, max_tokens=27)
    (call,) = message.content
    assert message.stop_reason == "max_tokens"
    assert call.type == "tool_use"
    assert call.input == {"city": "Paris"}


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        ({"type": "auto"}, {"get_weather", "get_time"}),
        ({"type": "any"}, {"get_weather", "get_time"}),
        ({"type": "tool", "name": "get_time"}, {"get_time"}),
        ({"type": "none"}, set()),
    ],
)
def test_every_tool_choice_is_taken(
    live: Live, claude: anthropic.Anthropic, choice: dict[str, str], allowed: set[str]
) -> None:
    ask(claude, "two calls", tools=TOOLS, tool_choice=choice)
    grammar = live.sources["demo"].asks[-1].grammar
    named = {tool["name"] for tool in TOOLS if grammar is not None and tool["name"] in grammar.source}
    assert named == allowed


def test_parallel_calls_can_be_switched_off(live: Live, claude: anthropic.Anthropic) -> None:
    ask(claude, "two calls", tools=TOOLS, tool_choice={"type": "any"})
    many = live.sources["demo"].asks[-1].grammar
    ask(claude, "two calls", tools=TOOLS, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    one = live.sources["demo"].asks[-1].grammar
    assert many is not None
    assert one is not None
    assert many.source != one.source


# --- thinking


def test_who_does_not_ask_for_thinking_gets_none(claude: anthropic.Anthropic) -> None:
    assert [block.type for block in ask(claude, "think").content] == ["text"]


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True),
        ({"thinking": {"type": "between_tools"}}, True),
        ({"thinking": {"type": "adaptive"}}, False),  # the rule finds the question easy
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, False),
        ({"output_config": {"effort": "low"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}, False),
    ],
    ids=str,
)
def test_thinking_is_as_the_request_says(claude: anthropic.Anthropic, fields: dict[str, Any], thinks: bool) -> None:
    message = ask(claude, "think", **fields)
    assert [block.type for block in message.content] == (["thinking", "text"] if thinks else ["text"])
    details = message.usage.output_tokens_details
    assert details is not None
    assert details.thinking_tokens == (6 if thinks else 0)


def test_a_thinking_budget_is_kept(claude: anthropic.Anthropic) -> None:
    message = ask(claude, "think", thinking={"type": "enabled", "budget_tokens": 2})
    assert message.content[0].thinking == "Let me"  # type: ignore[union-attr]


def test_hidden_thinking_is_computed_signed_and_not_shown(claude: anthropic.Anthropic) -> None:
    shown = ask(claude, "think", thinking={"type": "enabled", "budget_tokens": 1024})
    hidden = ask(claude, "think", thinking={"type": "enabled", "budget_tokens": 1024, "display": "omitted"})
    assert shown.content[0].signature == hidden.content[0].signature  # type: ignore[union-attr]
    assert hidden.content[0].thinking == ""  # type: ignore[union-attr]
    assert hidden.usage.output_tokens == shown.usage.output_tokens


def test_thinking_is_taken_back_with_any_signature(live: Live, claude: anthropic.Anthropic) -> None:
    messages: Any = [
        *user("Is it so?"),
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Surely.", "signature": "of another server"},
                {"type": "redacted_thinking", "data": "opaque"},
                {"type": "text", "text": "Yes."},
            ],
        },
        *user("hi"),
    ]
    claude.messages.create(model="demo", max_tokens=100, messages=messages)
    prompt = prompt_of(live)
    assert prompt[1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "Surely."}


def test_an_answer_can_be_sent_back_as_it_came(live: Live, claude: anthropic.Anthropic) -> None:
    first = ask(claude, "think", thinking={"type": "enabled", "budget_tokens": 1024})
    messages: Any = [*user("think"), {"role": "assistant", "content": first.content}, *user("hi")]
    raw = claude.messages.with_raw_response.create(model="demo", max_tokens=100, messages=messages)
    assert raw.parse().stop_reason == "end_turn"
    assert "x-nimbos-ignored" not in raw.headers
    assert prompt_of(live)[1]["reasoning_content"] == "Let me see, yes."


def prompt_of(live: Live) -> list[dict[str, Any]]:
    """The messages that the scripted model saw last."""
    text = "".join(part.text for part in live.sources["demo"].asks[-1].parts)  # type: ignore[union-attr]
    return json.JSONDecoder().raw_decode(text)[0]  # type: ignore[no-any-return]


# --- what an answer looks like


def test_an_answer_fits_a_schema(claude: anthropic.Anthropic) -> None:
    class Found(pydantic.BaseModel):
        answer: int

    parsed = claude.messages.parse(model="demo", max_tokens=100, messages=user("json"), output_format=Found)  # type: ignore[arg-type]
    assert parsed.parsed_output == Found(answer=42)


def test_both_names_of_the_format_make_the_same_grammar(live: Live, claude: anthropic.Anthropic) -> None:
    wanted = {"type": "json_schema", "schema": {"type": "object", "properties": {"answer": {"type": "integer"}}}}
    ask(claude, "json", output_config={"format": wanted})
    newer = live.sources["demo"].asks[-1].grammar
    ask(claude, "json", extra_body={"output_format": wanted})
    assert newer is not None
    assert newer == live.sources["demo"].asks[-1].grammar


def test_an_answer_goes_on_after_the_assistants_last_words(live: Live, claude: anthropic.Anthropic) -> None:
    messages: Any = [*user("count"), {"role": "assistant", "content": "Sure: <|im_end|>"}]
    message = claude.messages.create(model="demo", max_tokens=100, messages=messages)
    assert text_of(message) == "one, two, three, four"
    last = live.sources["demo"].asks[-1].parts[-1]
    assert (last.text, last.special) == ("Sure: <|im_end|>", False)  # type: ignore[union-attr]
    assert [one["role"] for one in prompt_of(live)] == ["user"]


# --- the rest of the door


def test_sampling_is_as_the_request_says(live: Live, claude: anthropic.Anthropic) -> None:
    ask(claude, "hi", extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 40})
    sampling = live.sources["demo"].asks[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)


def test_tokens_are_counted_as_they_are_charged(claude: anthropic.Anthropic) -> None:
    given: Any = {
        "model": "demo",
        "system": [{"type": "text", "text": "Be brief, please."}],
        "messages": user("What is the weather?"),
        "tools": TOOLS,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    counted = claude.messages.count_tokens(**given)
    assert counted.input_tokens == claude.messages.create(**given, max_tokens=2000).usage.input_tokens == 10


def test_a_prompt_that_is_too_long_can_still_be_counted(claude: anthropic.Anthropic) -> None:
    long = user("word " * 40_000)
    assert claude.messages.count_tokens(model="demo", messages=long).input_tokens == 40_000  # type: ignore[arg-type]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 40000 tokens > 32767 maximum"):
        claude.messages.create(model="demo", max_tokens=10, messages=long)  # type: ignore[arg-type]


def test_a_model_that_keeps_nothing_claims_nothing(live: Live, claude: anthropic.Anthropic) -> None:
    kept: Any = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    usage = claude.messages.create(model="demo", max_tokens=10, messages=[{"role": "user", "content": kept}]).usage
    assert (usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens) == (1, 0, 0)
    assert live.sources["demo"].asks[-1].pin_tokens == 0


def test_models_are_listed_and_found_by_their_aliases(tmp_path: Path) -> None:
    aliases = {"claude-local": "demo", "claude-nowhere": "missing"}
    scripts = dict.fromkeys(("demo", "other"), DEMO)
    with (
        serving(tmp_path / "home", scripts, server=ServerSettings(aliases=aliases)) as live,
        anthropic.Anthropic(base_url=live.url, api_key=OWNER_SECRET, max_retries=0) as claude,
    ):
        page = claude.models.list()
        assert [model.id for model in page.data] == ["demo", "other", "claude-local"]
        assert page.data[0].created_at.year > 2000
        assert [model.id for model in claude.models.list(limit=1)] == ["demo", "other", "claude-local"]
        assert [model.id for model in claude.models.list(limit=1, before_id="claude-local").data] == ["other"]
        assert claude.models.retrieve("claude-local").display_name == "claude-local (demo)"
        with pytest.raises(anthropic.NotFoundError, match="claude-nowhere"):
            claude.models.retrieve("claude-nowhere")
        with pytest.raises(anthropic.BadRequestError, match="limit"):
            claude.models.list(limit=0)
        assert live.client.models.list().data[0].owned_by == "scripted"  # others read OpenAI's form
        message = claude.messages.create(model="claude-local", max_tokens=9, messages=user("hi"))  # type: ignore[arg-type]
        assert message.model == "claude-local"
        assert (message.model_extra or {})["x_nimbos"]["model_hash"] == live.sources["demo"].card.model_hash


async def test_the_asynchronous_client_asks_and_streams(live: Live) -> None:
    async with anthropic.AsyncAnthropic(base_url=live.url, api_key=OWNER_SECRET, max_retries=0) as claude:
        message = await claude.messages.create(model="demo", max_tokens=100, messages=user("hi"))  # type: ignore[arg-type]
        assert text_of(message) == "Hello there, friend!"
        async with claude.messages.stream(model="demo", max_tokens=100, messages=user("count")) as stream:  # type: ignore[arg-type]
            assert "".join([text async for text in stream.text_stream]) == "one, two, three, four"


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")

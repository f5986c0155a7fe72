"""`POST /v1/responses` with the official client: answers, events, tools, thinking, formats, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from nimbos.api import responses_fit
from nimbos.api.responses_request import REFUSED
from nimbos.config import EngineSettings
from tests import tiny_gguf
from tests.api.responses_events import events_of, texts, whole
from tests.live import Live, error_of, serving

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "strict": False,
}
CLOCK: dict[str, Any] = {"type": "function", "name": "get_time", "parameters": None, "strict": None}
TINY = "tiny-qwen2-1"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    engine = EngineSettings(threads=1, cells=4096, sequences=16)
    with serving(folder / "home", models=(tiny_gguf.write("qwen2", folder),), engine=engine) as running:
        yield running


def ask(live: Live, **fields: Any) -> Any:
    return live.post("/v1/responses", {"model": "demo", "input": "hi", **fields})


def test_an_answer_has_the_official_shape_and_repeats_its_request(live: Live) -> None:
    fields = {
        "instructions": "Be kind.",
        "metadata": {"trace": "7"},
        "temperature": 0.5,
        "top_p": 0.9,
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "max_output_tokens": 100,
        "max_tool_calls": 3,
        "parallel_tool_calls": False,
        "truncation": "auto",
        "tools": [WEATHER],
        "tool_choice": "none",
        "service_tier": "priority",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
    }
    response = whole(ask(live, **fields))
    assert texts(response) == ["Hello there, friend!"]
    assert response["status"] == "completed"
    assert response["error"] is response["incomplete_details"] is response["previous_response_id"] is None
    for name, value in fields.items():
        assert response[name] == value, name
    assert response["store"] is True
    assert response["background"] is False
    receipt = response["x_nimbos"]["receipt"]
    assert receipt["class"] == "interactive"
    assert response["completed_at"] >= response["created_at"]


def test_the_official_client_reads_it(live: Live) -> None:
    response = live.client.responses.create(model="demo", input=[{"role": "user", "content": "count"}])
    assert response.output_text == "one, two, three, four"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (1, 7, 8)


@pytest.mark.parametrize(
    "fields",
    [
        {"input": "count"},
        {"input": "umlaut"},
        {"input": "please think", "reasoning": {"effort": "low"}},
        {"input": "please think", "reasoning": {"effort": "low", "summary": "auto"}},
        {"input": "please think", "include": ["reasoning.encrypted_content"], "enable_thinking": True},
        {"input": "two calls", "tools": [WEATHER, CLOCK]},
        {"input": "count", "max_output_tokens": 3},
        {"input": "please think", "reasoning": {"effort": "low"}, "max_output_tokens": 3},
        {"input": "weather", "tools": [WEATHER], "max_output_tokens": 12},
    ],
)
def test_a_stream_adds_up_to_the_reply(live: Live, fields: dict[str, Any]) -> None:
    reply = whole(ask(live, **fields))
    events = events_of(ask(live, stream=True, **fields))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    told = events[-1]["response"]
    assert events[-1]["type"] == f"response.{told['status']}"
    assert timeless(told) == timeless(reply)
    assert folded(events) == told["output"]


def timeless(response: dict[str, Any]) -> dict[str, Any]:
    """Without what no two answers share: ids, times, seeds."""
    output = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")} for item in response["output"]
    ]
    kept = ("status", "incomplete_details", "usage", "error", "model", "reasoning", "text", "tools")
    return {"output": output, **{name: response[name] for name in kept}}


def folded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as a client puts them together from the deltas alone; each `done` event agrees with them."""
    items: list[dict[str, Any]] = []
    text = ""
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            text = ""
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[-1]["id"]
            text += event["delta"]
        elif kind.endswith((".done", "part.added")) and kind != "output_item.done":
            said = event.get("text", event.get("arguments"))
            assert said is None or said == text
        elif kind == "output_item.done":
            item = event["item"]
            assert item["id"] == items[-1]["id"]
            parts = item.get("content") or item.get("summary") or [{"text": item.get("arguments")}]
            assert parts[0]["text"] == text
            items[-1] = item
    return items


def test_an_answer_that_is_cut_says_so(live: Live) -> None:
    response = live.client.responses.create(model="demo", input="count", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[-1].status == "incomplete"  # type: ignore[union-attr]
    assert response.output_text == "one, two"


def test_the_clients_own_stream_helper_follows(live: Live) -> None:
    with live.client.responses.stream(model="demo", input="count") as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == "one, two, three, four"


def test_parse_gives_an_object(live: Live) -> None:
    class Answer(BaseModel):
        answer: int

    response = live.client.responses.parse(model="demo", input="json", text_format=Answer)
    assert response.output_parsed == Answer(answer=42)


def test_a_schema_is_enforced_by_the_engine(tiny: Live) -> None:
    class City(BaseModel):
        big: bool

    response = tiny.client.responses.parse(model=TINY, input="a city", text_format=City, max_output_tokens=40)
    assert isinstance(response.output_parsed, City)
    shaped = {"format": {"type": "json_object"}}
    fields: Any = {"model": TINY, "input": "hi", "text": shaped, "max_output_tokens": 20, "temperature": 0}
    assert tiny.client.responses.create(**fields).output_text.startswith("{")


def test_functions_are_called_and_answered(live: Live) -> None:
    tools: Any = [WEATHER]
    first = live.client.responses.create(model="demo", input="weather in Paris?", tools=tools)
    (call,) = first.output
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Paris", "days": 2}')
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}
    for fields in (
        {"previous_response_id": first.id, "input": [result]},
        {"input": [{"role": "user", "content": "weather in Paris?"}, call.to_dict(), result]},
        {
            "input": [
                {"role": "user", "content": "weather in Paris?"},
                {"type": "item_reference", "id": call.id},
                result,
            ]
        },
    ):
        given: Any = fields
        second = live.client.responses.create(model="demo", tools=tools, **given)
        assert second.output_text == "It is 21 degrees."


def test_two_calls_are_two_items_and_one_if_not_parallel(live: Live) -> None:
    response = whole(ask(live, input="two calls", tools=[WEATHER, CLOCK]))
    assert [item["type"] for item in response["output"]] == ["message", "function_call", "function_call"]
    calls = [item["call_id"] for item in response["output"][1:]]
    assert len(set(calls)) == 2


def test_tool_choice_narrows_the_tools(tiny: Live) -> None:
    fields: Any = {"model": TINY, "input": "hi", "tools": [WEATHER, CLOCK], "max_output_tokens": 60, "temperature": 0}
    chosen = {"type": "function", "name": "get_time"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}
    for choice in (chosen, allowed):
        response = tiny.client.responses.create(**fields, tool_choice=choice, parallel_tool_calls=False)
        (call,) = response.output
        assert call.type == "function_call"
        assert call.name == "get_time"


def test_thinking_is_an_item_of_its_own_and_counted(live: Live) -> None:
    response = live.client.responses.create(model="demo", input="please think", reasoning={"effort": "low"})
    reasoning, message = response.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "Let me see, yes."
    assert reasoning.summary == []
    assert message.type == "message"
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 6
    off = live.client.responses.create(model="demo", input="please think", reasoning={"effort": "none"})
    assert [item.type for item in off.output] == ["message"]


def test_a_summary_that_is_asked_for_is_the_whole_thinking(live: Live) -> None:
    fields: Any = {"effort": "low", "summary": "detailed"}
    response = live.client.responses.create(model="demo", input="please think", reasoning=fields)
    reasoning = response.output[0]
    assert reasoning.type == "reasoning"
    assert [part.text for part in reasoning.summary] == ["Let me see, yes."]
    assert reasoning.content is None
    error = error_of(ask(live, reasoning={"summary": "concise"}), 400)
    assert error["param"] == "reasoning.summary"


def test_thinking_comes_back_from_a_client_that_stores_nothing_here(live: Live) -> None:
    include: Any = ["reasoning.encrypted_content"]
    first = live.client.responses.create(
        model="demo", input="please think", reasoning={"effort": "low"}, include=include, store=False
    )
    echoes: Any = [item.to_dict() for item in first.output]
    for echo in echoes:
        echo.pop("content") if echo["type"] == "reasoning" else None
    live.sources["demo"].asks.clear()
    given: Any = [{"role": "user", "content": "please think"}, *echoes, {"role": "user", "content": "hi"}]
    live.client.responses.create(model="demo", input=given, store=False)
    (sent,) = live.sources["demo"].asks
    assert "Let me see, yes." in "".join(part.text for part in sent.parts)  # type: ignore[union-attr]
    echoes[0]["encrypted_content"] = "gAAAAA-from-elsewhere"
    error = error_of(ask(live, input=echoes), 400)
    assert error["param"] == "input[0].encrypted_content"


def test_logprobs_come_when_they_are_included(tiny: Live) -> None:
    fields: Any = {"model": TINY, "input": "hello", "temperature": 0, "max_output_tokens": 6}
    include: Any = ["message.output_text.logprobs"]
    response = tiny.client.responses.create(**fields, include=include, top_logprobs=2)
    part = response.output[0].content[0]  # type: ignore[union-attr,index]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert len(part.logprobs) == 6
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    body = {**fields, "include": include, "top_logprobs": 2, "stream": True}
    events = events_of(tiny.post("/v1/responses", body))
    streamed = [one for event in events if event["type"].endswith("text.delta") for one in event["logprobs"]]
    assert [one["token"] for one in streamed] == [one.token for one in part.logprobs]
    assert error_of(tiny.post("/v1/responses", {**fields, "top_logprobs": 2}), 400)["param"] == "top_logprobs"


def test_instructions_lead_and_are_not_carried_over(live: Live) -> None:
    first = live.client.responses.create(model="demo", input="hi", instructions="Speak like a pirate.")
    live.sources["demo"].asks.clear()
    live.client.responses.create(model="demo", input="hi", previous_response_id=first.id)
    (sent,) = live.sources["demo"].asks
    prompt = "".join(part.text for part in sent.parts)  # type: ignore[union-attr]
    assert "pirate" not in prompt
    assert "Hello there, friend!" in prompt


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_is_not_supported_is_refused_by_name(live: Live, name: str) -> None:
    error = error_of(ask(live, **{name: {"id": "x"}}), 400)
    assert (error["code"], error["param"]) == ("unsupported_field", name)
    assert REFUSED[name] in error["message"]


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("web_search", "web"),
        ("web_search_2025_08_26", "web"),
        ("web_search_preview_2025_03_11", "web"),
        ("file_search", "vector"),
        ("code_interpreter", "code"),
        ("image_generation", "text"),
        ("computer_use_preview", "screen"),
        ("mcp", "MCP"),
        ("local_shell", "function"),
        ("custom", "function"),
    ],
)
def test_hosted_tools_are_refused_with_the_reason(live: Live, kind: str, word: str) -> None:
    error = error_of(ask(live, tools=[WEATHER, {"type": kind, "name": "x"}]), 400)
    assert (error["code"], error["param"]) == ("unsupported_field", "tools[1].type")
    assert word in error["message"]
    assert error_of(ask(live, tools=[WEATHER], tool_choice={"type": kind}), 400)["param"] == "tool_choice.type"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"inptu": "x"}, "inptu"),
        ({"n": 2}, "n"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"reasoning": {"effort": "vast"}}, "reasoning.effort"),
        ({"background_options": {"completion_window": "8h"}}, "background_options.completion_window"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        ({"prompt_cache_options": {"comparison_response_id": "x"}}, "prompt_cache_options.comparison_response_id"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"background": True, "store": False}, "store"),
        ({"include": ["everything"]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"service_tier": "ultrafast"}, "service_tier"),
        ({"previous_response_id": "resp_x", "conversation": "conv_x"}, "conversation"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"input": None}, "input"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(live: Live, fields: dict[str, Any], param: str) -> None:
    assert error_of(ask(live, **fields), 400)["param"] == param


def test_hints_are_taken(live: Live) -> None:
    whole(
        ask(
            live,
            context_management=[{"type": "compaction", "compact_threshold": 1000}],
            background_options={"completion_window": "soonest", "continuation_id": "x"},
            prompt_cache_options={"mode": "implicit", "ttl": "30m"},
            prompt_cache_retention="24h",
            include=["web_search_call.action.sources", "file_search_call.results"],
            stream=None,
        )
    )


def test_a_prompt_that_is_too_long_is_refused_with_both_counts(live: Live) -> None:
    for fields in ({}, {"stream": True}, {"truncation": "disabled"}):
        error = error_of(ask(live, input="word " * 40_000, **fields), 400)
        assert error["code"] == "context_length_exceeded"
        assert "40000" in error["message"]
        assert "32767" in error["message"]


def test_truncation_drops_the_oldest_and_says_which(live: Live) -> None:
    long = [{"role": "user", "content": f"{number} " + "word " * 9_000} for number in range(5)]
    given = [{"role": "developer", "content": "Stay."}, *long, {"role": "user", "content": "count"}]
    response = whole(ask(live, input=given, truncation="auto"))
    assert texts(response) == ["one, two, three, four"]
    listed = live.http.get(f"/v1/responses/{response['id']}/input_items?order=asc").json()["data"]
    truncated = response["x_nimbos"]["truncated"]
    assert truncated["dropped_items"] == [item["id"] for item in listed[1:4]]
    assert (truncated["prompt_tokens"], truncated["limit_tokens"]) == (45_008, 32_767)
    assert response["usage"]["input_tokens"] < 32_767 * 3 // 4
    streamed = events_of(ask(live, input=given, truncation="auto", stream=True))[-1]["response"]
    assert len(streamed["x_nimbos"]["truncated"]["dropped_items"]) == 3
    assert "truncated" not in whole(ask(live, truncation="auto"))["x_nimbos"]
    error = error_of(ask(live, input="word " * 40_000, truncation="auto"), 400)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(("text_bytes", "prompt_tokens"), [(200_000, 36_007), (100_000, 18_005)])
def test_a_context_that_no_template_can_write_is_shortened_first(
    live: Live, monkeypatch: pytest.MonkeyPatch, text_bytes: int, prompt_tokens: int
) -> None:
    monkeypatch.setattr(responses_fit, "_TEXT_BYTES", text_bytes)
    long = [{"role": "user", "content": f"{number} " + "word " * 9_000} for number in range(5)]
    given = [{"role": "developer", "content": "Stay."}, *long, {"role": "user", "content": "count"}]
    live.sources["demo"].asks.clear()
    response = whole(ask(live, input=given, truncation="auto"))
    listed = live.http.get(f"/v1/responses/{response['id']}/input_items?order=asc").json()["data"]
    truncated = response["x_nimbos"]["truncated"]
    assert truncated["dropped_items"] == [item["id"] for item in listed[1:4]]
    assert (truncated["prompt_tokens"], truncated["limit_tokens"]) == (prompt_tokens, 32_767)
    (sent,) = live.sources["demo"].asks
    prompt = "".join(part.text for part in sent.parts)  # type: ignore[union-attr]
    assert ("Stay." in prompt, "2 word" in prompt, "3 word" in prompt) == (True, False, True)


def test_input_tokens_are_what_the_answer_counts(tiny: Live) -> None:
    fields: Any = {"model": TINY, "input": "hello world", "instructions": "Be brief.", "tools": [WEATHER]}
    counted = tiny.client.responses.input_tokens.count(**fields)
    response = tiny.client.responses.create(**fields, max_output_tokens=4)
    assert response.usage is not None
    assert counted.input_tokens == response.usage.input_tokens
    chained = tiny.client.responses.input_tokens.count(model=TINY, input="more", previous_response_id=response.id)
    assert chained.input_tokens > 10


def test_a_client_that_leaves_cancels_its_answer(live: Live) -> None:
    source = live.sources["demo"]
    while source.ended.acquire(blocking=False):
        pass
    stream = live.client.responses.create(model="demo", input="endless", stream=True)
    first = next(iter(stream))
    stream.close()
    assert source.ended.acquire(timeout=60)
    assert first.type == "response.created"
    with pytest.raises(openai.NotFoundError):
        live.client.responses.retrieve(first.response.id)

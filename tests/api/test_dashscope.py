"""DashScope's own package against our server: it works when its base URL is changed."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the package's own
    import dashscope
    from dashscope.api_entities.aio_session import close_shared_aio_session
    from dashscope.api_entities.http_request import close_shared_sync_session

import httpx2

from nimbos.api.dashscope_request import REFUSED_HEADERS, REFUSED_INPUT, REFUSED_PARAMETERS, Parameters
from nimbos.api.dashscope_vectors import EmbeddingParameters, RerankParameters
from nimbos.api.dashscope_wire import code_of
from nimbos.errors import ModelNotFound, NimbosError, NotReady, Overloaded, Unauthorized
from nimbos.types import Text
from tests.live import OWNER_SECRET, Live, user

GENERATION = "/api/v1/services/aigc/text-generation/generation"
MULTIMODAL = "/api/v1/services/aigc/multimodal-generation/generation"
EMBEDDING = "/api/v1/services/embeddings/text-embedding/text-embedding"
RERANK = "/api/v1/services/rerank/text-rerank/text-rerank"
ROUTES = [GENERATION, MULTIMODAL, EMBEDDING, RERANK]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


@pytest.fixture(autouse=True)
def official(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, told where we are, as its users do it."""
    monkeypatch.setattr(dashscope, "base_http_api_url", f"{live.url}/api/v1")
    monkeypatch.setattr(dashscope, "api_key", OWNER_SECRET)
    yield
    close_shared_sync_session()


def generate(**fields: Any) -> Any:
    return dashscope.Generation.call(model="demo", **fields)


def ask(live: Live, **parameters: Any) -> httpx2.Response:
    body = {"model": "demo", "input": {"messages": user("hi")}, "parameters": parameters}
    return live.post(GENERATION, body)


def refusal(response: httpx2.Response, status: int, code: str) -> str:
    """The message of an error in DashScope's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"code", "message", "request_id"}
    assert body["code"] == code
    assert body["request_id"]
    message: str = body["message"]
    return message


# --- whole answers


def test_a_prompt_is_answered_as_text() -> None:
    response = generate(prompt="hi")
    assert response.status_code == 200
    assert response.output.text == "Hello there, friend!"
    assert response.output.finish_reason == "stop"
    assert response.output.choices is None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (1, 5, 6)
    assert response.request_id == response.headers["x-nimbos-ask-id"]


def test_messages_are_answered_as_a_message() -> None:
    response = generate(messages=user("hi"), result_format="message")
    (choice,) = response.output.choices
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert choice.message.content == "Hello there, friend!"
    assert choice.message.reasoning_content == ""


def test_a_history_of_turns_stands_before_the_prompt(live: Live) -> None:
    turns = [{"user": "one", "bot": "two"}]
    assert generate(prompt="hi", history=turns).output.text == "Hello there, friend!"
    (ask,) = live.sources["demo"].asks[-1:]
    prompt = "".join(part.text for part in ask.parts if isinstance(part, Text))
    conversation, _ = json.JSONDecoder().raw_decode(prompt)
    assert [(m["role"], m["content"]) for m in conversation] == [("user", "one"), ("assistant", "two"), ("user", "hi")]


def test_thinking_comes_without_a_stream_and_together_with_a_schema() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    for more in ({}, {"response_format": {"type": "json_object"}}, {"response_format": schema}):
        response = generate(messages=user("please think"), enable_thinking=True, **more)
        message = response.output.choices[0].message
        assert message.reasoning_content == "Let me see, yes."
        assert message.content == "Done thinking."
        assert response.usage.output_tokens_details["reasoning_tokens"] == 6


def test_thinking_has_its_budget_and_is_shown_beside_text() -> None:
    response = generate(prompt="please think", result_format="text", enable_thinking=True, thinking_budget=2)
    assert response.output.text == "Done thinking."
    assert response.output.reasoning_content == "Let me"
    assert response.usage.output_tokens_details["reasoning_tokens"] == 2


def test_thinking_can_be_switched_off() -> None:
    response = generate(messages=user("please think"), result_format="message", enable_thinking=False)
    assert response.output.choices[0].message.reasoning_content == ""
    assert response.usage.output_tokens_details["reasoning_tokens"] == 0


def test_a_tool_is_called_and_its_result_is_answered() -> None:
    messages: list[Any] = user("the weather?")
    response = generate(messages=messages, tools=[TOOL], tool_choice="auto")
    (choice,) = response.output.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris", "days": 2}
    messages += [dict(choice.message), {"role": "tool", "tool_call_id": call["id"], "content": "21 degrees"}]
    again = generate(messages=messages, tools=[TOOL], result_format="message")
    assert again.output.choices[0].message.content == "It is 21 degrees."


def test_a_tool_result_may_name_the_tool_alone() -> None:
    messages: list[Any] = user("the weather?")
    messages.append(dict(generate(messages=messages, tools=[TOOL]).output.choices[0].message))
    for call in messages[-1]["tool_calls"]:
        del call["id"]
    messages.append({"role": "tool", "name": "get_weather", "content": "21 degrees"})
    again = generate(messages=messages, tools=[TOOL], result_format="message")
    assert again.output.choices[0].message.content == "It is 21 degrees."


def test_several_choices_come_numbered() -> None:
    response = generate(messages=user("hi"), n=3)
    assert [choice.index for choice in response.output.choices] == [0, 1, 2]
    assert {choice.message.content for choice in response.output.choices} == {"Hello there, friend!"}
    assert (response.usage.input_tokens, response.usage.output_tokens) == (1, 15)


def test_what_is_sampled_reaches_the_engine(live: Live) -> None:
    generate(
        prompt="hi",
        seed=7,
        top_p=0.5,
        top_k=9,
        temperature=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        max_tokens=3,
        stop=["friend"],
    )
    ask = live.sources["demo"].asks[-1]
    sampling = ask.sampling
    assert (sampling.seed, sampling.top_p, sampling.top_k, sampling.temperature) == (7, 0.5, 9, 0.25)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, 0.5)
    assert (ask.limit_tokens, ask.stop) == (3, ("friend",))


def test_a_stop_string_and_a_limit_end_the_answer() -> None:
    assert generate(prompt="count", stop=" three").output.text == "one, two,"
    response = generate(prompt="count", max_tokens=2)
    assert (response.output.text, response.output.finish_reason) == ("one,", "length")


# --- streams


def test_without_incremental_output_each_event_repeats_all_so_far(live: Live) -> None:
    response = live.http.post(
        GENERATION,
        json={"model": "demo", "input": {"prompt": "count"}, "parameters": {"result_format": "text"}},
        headers={"X-DashScope-SSE": "enable"},
    )
    texts = [event["output"]["text"] for event in events_of(response)]
    assert texts[-1] == "one, two, three, four"
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    official = [event.output.text for event in generate(prompt="count", stream=True)]
    assert official == texts


@pytest.mark.parametrize("incremental", [True, False, None])
def test_a_stream_says_what_the_whole_answer_says(incremental: bool | None) -> None:
    fields: dict[str, Any] = {"messages": user("please think"), "result_format": "message", "enable_thinking": True}
    events = list(generate(**fields, stream=True, incremental_output=incremental))
    assert all(event.status_code == 200 for event in events)
    messages = [event.output.choices[0].message for event in events]
    if incremental:
        told = ("".join(m.reasoning_content for m in messages), "".join(m.content for m in messages))
    else:
        told = (messages[-1].reasoning_content, messages[-1].content)
    whole = generate(**fields)
    assert told == (whole.output.choices[0].message.reasoning_content, whole.output.choices[0].message.content)
    assert [event.output.choices[0].finish_reason for event in events[:-1]] == ["null"] * (len(events) - 1)
    assert events[-1].output.choices[0].finish_reason == "stop"
    assert events[-1].usage == whole.usage
    counts = [event.usage.output_tokens for event in events]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    assert {event.usage.input_tokens for event in events} == {whole.usage.input_tokens}
    assert {event.request_id for event in events} == {events[0].headers["x-nimbos-ask-id"]}


@pytest.mark.parametrize("incremental", [True, False, None])
def test_streamed_calls_join_to_the_whole_ones(incremental: bool | None) -> None:
    events = list(
        generate(messages=user("two calls"), tools=[TOOL, clock()], stream=True, incremental_output=incremental)
    )
    if incremental:
        found: dict[int, tuple[str, str]] = {}
        for event in events:
            for call in event.output.choices[0].message.get("tool_calls") or []:
                name, arguments = found.get(call["index"], ("", ""))
                function = call["function"]
                found[call["index"]] = (name + function.get("name", ""), arguments + function["arguments"])
        calls = list(found.values())
    else:
        last = events[-1].output.choices[0].message.tool_calls
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in last]
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("get_weather", {"city": "Paris", "days": 2}),
        ("get_time", {}),
    ]
    assert events[-1].output.choices[0].finish_reason == "tool_calls"


def test_several_streamed_choices_are_merged_by_the_official_package() -> None:
    events = list(generate(messages=user("hi"), n=2, stream=True, incremental_output=False))
    choices = events[-1].output.choices
    assert [choice["message"]["content"] for choice in choices] == ["Hello there, friend!"] * 2
    assert events[-1].usage["output_tokens"] == 10


def test_the_frames_are_dashscopes(live: Live) -> None:
    body = {"model": "demo", "input": {"prompt": "hi"}, "parameters": {"incremental_output": True}}
    for headers in ({"X-DashScope-SSE": "enable"}, {"Accept": "text/event-stream"}):
        response = live.http.post(GENERATION, json=body, headers=headers)
        assert response.headers["content-type"].startswith("text/event-stream")
        frames = response.text.strip("\n").split("\n\n")
        for number, frame in enumerate(frames, start=1):
            name, event, status, content = frame.split("\n")
            assert (name, event, status) == (f"id:{number}", "event:result", ":HTTP_STATUS/200")
            assert content.startswith("data:{")
        assert [event["output"]["text"] for event in events_of(response)] == [
            "",
            "Hello",
            " there",
            ",",
            " friend",
            "!",
            "",
        ]
    assert "event:" not in live.post(GENERATION, body).text


def test_a_client_that_goes_ends_its_ask(live: Live) -> None:
    events = generate(prompt="endless", stream=True, incremental_output=True)
    next(events)
    next(events)
    events.close()
    close_shared_sync_session()
    assert live.sources["demo"].ended.acquire(timeout=60)


async def test_the_asynchronous_client_asks_and_streams(live: Live) -> None:
    call = dashscope.AioGeneration.call
    try:
        response = await call(model="demo", messages=user("hi"), result_format="message")
        assert response.output.choices[0].message.content == "Hello there, friend!"
        stream = await call(model="demo", prompt="count", stream=True, incremental_output=True, result_format="text")
        assert "".join([event.output.text async for event in stream]) == "one, two, three, four"
        several = await asyncio.gather(*(call(model="demo", prompt="hi") for _ in range(8)))
        assert {one.output.text for one in several} == {"Hello there, friend!"}
        assert (await call(model="none", prompt="hi")).code == "ModelNotFound"
    finally:
        await close_shared_aio_session()


# --- parts


def test_a_multimodal_conversation_of_text_is_answered_in_parts() -> None:
    call = dashscope.MultiModalConversation.call
    messages = [{"role": "user", "content": [{"text": "count"}]}]
    assert call(model="demo", messages=messages).output.choices[0].message.content == [
        {"text": "one, two, three, four"}
    ]
    pieces = [event.output.choices[0].message.content for event in call(model="demo", messages=messages, stream=True)]
    assert pieces[-1] == [{"text": "one, two, three, four"}]
    more = call(model="demo", messages=messages, stream=True, incremental_output=True)
    parts = [part["text"] for event in more for part in event.output.choices[0].message.content]
    assert "".join(parts) == "one, two, three, four"


@pytest.mark.parametrize(
    "part",
    [
        {"image": "https://example.com/a.png"},
        {"audio": "https://example.com/a.wav"},
        {"video": ["https://example.com/a.png"]},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "video_url", "text": "hidden"},
    ],
    ids=str,
)
@pytest.mark.parametrize("route", [GENERATION, MULTIMODAL])
def test_parts_that_are_no_text_are_refused_by_name(live: Live, route: str, part: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": [{"text": "what is this?"}, part]}]
    message = refusal(live.post(route, {"model": "demo", "input": {"messages": messages}}), 400, "InvalidParameter")
    assert "input.messages[0].content[1]." in message
    assert part.get("type", next(iter(part))) in message


def test_text_that_is_marked_for_the_cache_is_read(live: Live) -> None:
    part = {"type": "text", "text": "count", "cache_control": {"type": "ephemeral"}}
    response = live.post(GENERATION, {"model": "demo", "input": {"messages": [{"role": "user", "content": [part]}]}})
    assert response.json()["output"]["text"] == "one, two, three, four"
    assert "x-nimbos-ignored" not in response.headers


# --- what is refused, and what is left out


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"enable_search": True}, "enable_search"),
        ({"stop": [5, 6]}, "stop_token_ids"),  # of this model alone, which has none
        ({"stop": [[5], [6]]}, "stop_token_ids"),
        ({"stop": [[5, 6]]}, "parameters.stop"),
        ({"stop": ["a", 5]}, "parameters.stop"),
        ({"stop": [True]}, "parameters.stop"),
        ({"stop": [-1]}, "stop_token_ids"),
        ({"stop": 5}, "parameters.stop"),
        ({"result_format": "xml"}, "parameters.result_format"),
        ({"result_format": "text", "n": 2}, "`n`"),
        ({"result_format": "text", "tools": [TOOL]}, "`tools`"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": "high"}, "parameters.top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 1000}, "`n`"),
        ({"seed": 2**64}, "seed"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"enable_thinking": False, "thinking_budget": 100}, "thinking_budget"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}, "tools": [TOOL]}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"translation_options": {"target_lang": "de"}}, "translation_options"),
        ({"logprobs": True}, "logprobs"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_would_change_the_answer_is_refused_by_name(live: Live, parameters: dict[str, Any], named: str) -> None:
    assert named in refusal(ask(live, **parameters), 400, "InvalidParameter")


def test_hints_and_neutral_values_are_taken(live: Live) -> None:
    response = ask(live, enable_search=False, enable_thinking=None, translation_options={}, stop=None)
    assert response.status_code == 200
    assert "x-nimbos-ignored" not in response.headers


def test_what_is_not_known_is_left_out_and_named(live: Live) -> None:
    body = {
        "model": "demo",
        "input": {"messages": [{"role": "user", "content": "hi", "mood": "good"}], "depth": 2},
        "parameters": {"vl_high_resolution_images": True},
        "resources": [],
        "a\r\nset-cookie: x": 1,
    }
    response = live.post(GENERATION, body)
    assert response.json()["output"]["text"] == "Hello there, friend!"
    named = response.headers["x-nimbos-ignored"]
    assert "set-cookie" not in response.headers
    for name in ("resources", "parameters.vl_high_resolution_images", "input.depth", "input.messages[0].mood", "a??"):
        assert name in named


@pytest.mark.parametrize("name", ["X-DashScope-Async", "X-DashScope-Plugin", "X-DashScope-EncryptionKey"])
def test_headers_that_would_change_the_answer_are_refused(live: Live, name: str) -> None:
    body = {"model": "demo", "input": {"prompt": "hi"}}
    message = refusal(live.http.post(GENERATION, json=body, headers={name: "enable"}), 400, "InvalidParameter")
    assert name.lower() in message


# --- errors


def test_errors_have_dashscopes_codes_and_our_statuses(live: Live) -> None:
    assert generate(prompt="x").status_code == 200
    response = dashscope.Generation.call(model="none", prompt="hi")
    assert (response.status_code, response.code) == (404, "ModelNotFound")
    assert "'none'" in response.message
    response = dashscope.Generation.call(model="demo", prompt="hi", api_key="nb-wrong")
    assert (response.status_code, response.code) == (401, "InvalidApiKey")
    events = list(dashscope.Generation.call(model="none", prompt="hi", stream=True))
    assert [(event.status_code, event.code) for event in events] == [(404, "ModelNotFound")]


@pytest.mark.parametrize("route", ROUTES)
def test_what_the_door_refuses_has_the_same_shape(live: Live, route: str) -> None:
    refusal(httpx2.post(live.url + route, json={}), 401, "InvalidApiKey")
    refusal(live.http.post(route, json={}, headers={"origin": "https://evil.example"}), 403, "AccessDenied")
    refusal(live.http.get(route), 405, "UnsupportedOperation")
    refusal(live.http.post("/api/v1/services/audio/tts/x", json={}), 404, "InvalidURL")


def test_a_prompt_that_is_too_long_says_both_counts(live: Live) -> None:
    response = live.post(GENERATION, {"model": "demo", "input": {"prompt": "word " * 40_000}})
    message = refusal(response, 400, "InvalidParameter")
    assert "40000" in message
    assert "32767" in message
    assert response.json()["request_id"].startswith("ask_")


@pytest.mark.parametrize("route", [EMBEDDING, RERANK])
def test_a_model_of_another_kind_is_named(live: Live, route: str) -> None:
    given = {"texts": ["a"], "query": "a", "documents": ["b"]}
    message = refusal(live.post(route, {"model": "demo", "input": given}), 400, "InvalidParameter")
    assert "'demo'" in message


def test_multimodal_embeddings_are_refused(live: Live) -> None:
    response = live.post("/api/v1/services/embeddings/multimodal-embedding/multimodal-embedding", {})
    assert "text-embedding" in refusal(response, 400, "InvalidParameter")


# --- OpenAI's routes by their other name


def test_openais_client_works_on_the_compatible_routes(live: Live) -> None:
    client = live.client.with_options(base_url=f"{live.url}/compatible-mode/v1")
    assert [model.id for model in client.models.list()] == ["demo"]
    completion = client.chat.completions.create(model="demo", messages=user("hi"))  # type: ignore[arg-type]
    assert completion.choices[0].message.content == "Hello there, friend!"
    stream = client.completions.create(model="demo", prompt="count", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == "one, two, three, four"


def test_the_other_name_opens_no_other_door(live: Live) -> None:
    assert httpx2.get(f"{live.url}/compatible-mode/v1/models").status_code == 401
    error = live.http.get("/compatible-mode/v1/nowhere").json()["error"]
    assert error["code"] == "not_found"
    assert live.http.get("/compatible-mode/metrics").status_code == 404


# --- the page


def test_every_field_and_code_is_described() -> None:
    page = (Path(__file__).parents[2] / "docs" / "dashscope.md").read_text()
    fields = {
        *Parameters.__struct_fields__,
        *EmbeddingParameters.__struct_fields__,
        *RerankParameters.__struct_fields__,
    }
    refused = {*REFUSED_PARAMETERS, *REFUSED_INPUT}
    codes = {code_of(error) for error in (NotReady("a"), NimbosError("a"), Unauthorized("a"), ModelNotFound("a"))}
    codes |= {
        code_of(Overloaded(limit=limit, value=1, used=1, retry_after_s=1)) for limit in ("requests", "tokens", "x")
    }
    described = set(re.findall(r"`(?:parameters\.|input\.)?(\w[\w.]*)`", page))
    assert fields | refused | codes <= described
    assert {name for name in REFUSED_HEADERS if name not in page.lower()} == set()


# --- hostile input


def nested(depth: int) -> bytes:
    return b'{"model": "demo", "input": {"messages": ' + b"[" * depth + b"]" * depth + b"}}"


BODIES = {
    "empty": b"",
    "not JSON": b"{model: demo}",
    "an array": b"[1]",
    "null": b"null",
    "NaN": b'{"model": "demo", "input": {"prompt": "a"}, "parameters": {"temperature": NaN}}',
    "beyond 64 bits": b'{"model": "demo", "input": {"prompt": "a"}, "parameters": {"seed": 99999999999999999999999}}',
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "deep": nested(100),
    "very deep": nested(100_000),
    "wrong type of model": b'{"model": 5, "input": {"prompt": "a", "texts": ["a"], "query": "a", "documents": ["a"]}}',
    "no model": b'{"input": {"prompt": "a", "texts": ["a"], "query": "a", "documents": ["a"]}}',
    "no input": b'{"model": "demo"}',
    "input is text": b'{"model": "demo", "input": "hi"}',
    "parameters are a list": b'{"model": "demo", "input": {"prompt": "a", "texts": ["a"]}, "parameters": [1]}',
    "messages are text": b'{"model": "demo", "input": {"messages": "hi", "texts": 5, "documents": 5}}',
    "a message is a number": b'{"model": "demo", "input": {"messages": [5], "texts": [5], "documents": [5]}}',
    "no messages": b'{"model": "demo", "input": {"messages": [], "texts": [], "query": "a", "documents": []}}',
    "empty texts": b'{"model": "demo", "input": {"messages": [{}], "texts": [""], "query": "", "documents": [""]}}',
    "a part of nothing": b'{"model": "demo", "input": {"messages": [{"role": "user", "content": [null]}]}}',
    "both": b'{"model": "demo", "input": {"messages": [{"role": "user", "content": "a"}], "prompt": "a"}}',
    "calls of numbers": b'{"model": "demo", "input": {"messages": [{"role": "assistant", "tool_calls": [5]}]}}',
    "a role of nobody": b'{"model": "demo", "input": {"messages": [{"role": "king", "content": "a"}]}}',
    "half a character": b'{"model": "demo", "input": {"prompt": "\\ud83d", "texts": ["\\ud83d"]}}',
    "a beginning": b'{"model": "demo", "input": {"messages": [{"role": "user", "content": "a", "partial": true}]}}',
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_broken_body_is_an_error_in_dashscopes_shape(live: Live, route: str, body: bytes) -> None:
    message = refusal(live.http.post(route, content=body), 400, "InvalidParameter")
    assert len(message) < 1_000


def events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    return [json.loads(line[5:]) for line in response.text.split("\n") if line.startswith("data:")]


def clock() -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}

"""The chat route with the official client, on a real server with the scripted model."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.conftest import WEATHER_CALL
from tests.live import Live, error_of, events_of, user

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Tells it.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
    for name in ("get_weather", "get_time")
]


def test_answers_with_text_usage_and_receipt(live: Live) -> None:
    reply = live.client.chat.completions.with_raw_response.create(model="demo", messages=user("hi you"))
    completion = reply.parse()
    assert completion.object == "chat.completion"
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].message.content == "Hello there, friend!"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 5)
    assert completion.usage.total_tokens == 7
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 0
    receipt = completion.model_extra["x_nimbos"] if completion.model_extra else {}
    assert reply.headers["x-nimbos-ask-id"] == receipt["ask_id"]
    assert completion.id == "chatcmpl-" + receipt["ask_id"].removeprefix("ask_")
    assert reply.headers["x-nimbos-class"] == receipt["class"] == "interactive"
    assert receipt["model_hash"] == live.sources["demo"].card.model_hash
    assert {"queue_ms", "cached_tokens", "mean_batch", "preemptions", "restarts"} <= set(receipt)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": user("hi")},
        {"messages": user("count"), "stop": "thr"},
        {"messages": user("count"), "max_tokens": 3},
        {"messages": user("think"), "n": 2},
        {"messages": user("weather?"), "tools": TOOLS},
        {"messages": user("two calls"), "tools": TOOLS},
        {"messages": user("umlaut")},
    ],
    ids=lambda fields: str(fields["messages"][0]["content"]),
)
def test_a_stream_and_a_whole_reply_say_the_same(live: Live, fields: dict[str, Any]) -> None:
    whole = live.client.chat.completions.create(model="demo", **fields)
    texts: dict[int, list[str]] = {}
    thoughts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    calls: dict[tuple[int, int], list[str]] = {}
    usages = []
    stream = live.client.chat.completions.create(
        model="demo", stream=True, stream_options={"include_usage": True}, **fields
    )
    for chunk in stream:
        if chunk.usage is not None:
            usages.append(chunk.usage)
        for choice in chunk.choices:
            texts.setdefault(choice.index, []).append(choice.delta.content or "")
            thought = getattr(choice.delta, "reasoning_content", None) or ""
            thoughts[choice.index] = thoughts.get(choice.index, "") + thought
            for call in choice.delta.tool_calls or []:
                assert call.function is not None
                name = [call.function.name] if call.function.name else []
                calls.setdefault((choice.index, call.index), name)
                calls[choice.index, call.index].append(call.function.arguments or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert usages == [whole.usage]
    for choice in whole.choices:
        message = choice.message
        assert "".join(texts[choice.index]) == (message.content or "")
        assert thoughts[choice.index] == getattr(message, "reasoning_content", "")
        assert reasons[choice.index] == choice.finish_reason
        for number, called in enumerate(message.tool_calls or []):
            assert called.type == "function"
            name, *pieces = calls[choice.index, number]
            assert (name, "".join(pieces)) == (called.function.name, called.function.arguments)
    assert len(calls) == sum(len(choice.message.tool_calls or []) for choice in whole.choices)


def test_a_stream_sends_words_one_by_one_and_the_receipt_last(live: Live) -> None:
    events = events_of(live.chat(messages=user("count"), stream=True))
    words = [event["choices"][0]["delta"].get("content") for event in events]
    assert [word for word in words if word] == ["one", ",", " two", ",", " three", ",", " four"]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("x_nimbos" not in event for event in events[:-1])
    assert events[-1]["x_nimbos"]["class"] == "interactive"
    assert all("usage" not in event for event in events)


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(live: Live) -> None:
    events = events_of(live.chat(stream=True, stream_options={"include_usage": True}))
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 5


def test_tool_calls_come_as_calls_and_their_results_are_answered(live: Live) -> None:
    messages = user("What is the weather?")
    first = live.client.chat.completions.create(model="demo", messages=messages, tools=TOOLS)
    assert first.choices[0].finish_reason == "tool_calls"
    assert first.choices[0].message.content is None
    calls = first.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert calls[0].function.name == WEATHER_CALL["name"]
    sent_back = first.choices[0].message.model_dump()
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": "21 degrees"}
    second = live.client.chat.completions.create(model="demo", messages=[*messages, sent_back, result], tools=TOOLS)
    assert second.choices[0].message.content == "It is 21 degrees."
    assert second.choices[0].finish_reason == "stop"


def test_a_reply_with_times_is_passed_over_once_it_stands_in_the_conversation(live: Live) -> None:
    first = live.client.chat.completions.create(model="demo", messages=user("weather"), tools=TOOLS)
    again = [*user("weather"), first.choices[0].message.model_dump(), *user("weather")]
    for _ in range(2):  # what was asked before changes nothing
        reply = live.client.chat.completions.create(model="demo", messages=again, tools=TOOLS)
        assert reply.choices[0].message.content == "Hello there, friend!"


def test_thinking_is_told_apart_and_counted(live: Live) -> None:
    completion = live.client.chat.completions.create(model="demo", messages=user("think"))
    assert completion.choices[0].message.content == "Done thinking."
    assert completion.choices[0].message.model_extra == {"reasoning_content": "Let me see, yes."}
    assert completion.usage is not None
    assert completion.usage.completion_tokens_details is not None
    assert completion.usage.completion_tokens_details.reasoning_tokens == 6
    assert completion.usage.completion_tokens == 9


@pytest.mark.parametrize(
    "off", [{"reasoning_effort": "none"}, {"extra_body": {"enable_thinking": False}}, {"extra_body": {"think": False}}]
)
def test_thinking_can_be_switched_off(live: Live, off: dict[str, Any]) -> None:
    completion = live.client.chat.completions.create(model="demo", messages=user("think"), **off)
    assert completion.choices[0].message.content == "Done thinking."
    assert not completion.choices[0].message.model_extra


def test_a_thinking_budget_is_kept(live: Live) -> None:
    reply = live.chat(messages=user("think"), thinking_budget=2).json()
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2
    assert reply["choices"][0]["message"]["reasoning_content"] == "Let me"


def test_contradicting_dials_are_named(live: Live) -> None:
    error = error_of(live.chat(enable_thinking=False, reasoning_effort="high"), 400)
    assert "enable_thinking" in error["message"]
    assert "reasoning_effort" in error["message"]


def test_n_choices_share_one_prompt(live: Live) -> None:
    completion = live.client.chat.completions.create(model="demo", messages=user("count"), n=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert {choice.message.content for choice in completion.choices} == {"one, two, three, four"}
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (1, 21)


@pytest.mark.parametrize("stop", ["ee, f", ["zzz", "ee, f"]])
def test_a_stop_string_ends_the_answer_and_never_shows(live: Live, stop: Any) -> None:
    reply = live.chat(messages=user("count"), stop=stop).json()
    assert reply["choices"][0]["message"]["content"] == "one, two, thr"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["x_nimbos"]["stopped_by"] == ["ee, f"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_on_tokens_ends_the_answer(live: Live, name: str) -> None:
    reply = live.chat(messages=user("count"), **{name: 2}).json()
    assert reply["choices"][0]["message"]["content"] == "one,"
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2


def test_every_field_that_is_honoured_reaches_the_engine(live: Live) -> None:
    live.chat(
        temperature=0.25,
        top_p=0.5,
        top_k=7,
        min_p=0.125,
        typical_p=0.75,
        repetition_penalty=1.5,
        frequency_penalty=-1,
        presence_penalty=2,
        logit_bias={"5": -100, "6": 1.5},
        seed=-(2**63),
        ignore_eos=True,
        min_tokens=1,
        max_completion_tokens=9,
        stop=["x", "y"],
        service_tier="flex",
    ).raise_for_status()
    ask = live.sources["demo"].asks[-1]
    sampling = ask.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 7, 0.125)
    assert (sampling.typical_p, sampling.repetition_penalty) == (0.75, 1.5)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (-1, 2)
    assert sampling.logit_bias == {5: -100, 6: 1.5}
    assert sampling.seed == -(2**63)
    assert (ask.ignore_eos, ask.min_tokens, ask.limit_tokens) == (True, 1, 9)
    assert ask.stop[:2] == ("x", "y")
    assert ask.ask_class == "batch"
    assert ask.account == "proj_default"


def test_without_a_seed_each_ask_has_its_own(live: Live) -> None:
    seeds = {live.chat().json()["x_nimbos"]["seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
            "json_schema",
            None,
        ),
        ({"guided_regex": "[0-9]+"}, "regex", "[0-9]+"),
        ({"guided_choice": ["a.b", "c"]}, "regex", r"a\.b|c"),
        ({"guided_json": {"type": "string"}}, "json_schema", '{"type":"string"}'),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"grammar": 'root ::= "a"'}, "gbnf", 'root ::= "a"'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"json_object": False, "json": {"type": "null"}}}, "json_schema", '{"type":"null"}'),
        ({"x_nimbos": {"grammar": {"kind": "regex", "source": "b+"}}}, "regex", "b+"),
    ],
)
def test_what_shapes_the_answer_becomes_a_grammar(
    live: Live, fields: dict[str, Any], kind: str, source: str | None
) -> None:
    live.chat(messages=user("json"), **fields).raise_for_status()
    grammar = live.sources["demo"].asks[-1].grammar
    assert grammar is not None
    if source is not None:
        assert (grammar.kind, grammar.source) == (kind, source)


def test_two_shapes_of_an_answer_contradict_each_other(live: Live) -> None:
    error = error_of(live.chat(guided_regex="a", guided_choice=["b"]), 400)
    assert "guided_regex" in error["message"]
    assert "guided_choice" in error["message"]
    error_of(live.chat(guided_regex="a", response_format={"type": "json_object"}), 400)
    both = live.chat(structured_outputs={"json_object": True, "json": {"type": "null"}})
    assert error_of(both, 400)["param"] == "structured_outputs.json_object"


@pytest.mark.parametrize(
    ("fields", "header", "ask_class"),
    [
        ({}, None, "interactive"),
        ({"service_tier": "priority"}, None, "interactive"),
        ({"service_tier": "flex"}, None, "batch"),
        ({"service_tier": "auto"}, "agent", "agent"),
        ({"x_nimbos": {"class": "batch"}}, None, "batch"),
        ({}, "batch", "batch"),
    ],
)
def test_the_class_comes_from_header_tier_or_extension(
    live: Live, fields: dict[str, Any], header: str | None, ask_class: str
) -> None:
    headers = {"x-nimbos-class": header} if header else {}
    body = {"model": "demo", "messages": user("hi"), **fields}
    reply = live.http.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.headers["x-nimbos-class"] == ask_class


def test_contradicting_classes_are_named(live: Live) -> None:
    body = {"model": "demo", "messages": user("hi"), "service_tier": "flex"}
    reply = live.http.post("/v1/chat/completions", json=body, headers={"x-nimbos-class": "interactive"})
    error = error_of(reply, 400)
    assert "service_tier" in error["message"]
    assert "x-nimbos-class" in error["message"]


def test_hints_that_change_nothing_are_taken(live: Live) -> None:
    live.chat(
        user="u",
        metadata={"a": "b"},
        store=False,
        safety_identifier="s",
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        prompt_cache_options={"mode": "implicit"},
        prediction={"type": "content", "content": "Hello"},
        modalities=["text"],
        verbosity="medium",
        parallel_tool_calls=True,
        service_tier="default",
        logprobs=False,
        audio=None,
        functions=None,
    ).raise_for_status()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "a", "format": "wav"}),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("web_search_options", {}),
        ("moderation", {"model": "m"}),
        ("store", True),
        ("verbosity", "low"),
        ("modalities", ["text", "audio"]),
        ("logprobs", True),
        ("frobnicate", 1),
    ],
)
def test_what_is_not_supported_is_refused_by_name(live: Live, field: str, value: Any) -> None:
    error = error_of(live.chat(**{field: value}), 400)
    assert error["param"] == field
    assert field in error["message"]
    assert error["code"] == "unsupported_field"


def test_an_unknown_field_comes_with_the_nearest_known_one(live: Live) -> None:
    assert "'temperature'" in error_of(live.chat(temprature=1), 400)["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 1.5),
        ("top_p", -1),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -3),
        ("n", 0),
        ("n", 33),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_completion_tokens", 0),
        ("seed", 2**63),
        ("top_k", -2),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("min_tokens", -1),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"x": 1}),
        ("stop", ["a"] * 17),
        ("stop", ""),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(65))),
        ("stop_token_ids", [5]),
        ("top_logprobs", 3),
        ("stream_options", {"include_usage": True}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "no"}}),
    ],
)
def test_values_out_of_range_are_refused_by_name(live: Live, field: str, value: Any) -> None:
    error = error_of(live.chat(**{field: value}), 400)
    assert field in error["message"]


def test_allowed_tools_leaves_only_those(live: Live) -> None:
    function = {"type": "function", "function": {"name": "get_time"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function]}}
    live.chat(tools=TOOLS, tool_choice=choice).raise_for_status()
    choice["allowed_tools"] = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "no"}}]}
    assert "allowed_tools" in error_of(live.chat(tools=TOOLS, tool_choice=choice), 400)["message"]


def test_a_prompt_too_long_says_both_counts(live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        live.client.chat.completions.create(model="demo", messages=user("a " * 40_000), stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert "40000" in caught.value.message
    assert "32767" in caught.value.message


def test_an_unknown_model_is_a_404_that_names_those_there_are(live: Live) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        live.client.chat.completions.create(model="gpt-9", messages=user("hi"))
    assert caught.value.code == "model_not_found"
    assert "demo" in caught.value.message


def test_messages_of_every_role_and_text_parts_are_read(live: Live) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "please"}, {"type": "text", "text": "count"}]},
        {"role": "assistant", "content": None, "refusal": "No.", "annotations": []},
        {"role": "user", "content": "count", "name": "ann"},
    ]
    reply = live.chat(messages=messages)
    assert reply.json()["choices"][0]["message"]["content"] == "one, two, three, four"


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": "x", "audio": {"id": "a"}}, "messages[0].audio"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"content": "x"}, "messages[0].role"),
    ],
)
def test_a_wrong_message_is_named_with_its_path(live: Live, message: dict[str, Any], path: str) -> None:
    assert path in error_of(live.chat(messages=[message]), 400)["message"]

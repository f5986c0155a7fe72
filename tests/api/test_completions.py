"""The older completions route with the official client."""

from __future__ import annotations

from typing import Any

import pytest

from tests.live import Live, error_of, events_of


def complete(live: Live, **fields: Any) -> Any:
    return live.post("/v1/completions", {"model": "demo", "prompt": "count", **fields})


def test_a_prompt_goes_on(live: Live) -> None:
    completion = live.client.completions.create(model="demo", prompt="count")
    assert completion.object == "text_completion"
    assert completion.choices[0].text == "one, two, three, four"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (1, 7)
    assert completion.id.startswith("cmpl-")


def test_a_list_of_prompts_gives_choices_prompt_by_prompt(live: Live) -> None:
    completion = live.client.completions.create(model="demo", prompt=["count", "hi"], n=2, max_tokens=3)
    assert [(choice.index, choice.text) for choice in completion.choices] == [
        (0, "one, two"),
        (1, "one, two"),
        (2, "Hello there,"),
        (3, "Hello there,"),
    ]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 12)


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_and_a_whole_reply_say_the_same(live: Live, echo: bool) -> None:
    fields: Any = {"model": "demo", "prompt": ["count", "hi"], "n": 2, "echo": echo, "stop": " four"}
    whole = live.client.completions.create(**fields)
    texts = dict.fromkeys(range(4), "")
    reasons: dict[int, str] = {}
    usages = []
    for chunk in live.client.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        if chunk.usage is not None:
            usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usages == [whole.usage]


def test_echo_puts_the_prompt_before_the_answer(live: Live) -> None:
    completion = live.client.completions.create(model="demo", prompt="count ", echo=True, max_tokens=1)
    assert completion.choices[0].text == "count one"


def test_the_receipt_comes_with_the_last_chunk(live: Live) -> None:
    events = events_of(complete(live, stream=True))
    assert "x_nimbos" in events[-1]
    assert all("x_nimbos" not in event for event in events[:-1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"prompt": [1, 2], "echo": True}, "echo"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"suffix": "}"}, "suffix"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(live: Live, fields: dict[str, Any], param: str) -> None:
    assert error_of(complete(live, **fields), 400)["param"] == param

"""Answers split while they stream: the same however they are cut."""

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nimbos.chat import ContentDelta, Delta, FoldedMessage, Plan, Splitter, ToolCallDelta, fold
from nimbos.chat.family import CallForm
from nimbos.chat.tools import ToolUse, read_tools
from nimbos.types import Channel, Thinking, TokenChunk

TOOLS = read_tools([{"type": "function", "function": {"name": name}} for name in ("weather", "now")])
THINKING = Thinking(open="<think>", close="</think>", budget_tokens=9, started=True)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "a\\"}b{"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def plan(*, thinking: bool = False, tools: bool = True, **use: Any) -> Plan:
    known: dict[str, Any] = {
        "form": CallForm.HERMES,
        "must": False,
        "parallel": True,
        "hidden_tag": False,
        "bare": True,
    }
    return Plan(
        parts=(),
        thinking=THINKING if thinking else None,
        tools=ToolUse(tools=TOOLS, **{**known, **use}) if tools else None,
    )


LLAMA = {"form": CallForm.LLAMA, "parallel": False}


def stream(made: Plan, *pieces: str, thoughts: tuple[str, ...] = ()) -> list[Delta]:
    splitter = Splitter(made)
    deltas: list[Delta] = []
    for channel, texts in ((Channel.THINKING, thoughts), (Channel.TEXT, pieces)):
        for text in texts:
            deltas += splitter.feed(TokenChunk(branch=0, ids=(1,), text=text, channel=channel))
    return deltas + splitter.finish()


def shape(message: FoldedMessage) -> tuple[str | None, str | None, list[tuple[str, str]]]:
    return message.content, message.reasoning, [(call.name, call.arguments) for call in message.tool_calls]


def split(made: Plan, *pieces: str) -> tuple[str | None, list[tuple[str, str]]]:
    content, _, calls = shape(fold(stream(made, *pieces)))
    return content, calls


WEATHER = ("weather", '{"city": "a\\"}b{"}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello", "Hello", []),
        (CALL, None, [WEATHER]),
        (f"Wait.\n{CALL}\n{NOW}", "Wait.", [WEATHER, ("now", "{}")]),
        (f"{CALL} Done.", " Done.", [WEATHER]),
        ('{"name": "weather", "arguments": {"city": 1}}', None, [("weather", '{"city": 1}')]),
        (' \n{"name": "weather", "parameters": {"city": 1}}\n', None, [("weather", '{"city": 1}')]),
        ('{"name": "Bob", "arguments": {}}', '{"name": "Bob", "arguments": {}}', []),
        ('See {"name": "now", "arguments": {}}', 'See {"name": "now", "arguments": {}}', []),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
        ("a <tool_ b <tool_calls> c", "a <tool_ b <tool_calls> c", []),
        (f"<tool_call>{NOW}", "<tool_call>", [("now", "{}")]),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, [("other", "{}")]),
        ('<tool_call>{"name": "now"}</tool_call>', None, [("now", "{}")]),
        ('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', None, [("now", '"{}"')]),
        ('<tool_call>{"name": "now", "arguments": 12}</tool_call>', None, [("now", "12")]),
        ('<tool_call>{"name": "now", "arguments": {}} oh', "oh", [("now", "{}")]),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Os', None, [("weather", '{"city": "Os')]),
        ('<tool_call>\n{"name": "weather", "argu', None, [("weather", "")]),
        ('<tool_call>\n{"name": "wea', None, []),
        ("Hi <tool_ca", "Hi", []),
        ("2 <", "2 <", []),
        ("end \n", "end \n", []),
    ],
)
def test_answer_splits_the_same_at_every_border(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    expected = (content, calls)
    assert split(plan(), text) == expected
    assert split(plan(), *text) == expected
    for at in range(len(text)):
        assert split(plan(), text[:at], text[at:]) == expected


PIECES = st.sampled_from(
    [
        CALL,
        NOW,
        "<tool_call>",
        "</tool_call>",
        '{"name": "',
        "weather",
        '", "arguments": ',
        "{}",
        "}",
        "{",
        "\n",
        " ",
        "x",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(),
    text=st.lists(PIECES, max_size=8).map("".join),
    use=st.sampled_from([{}, {"hidden_tag": True}, LLAMA]),
)
def test_borders_never_matter(data: st.DataObject, text: str, use: dict[str, Any]) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(plan(**use), *pieces) == split(plan(**use), text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet='<tool_cal>/ {}"n\n', max_size=40))
def test_text_without_a_call_comes_out_whole(text: str) -> None:
    assume("<tool_" not in text)
    assert split(plan(), *text) == (text or None, [])


def test_arguments_stream_as_they_come_and_only_the_first_delta_names_the_call() -> None:
    deltas = stream(plan(), *CALL)
    calls = [d for d in deltas if isinstance(d, ToolCallDelta)]
    assert calls[0].name == "weather" and calls[0].id is not None and calls[0].id.startswith("call_")
    assert len(calls) == 1 + len(WEATHER[1])
    assert all(d.id is None and d.name is None and d.index == 0 for d in calls[1:])
    assert json.loads("".join(d.arguments for d in calls)) == {"city": 'a"}b{'}


def test_no_partial_tag_is_ever_shown_and_text_is_held_no_longer_than_a_tag() -> None:
    splitter = Splitter(plan())
    fed, shown = "", ""
    for character in "Some text, a < b, <to, then\n" + CALL:
        fed += character
        for delta in splitter.feed(TokenChunk(branch=0, ids=(1,), text=character)):
            shown += delta.text if isinstance(delta, ContentDelta) else ""
        if "<tool_call>" not in fed:
            assert len(fed) - len(shown) <= len("<tool_call>") + 1
    assert shown == "Some text, a < b, <to, then"


def test_call_behind_a_hidden_tag_is_known_by_its_json() -> None:
    text = 'Wait {"a": 1}.\n{"name": "now", "arguments": {}}\n\n{"name": "weather", "arguments": {"city": "x"}}\n'
    assert split(plan(hidden_tag=True), *text) == ('Wait {"a": 1}.', [("now", "{}"), ("weather", '{"city": "x"}')])


def test_llama_call_is_the_whole_answer() -> None:
    assert split(plan(**LLAMA), *'{"name": "now", "parameters": {"a": [1]}}') == (None, [("now", '{"a": [1]}')])
    assert split(plan(**LLAMA), "<tool_call> is text") == ("<tool_call> is text", [])


def test_without_tools_everything_is_content() -> None:
    assert split(plan(tools=False), CALL[:5], CALL[5:]) == (CALL, [])


def test_thinking_is_told_apart_and_its_line_breaks_are_dropped() -> None:
    for tools in (True, False):
        deltas = stream(plan(thinking=True, tools=tools), "\n", "\nFour", "\n.", thoughts=("\n", "2+", "2\n"))
        assert shape(fold(deltas)) == ("Four\n.", "2+2\n", [])


def test_folding_gives_what_the_stream_gave() -> None:
    message = fold(stream(plan(thinking=True), f"a\n{CALL}{NOW}", thoughts=("b",)))
    assert shape(message) == ("a", "b", [WEATHER, ("now", "{}")])
    assert len({call.id for call in message.tool_calls}) == 2


def test_endless_head_is_text() -> None:
    text = '{"name": ' + " " * 2000
    assert split(plan(), *text)[1] == []
    assert (split(plan(), text)[0] or "").startswith('{"name":')

"""What an Anthropic body means: blocks, markers, cut calls. Pure."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.api.anthropic_body import MessagesBody, read
from nimbos.api.anthropic_cache import Mark, last_mark
from nimbos.api.anthropic_content import read_messages, read_system
from nimbos.api.anthropic_tools import read_tools
from nimbos.api.cut_json import whole_object
from nimbos.api.lenient import Ignored
from nimbos.api.pins import common_prefix, written_tokens
from nimbos.chat import Dial
from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.types import Account, ModelCard, Text, Usage

ME = Account(id="proj_1", name="me")
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"a": 1}}
CALLED = {"role": "assistant", "content": [CALL]}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def result(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **more}


def messages_of(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return read_messages(messages, Ignored())


def test_results_come_before_words_as_messages_of_their_own() -> None:
    content = [result("one"), result([text("two"), text("three")]), text("And now?")]
    read_back = messages_of({"role": "user", "content": "hi"}, CALLED, {"role": "user", "content": content})
    assert [(one["role"], one["content"]) for one in read_back] == [
        ("user", "hi"),
        ("assistant", ""),
        ("tool", "one"),
        ("tool", "two\nthree"),
        ("user", "And now?"),
    ]
    assert read_back[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"a": 1}}
    assert read_back[2]["tool_call_id"] == "toolu_1"


@pytest.mark.parametrize(
    ("given_result", "expected"),
    [
        (result("no such file", is_error=True), "Error: no such file"),
        (result("Error: no such file", is_error=True), "Error: no such file"),
        (result(None), ""),
        (result([]), ""),
        (result([{"type": "tool_reference", "tool_name": "look"}]), "The tool look can be called."),
    ],
)
def test_a_result_says_what_came_of_the_call(given_result: dict[str, Any], expected: str) -> None:
    assert messages_of(CALLED, {"role": "user", "content": [given_result]})[1]["content"] == expected


def test_neighbours_of_one_role_are_one_turn() -> None:
    read_back = messages_of(
        {"role": "user", "content": "a"},
        {"role": "user", "content": [text("b"), text("c")]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}, text("d")]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "y"}, CALL]},
    )
    assert read_back[0] == {"role": "user", "content": "a\n\nb\nc"}
    assert (read_back[1]["content"], read_back[1]["reasoning_content"]) == ("d", "x\n\ny")
    assert len(read_back[1]["tool_calls"]) == 1
    assert len(read_back) == 2


def test_ten_thousand_turns_of_one_role_are_read_at_once() -> None:
    many = [{"role": "user", "content": "x" * 1000}] * 10_000
    assert len(messages_of(*many)[0]["content"]) == 10_000_000 + 2 * 9_999


def test_documents_of_text_are_read_as_text() -> None:
    plain = {"type": "text", "media_type": "text/plain", "data": "The words."}
    blocks = [
        {"type": "document", "source": plain, "title": "T", "context": "C", "citations": {"enabled": False}},
        {"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}},
        {"type": "search_result", "source": "https://s", "title": "S", "content": [text("found")]},
    ]
    assert messages_of({"role": "user", "content": blocks})[0]["content"] == (
        "<document>\nT\nC\nThe words.\n</document>\n"
        "<document>\na\nb\n</document>\n"
        "<search_result>\nS\nhttps://s\nfound\n</search_result>"
    )


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}, "'image'"),
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "x"}}, "'base64'"),
        ({"type": "document", "source": {"type": "url", "url": "https://x"}}, "'url'"),
        ({"type": "document", "source": {"type": "text", "data": "x"}, "citations": {"enabled": True}}, "citations"),
        ({"type": "server_tool_use", "id": "x", "name": "web_search", "input": {}}, "'server_tool_use'"),
        ({"type": "web_search_tool_result", "tool_use_id": "x", "content": []}, "'web_search_tool_result'"),
        ({"type": "container_upload", "file_id": "x"}, "'container_upload'"),
        ({"type": "thinking", "thinking": "x", "signature": ""}, "'thinking'"),
    ],
)
def test_what_no_text_model_reads_is_refused_by_name(block: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedField, match=named) as caught:
        messages_of({"role": "user", "content": [text("hi"), block]})
    assert "messages[0].content[1]" in caught.value.message
    with pytest.raises(UnsupportedField, match=r"messages\[1\].content\[0\].content\[0\]"):
        messages_of(CALLED, {"role": "user", "content": [result([{"type": "image"}])]})


@pytest.mark.parametrize(
    "message",
    [
        5,
        {},
        {"role": "tool", "content": "x"},
        {"role": ["user"], "content": "x"},
        {"role": "user"},
        {"role": "user", "content": ""},
        {"role": "user", "content": []},
        {"role": "user", "content": [text("")]},
        {"role": "user", "content": {"type": "text"}},
        {"role": "user", "content": ["x"]},
        {"role": "user", "content": [{"type": 5}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": "user", "content": [{"type": "tool_result"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "never", "content": "x"}]},
        {"role": "user", "content": [{"type": "document", "source": "x"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "y", "input": "z"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": 1, "name": "y", "input": {}}]},
        {"role": "assistant", "content": [{"type": "thinking"}]},
        {"role": "system", "content": [{"type": "image"}]},
    ],
    ids=str,
)
def test_a_wrong_message_is_named_by_its_place(message: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        messages_of(message)
    assert "messages[0]" in caught.value.message


def test_a_system_prompt_of_blocks_is_one_text() -> None:
    assert read_system([text("a", cache_control={"type": "ephemeral"}), text("b")], Ignored()) == "a\nb"
    assert read_system(None, Ignored()) == ""


def test_tools_are_read_with_their_examples_and_hints() -> None:
    ignored = Ignored()
    tool = {
        "type": "custom",
        "name": "look",
        "description": "Looks.",
        "input_schema": {"type": "object"},
        "input_examples": [{"a": 1}],
        "strict": True,
        "cache_control": {"type": "ephemeral"},
        "defer_loading": True,
        "eager_input_streaming": True,
        "allowed_callers": ["direct"],
        "from_the_future": 1,
    }
    (read_back,) = read_tools([tool], ignored) or []
    assert read_back["function"] == {
        "name": "look",
        "description": 'Looks.\nExamples of its input:\n{"a":1}',
        "parameters": {"type": "object"},
        "strict": True,
    }
    assert ignored.header() == {"x-nimbos-ignored": "tools[].from_the_future"}


@pytest.mark.parametrize(
    "kind",
    ["web_search_20250305", "bash_20250124", "text_editor_20250728", "computer_20250124", "memory_20250818", "x" * 999],
)
def test_tools_that_the_provider_runs_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedField, match=kind[:50]) as caught:
        read_tools([{"type": kind, "name": "x"}], Ignored())
    assert len(caught.value.message) < 400


# --- the body as a whole


def body(**fields: Any) -> bytes:
    return json.dumps(
        {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}], **fields}
    ).encode()


@pytest.mark.parametrize(
    "hint",
    [
        {"metadata": {"user_id": "u"}},
        {"service_tier": "standard_only"},
        {"speed": "fast"},
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        {"diagnostics": {"previous_message_id": None}},
        {"fallbacks": [{"model": "x"}]},
        {"inference_geo": "us"},
        {"betas": ["x"]},
        {"mcp_servers": []},
        {"container": None},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"thinking": {"type": "adaptive", "display": "summarized", "block_binding": {}}},
    ],
    ids=str,
)
def test_hints_are_taken_in_silence(hint: dict[str, Any]) -> None:
    assert read(body(**hint), ME, header_class=None).ignored.header() == {}


def test_what_is_unknown_is_left_out_and_named_wherever_it_stands() -> None:
    wanted = read(
        body(
            new_top=1,
            thinking={"type": "disabled", "new_thinking": 1},
            output_config={"effort": "low", "task_budget": {"type": "tokens", "total": 5}},
            messages=[{"role": "user", "id": 5, "content": [text("hi", new_block=1)]}],
        ),
        ME,
        header_class=None,
    )
    assert set(wanted.ignored.header()["x-nimbos-ignored"].split(", ")) == {
        "new_top",
        "thinking.new_thinking",
        "output_config.task_budget",
        "messages[].id",
        "content[].new_block",
    }


@pytest.mark.parametrize(
    "field",
    [
        {"mcp_servers": [{"url": "https://x"}]},
        {"container": "container_1"},
        {"compaction": {"type": "on"}},
        {"thread": {"type": "create"}},
        {"billing_policy": {"type": "billing_policy", "bill_to": "user_profile"}},
        {"max_tokens": None},
        {"max_tokens": -1},
        {"max_tokens": 2**40},
        {"temperature": 1.5},
        {"top_p": -0.1},
        {"top_k": -1},
        {"stop_sequences": [""]},
        {"stop_sequences": ["x"] * 99},
        {"thinking": {"type": "sometimes"}},
        {"thinking": {"type": "disabled", "budget_tokens": 5}},
        {"thinking": {"budget_tokens": "many"}},
        {"output_config": {"effort": "herculean"}},
        {"output_config": {"format": {"type": "text"}}},
        {"output_config": {"format": {"type": "json_schema"}}},
        {"output_config": {"format": 5}},
        {"output_format": {"type": "json_schema", "schema": {}}, "output_config": {"format": {"type": "json_schema"}}},
        {"tool_choice": {"type": "some"}},
        {"tool_choice": {"type": "tool"}},
        {"tools": [{"name": "x"}]},
        {"tools": [5]},
        {"tools": [{"name": "x", "input_schema": {}, "allowed_callers": ["code_execution_20250825"]}]},
        {"system": 5},
        {"system": [5]},
        {"cache_control": {"type": "forever"}},
        {"cache_control": {"type": "ephemeral", "ttl": "1d"}},
    ],
    ids=lambda field: json.dumps(field)[:60],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(field: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(body(**field), ME, header_class=None)
    assert next(iter(field)).split("_")[0] in caught.value.message + str(caught.value.param)


def test_silence_about_thinking_means_none() -> None:
    request = read(body(), ME, header_class=None).asked.request
    card = ModelCard(id="m", model_hash="h", architecture="a", context_tokens=100)
    assert request(card).thinking == Dial(switch=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x "}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": "x"}, CALLED]},
        {
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "{"}],
            "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
        },
        {
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "{"}],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        },
    ],
    ids=str,
)
def test_words_that_no_answer_can_go_on_with_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="The last message"):
        read(body(**fields), ME, header_class=None)


# --- markers


MARK = {"cache_control": {"type": "ephemeral"}}
TOOL = {"name": "look", "input_schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("fields", "mark"),
    [
        ({}, None),
        ({"system": [text("s", **MARK)]}, Mark(0, None)),
        ({"tools": [{**TOOL, **MARK}]}, Mark(0, None)),
        ({"messages": [{"role": "user", "content": [text("a", **MARK), text("b")]}]}, Mark(0, 0)),
        (
            {
                "system": [text("s", **MARK)],
                "messages": [{"role": "user", "content": [text("a", **MARK), text("b", **MARK)]}],
            },
            Mark(0, 1),
        ),
        ({**MARK, "messages": [{"role": "user", "content": "a"}]}, Mark(0, 0)),
        ({**MARK, "messages": [{"role": "user", "content": [text("a"), text("b")]}]}, Mark(0, 1)),
        ({"messages": [CALLED, {"role": "user", "content": [result([text("x", **MARK)])]}]}, Mark(1, 0)),
    ],
)
def test_the_last_marker_counts(fields: dict[str, Any], mark: Mark | None) -> None:
    given_body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    assert last_mark(MessagesBody(**given_body)) == mark


def test_a_fifth_marker_is_refused() -> None:
    blocks = [text("x", **MARK)] * 3
    read(body(system=blocks, cache_control=MARK["cache_control"]), ME, header_class=None)
    with pytest.raises(InvalidRequest, match="here are 5"):
        read(body(system=[*blocks, blocks[0]], cache_control=MARK["cache_control"]), ME, header_class=None)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [text("kept", **MARK), text("not kept")]}],
        [{"role": "user", "content": "kept"}, {"role": "assistant", "content": [{**CALL, **MARK}]}],
        [
            {"role": "user", "content": "kept"},
            CALLED,
            {"role": "user", "content": [result("kept", **MARK), text("not kept")]},
        ],
    ],
)
def test_the_marked_request_differs_behind_the_mark_only(messages: list[dict[str, Any]]) -> None:
    mark = last_mark(MessagesBody(model="m", messages=messages))
    assert mark is not None
    plain, marked = json.dumps(messages_of(*messages)), json.dumps(messages_of(*mark.with_sentinel(messages)))
    assert plain != marked
    (prefix,) = common_prefix((Text(plain),), (Text(marked),))
    assert isinstance(prefix, Text)
    assert prefix.text.endswith(('"kept', '"a": 1', '"kept\\n', '"kept\\'))
    assert "not kept" not in prefix.text


@given(st.text(), st.text(), st.text())
def test_what_two_texts_begin_with_is_found(start: str, one: str, two: str) -> None:
    found = common_prefix((Text("x"), Text(start + one)), (Text("x"), Text(start + two)))
    joined = "".join(part.text for part in found if isinstance(part, Text))
    assert joined.startswith("x" + start)
    assert ("x" + start + one).startswith(joined)
    assert ("x" + start + two).startswith(joined)
    longer = ("x" + start + one)[: len(joined) + 1]
    assert longer == joined or not ("x" + start + two).startswith(longer)


def test_parts_that_differ_in_kind_share_nothing() -> None:
    assert common_prefix((Text("a", special=True),), (Text("a", special=False),)) == ()


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 150))
def test_the_three_parts_of_an_input_add_up(input_tokens: int, cached: int, pin: int) -> None:
    usage = Usage(input=max(input_tokens, cached), cached=cached)
    written = written_tokens(usage, pin)
    assert written >= 0
    assert usage.input - usage.cached - written >= 0
    assert written == 0 or written + cached == min(pin, usage.input)


# --- calls that were cut

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.data())
def test_a_cut_object_keeps_only_what_it_had(value: dict[str, Any], data: st.DataObject) -> None:
    whole = json.dumps(value)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    kept = json.loads(whole_object(cut))
    assert whole_object(whole) == whole
    assert within(kept, value)


def within(part: Any, whole: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and within(part[name], whole[name]) for name in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(part) <= len(whole) and all(map(within, part, whole))
    return bool(part == whole)


@pytest.mark.parametrize("nonsense", ["", "[1, 2", "}", '"x"', "{{{", "[" * 100_000, '{"a":' * 10_000])
def test_what_is_no_object_is_an_empty_one(nonsense: str) -> None:
    assert isinstance(json.loads(whole_object(nonsense[:1000])), dict)
    assert whole_object(nonsense).startswith("{")

"""Grammars of tool calls, driven by the real llguidance."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from nimbos.chat import ChatRequest, Plan
from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.types import Grammar
from tests.chat.byte_matcher import drive
from tests.chat.templates import CHATML, HERMES, LLAMA, card, trusted_chat

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
NOTHING = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
TAGS = ("<tool_call>", "</tool_call>")


async def plan_for(template: str = HERMES, facts: dict[str, Any] | None = None, **request: Any) -> Plan:
    chat = trusted_chat(card(template, **(facts or {})))
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER, NOTHING], **request}
    try:
        return await chat.plan(ChatRequest(**asked))
    finally:
        await chat.close()


async def grammar_for(template: str = HERMES, facts: dict[str, Any] | None = None, **request: Any) -> Grammar:
    grammar = (await plan_for(template, facts, **request)).grammar
    assert grammar is not None
    if grammar.kind == "lark":
        assert LLMatcher.validate_grammar(grammar.source) == "" or facts is not None
    return grammar


@pytest.mark.parametrize("template", [HERMES, CHATML])
@pytest.mark.parametrize(
    "text", ["", "It rains.", 'a < b, <tool, {"name": 1}', CALL, f"Wait.\n{CALL}", f"{CALL}\n{NOW}"]
)
async def test_auto_lets_text_and_calls_through(template: str, text: str) -> None:
    outcome = drive(await grammar_for(template), text)
    assert (outcome.taken, outcome.complete) == (text, True)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("<tool_call>Hello", "<tool_call>"),
        ('<tool_call>\n{"name": "other"', '<tool_call>\n{"name": "'),
        ('<tool_call>\n{"name": "now", "arguments": {"a": 1}}', '<tool_call>\n{"name": "now", "arguments": {'),
        ('<tool_call>\n{"name": "weather", "arguments": {"days"', '<tool_call>\n{"name": "weather", "arguments": {"'),
        ('<tool_call>\n{"name": "weather", "arguments": {  ', '<tool_call>\n{"name": "weather", "arguments": {'),
        (CALL + " and more", CALL),
    ],
)
async def test_opened_call_can_only_be_a_call(text: str, taken: str) -> None:
    assert drive(await grammar_for(), text).taken == taken


async def test_bare_call_at_the_start_is_constrained_and_later_json_is_not() -> None:
    grammar = await grammar_for()
    bare = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert drive(grammar, bare).complete
    assert drive(grammar, '{"name": "Bob"').taken == '{"name": "'
    assert drive(grammar, 'Look: {"name": "Bob"}').complete


async def test_without_parallel_calls_the_first_is_the_last() -> None:
    outcome = drive(await grammar_for(parallel_tool_calls=False), f"{CALL}\n")
    assert (outcome.taken, outcome.complete) == (CALL, True)


async def test_required_begins_with_a_call_and_named_with_that_one() -> None:
    required = await grammar_for(tool_choice="required")
    assert drive(required, "").forced == '<tool_call>\n{"name": "'
    assert not drive(required, "").complete
    named = await grammar_for(tool_choice={"name": "now"})
    assert drive(named, "").forced == NOW
    assert drive(await grammar_for(tool_choice={"type": "function", "function": {"name": "now"}}), NOW).complete


async def test_none_shows_the_model_no_tools_and_constrains_nothing() -> None:
    plan = await plan_for(tool_choice="none")
    assert plan.grammar is None and plan.tools is None
    assert "weather" not in plan.parts[0].text


async def test_tags_that_are_control_tokens_are_written_as_tokens() -> None:
    grammar = await grammar_for(facts={"control": TAGS, "user_defined": ()})
    assert drive(grammar, f"Wait.{CALL}\n{NOW}", control=TAGS).complete
    shown = await grammar_for(facts={"control": TAGS, "user_defined": TAGS})
    assert drive(shown, CALL).complete


async def test_llama_switches_to_a_call_at_a_leading_brace() -> None:
    tools = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}]}
    grammar = await grammar_for(LLAMA, {"control": ("<|python_tag|>", "<|eot_id|>")}, **tools)
    call = '{"name": "weather", "parameters": {"city": "Oslo"}}'
    tag = ("<|python_tag|>",)
    assert drive(grammar, call, control=tag).complete
    assert drive(grammar, f"<|python_tag|>{call}", control=tag).complete
    assert drive(grammar, "It rains {here}.", control=tag).complete
    assert drive(grammar, '{"a', control=tag).taken == '{"'
    assert drive(grammar, call + " ", control=tag).taken == call
    required = await grammar_for(LLAMA, tool_choice="required", **tools)
    assert drive(required, "").forced == '{"name": "'


async def test_answer_is_json_or_a_call_when_both_are_asked_for() -> None:
    schema = json.dumps({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
    for template, call in ((HERMES, CALL), (LLAMA, '{"name": "weather", "parameters": {"city": "Oslo"}}')):
        grammar = await grammar_for(template, response_format=schema, messages=[{"role": "system", "content": "s"}])
        assert drive(grammar, '{"name": "Bob"}').complete
        assert drive(grammar, call).complete
        assert drive(grammar, "Hello").taken == ""


async def test_references_hold_in_a_llama_call_beside_json() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
    parameters = {"type": "object", "properties": {"top": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
    messages = [{"role": "system", "content": "s"}]
    grammar = await grammar_for(LLAMA, tools=[tool(parameters)], response_format="json_object", messages=messages)
    assert drive(grammar, '{"name": "t", "parameters": {"top": {"next": {}}}}').complete


@pytest.mark.parametrize("given", ["json_object", '{"type": "object"}'])
async def test_response_format_alone_is_a_schema(given: str) -> None:
    grammar = await grammar_for(tools=None, response_format=given)
    assert drive(grammar, '{"a":1}').taken == '{"a":1}'
    assert drive(grammar, "Hello").taken == ""


async def test_own_grammar_is_passed_on_and_excludes_tools() -> None:
    own = Grammar(kind="regex", source="[ab]+")
    assert (await plan_for(tools=None, grammar=own)).grammar == own
    with pytest.raises(InvalidRequest, match="cannot both"):
        await plan_for(grammar=own)


def tool(parameters: Any, *, strict: bool = False, name: str = "t") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "strict": strict, "parameters": parameters}}


def prefix(name: str = "t") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": '


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"type": "objekt"}}},
        {"type": "object", "properties": {"a": {"$ref": "http://elsewhere/x"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?=a)b"}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(["}}},
        {"type": "object", "required": "a"},
    ],
)
async def test_schema_that_cannot_compile_takes_any_object_or_is_refused_when_strict(parameters: Any) -> None:
    grammar = await grammar_for(tools=[tool(parameters)])
    assert drive(grammar, prefix() + '{"z": [1]}}').taken == prefix() + '{"z": [1]}}'
    with pytest.raises(InvalidRequest, match=r"tools\[0\]\.function\.parameters \(tool t\)"):
        await grammar_for(tools=[tool(parameters, strict=True)])


@pytest.mark.parametrize("keyword", ["not", "if", "uniqueItems", "propertyNames", "dependentRequired"])
async def test_unenforced_keyword_is_left_out_or_refused_by_name_when_strict(keyword: str) -> None:
    value: Any = {"uniqueItems": True, "dependentRequired": {}}.get(keyword, {"type": "string"})
    parameters = {"type": "object", "properties": {"a": {"type": ["array", "object"], keyword: value}}}
    assert drive(await grammar_for(tools=[tool(parameters)]), prefix() + '{"a": []}').taken.endswith('{"a": []}')
    with pytest.raises(InvalidRequest, match=f"properties.a uses '{keyword}'"):
        await grammar_for(tools=[tool(parameters, strict=True)])


async def test_references_inside_a_schema_hold() -> None:
    parameters = {
        "type": "object",
        "properties": {"next": {"$ref": "#/$defs/node"}},
        "$defs": {
            "node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
        },
    }
    text = prefix() + '{"next": {"next": {}}}'
    assert drive(await grammar_for(tools=[tool(parameters, strict=True)]), text).taken == text


async def test_free_keys_are_only_taken_where_the_schema_speaks_of_them() -> None:
    closed = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert drive(await grammar_for(tools=[tool(closed)]), prefix() + '{"b"').taken == prefix() + '{"'
    opened = {**closed, "additionalProperties": True}
    assert drive(await grammar_for(tools=[tool(opened)]), prefix() + '{"b": 1}').taken.endswith('{"b": 1}')


async def test_callers_spacing_options_are_not_taken() -> None:
    sly = {"type": "object", "properties": {"a": {"type": "integer"}}, "x-guidance": {"whitespace_pattern": "[ ]*"}}
    assert drive(await grammar_for(tools=[tool(sly)]), prefix() + "{  ").taken == prefix() + "{"
    with pytest.raises(InvalidRequest, match="JSON Schema object"):
        await grammar_for(tools=None, response_format=json.dumps(sly))


def deep(levels: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "tools",
    [
        [tool("no schema")],
        [tool({"type": "array"})],
        [tool(deep(200))],
        [tool({"type": "object", "description": "x" * 100_000})],
        [tool({}, name="no spaces")],
        [tool({}, name="<|im_end|>")],
        [tool({}, name="")],
        [tool({}), tool({})],
        [tool({}, name=f"t{i}") for i in range(300)],
        ["tool"],
        [{"type": "function"}],
    ],
)
async def test_wrong_tools_are_refused(tools: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="tool"):
        await plan_for(tools=tools)


async def test_tools_that_are_no_functions_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedField, match=r"tools\[0\]\.type"):
        await plan_for(tools=[{"type": "web_search"}])


@pytest.mark.parametrize("choice", ["maybe", {"name": "other"}, {}, {"function": 5}])
async def test_wrong_choice_is_refused(choice: Any) -> None:
    with pytest.raises(InvalidRequest, match="tool_choice"):
        await plan_for(tool_choice=choice)


async def test_required_without_tools_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no tools"):
        await plan_for(tools=[], tool_choice="required")


async def test_many_large_schemas_still_fit_the_engine() -> None:
    large = {"type": "object", "properties": {f"field_{i}": {"type": "string"} for i in range(1000)}}
    grammar = await grammar_for(tools=[tool(large, name=f"t{i}") for i in range(10)])
    assert len(grammar.source) < 128 * 1024

"""OpenAI's messages, fitted to what a template can take."""

from typing import Any

import pytest

from nimbos.chat import ChatRequest
from nimbos.chat.messages import normalise, with_thoughts_apart
from nimbos.errors import InvalidRequest, UnsupportedField
from tests.chat.templates import CHATML, DISTILLED, GEMMA, HERMES, LLAMA, card, trusted_chat

CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}
RESULT = {"role": "tool", "content": "42", "tool_call_id": "call_1"}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}


async def prompt_of(template: str, messages: list[dict[str, Any]], **facts: Any) -> str:
    tools = facts.pop("tools", None)
    chat = trusted_chat(card(template, **facts))
    try:
        plan = await chat.plan(ChatRequest(messages=messages, tools=tools))
    finally:
        await chat.close()
    return "".join(part.text for part in plan.parts)


def test_developer_becomes_system_and_leading_system_messages_become_one() -> None:
    messages = normalise([{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}])
    assert messages == [{"role": "system", "content": "a\n\nb"}]


def test_text_parts_become_one_string_and_arguments_an_object() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    user, assistant, result = normalise(
        [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT]
    )
    assert user["content"] == "a\nb"
    assert assistant["content"] == ""
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"at": "é"}
    assert result["name"] == "look"


@pytest.mark.parametrize("arguments", ['{"cut": ', "[1]", "[" * 100_000, '{"a":' * 70 + "1" + "}" * 70])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "x", "arguments": arguments}}
    [message] = normalise([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].image_url",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0].input_audio"),
        ({"role": "assistant", "content": "", "audio": {"id": "x"}}, "messages[0].audio"),
    ],
)
def test_what_is_not_text_is_refused_by_name(message: dict[str, Any], names: str) -> None:
    with pytest.raises(UnsupportedField) as caught:
        normalise([message])
    assert caught.value.param == names


@pytest.mark.parametrize(
    "message",
    [
        {"role": "robot", "content": "x"},
        {"role": ["user"], "content": "x"},
        {"role": "user", "content": 5},
        {"role": "user"},
        {"role": "user", "content": [5]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "tool_calls": [{"function": {}}]},
        {"role": "assistant", "content": "", "reasoning_content": 5},
    ],
)
def test_wrong_message_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\]"):
        normalise([message])


async def test_system_moves_into_the_first_user_message_where_the_template_has_no_system_role() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = await prompt_of(GEMMA, messages, bos="<bos>")
    assert prompt == "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"


async def test_strict_template_refuses_in_its_own_words() -> None:
    with pytest.raises(InvalidRequest, match="Roles must alternate"):
        await prompt_of(GEMMA, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    second = {**CALL, "id": "call_2"}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL, second]}]
    with pytest.raises(InvalidRequest, match="One call at a time"):
        await prompt_of(LLAMA, messages)


async def test_tools_and_history_are_written_by_a_template_that_can() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT]
    prompt = await prompt_of(HERMES, messages, tools=[TOOL])
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call><|im_end|>' in prompt
    assert "<|im_start|>user\n<tool_response>\n42\n</tool_response>" in prompt
    assert "You can call the tools" not in prompt


async def test_tools_and_history_are_written_by_us_for_a_template_that_cannot() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "Looking.", "tool_calls": [CALL]},
        RESULT,
        RESULT,
    ]
    prompt = await prompt_of(CHATML, messages, tools=[TOOL])
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call the tools")
    assert '"name": "look", "description": "Looks."' in prompt
    assert (
        'assistant\nLooking.\n<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call><|im_end|>' in prompt
    )
    response = "<tool_response>\n42\n</tool_response>"
    assert f"<|im_start|>user\n{response}\n{response}<|im_end|>" in prompt


async def test_template_with_a_foreign_form_of_calls_gets_ours_throughout() -> None:
    foreign = CHATML + "{% for t in tools or [] %}[AVAILABLE]{{ t }}{% endfor %}{# tool_calls: [TOOL_CALLS] #}"
    prompt = await prompt_of(foreign, [{"role": "user", "content": "a"}], tools=[TOOL])
    assert "You can call the tools" in prompt
    assert "[AVAILABLE]" not in prompt


async def test_whole_messages_written_as_json_are_left_whole() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}, RESULT]
    prompt = await prompt_of("{{ messages | tojson }}", messages)
    assert '"role": "tool"' in prompt
    assert '"arguments": {"at": "é"}' in prompt


async def test_thinking_of_earlier_turns_reaches_the_template() -> None:
    past = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    prompt = await prompt_of(HERMES, [{"role": "user", "content": "a"}, past, {"role": "user", "content": "b"}])
    assert "<think>\n2+2\n</think>\n\n4<|im_end|>" in prompt


def test_thinking_left_in_content_is_told_apart() -> None:
    messages = [
        {"role": "assistant", "content": "<think>\n2+2\n</think>\n\n4"},
        {"role": "user", "content": "<think>x</think>y"},
    ]
    apart = with_thoughts_apart(messages, "<think>", "</think>")
    assert apart == [{"role": "assistant", "content": "4", "reasoning_content": "2+2"}, messages[1]]


async def test_distilled_model_does_not_see_old_thinking() -> None:
    past = {"role": "assistant", "content": "<think>\n2+2\n</think>\n\n4"}
    prompt = await prompt_of(
        DISTILLED,
        [{"role": "user", "content": "a"}, past],
        control=("<think>", "</think>"),
        user_defined=("<think>", "</think>"),
    )
    assert "2+2" not in prompt
    assert "<A>4<end>" in prompt


async def test_reserved_template_variables_are_refused() -> None:
    chat = trusted_chat(card())
    with pytest.raises(InvalidRequest, match=r"chat_template_kwargs\.messages"):
        await chat.plan(ChatRequest(messages=[{"role": "user", "content": "a"}], template_kwargs={"messages": []}))
    await chat.close()

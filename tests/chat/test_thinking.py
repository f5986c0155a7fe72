"""Thinking in the prompt: it ends inside an open block, or after a closed one."""

from typing import Any

import pytest

from nimbos.chat import ChatRequest, Dial, Plan
from nimbos.chat.family import HARMONY, THINK
from nimbos.chat.thinking import end_closed, end_open
from tests.chat.templates import CHATML, DISTILLED, HERMES, card, trusted_chat

CLOSES_ITSELF = CHATML + "{% if not thinking %}</think>{% else %}<think>{% endif %}"
STRIPS_ONLY = CHATML + "{% if false %}</think>{% endif %}"
ALWAYS_CLOSED = CHATML + "<think>\n\n</think>\n\n"
HARMONIOUS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant"
)
HARMONIOUS += "{# <|channel|>analysis #}"


async def plan_for(template: str, dial: Dial, **request: Any) -> Plan:
    chat = trusted_chat(card(template, control=("<think>", "</think>"), user_defined=("<think>", "</think>")))
    try:
        asked = {"messages": [{"role": "user", "content": "Hi"}], "thinking": dial, **request}
        return await chat.plan(ChatRequest(**asked))
    finally:
        await chat.close()


@pytest.mark.parametrize(
    ("template", "dial", "ending", "started"),
    [
        (HERMES, Dial(), "assistant\n<think>\n", True),
        (HERMES, Dial(switch=True), "assistant\n<think>\n", True),
        (HERMES, Dial(switch=False), "assistant\n<think>\n\n</think>\n\n", None),
        (HERMES, Dial(budget=0), "assistant\n<think>\n\n</think>\n\n", None),
        (DISTILLED, Dial(), "<A><think>\n", True),
        (DISTILLED, Dial(level="none"), "<A><think>\n\n</think>\n\n", None),
        (CLOSES_ITSELF, Dial(), "assistant\n</think>", None),
        (CLOSES_ITSELF, Dial(switch=True), "assistant\n<think>", True),
        (STRIPS_ONLY, Dial(), "assistant\n", False),
        (STRIPS_ONLY, Dial(switch=True), "assistant\n<think>\n", True),
        (STRIPS_ONLY, Dial(switch=False), "assistant\n<think>\n\n</think>\n\n", None),
        (ALWAYS_CLOSED, Dial(switch=True), "assistant\n<think>\n", True),
        (CHATML, Dial(), "assistant\n", None),
        (CHATML, Dial(budget=500), "assistant\n", None),
        (CHATML, Dial(level="high"), "assistant\n", None),
        (HARMONIOUS, Dial(), "<|start|>assistant<|channel|>analysis<|message|>", True),
        (HARMONIOUS, Dial(switch=False), "<|start|>assistant<|channel|>final<|message|>", None),
    ],
)
async def test_prompt_ends_as_the_dial_says(template: str, dial: Dial, ending: str, started: bool | None) -> None:
    plan = await plan_for(template, dial)
    assert plan.parts[-1].text.endswith(ending)
    assert (plan.thinking.started if plan.thinking else None) == started


async def test_answer_in_a_form_waits_behind_a_block_that_is_surely_open() -> None:
    plan = await plan_for(STRIPS_ONLY, Dial(), response_format="json_object")
    assert plan.thinking is not None and plan.thinking.started
    assert plan.grammar is not None


async def test_budget_leaves_room_and_the_farewell_closes_the_block() -> None:
    plan = await plan_for(HERMES, Dial(level="low"), max_tokens=100)
    assert plan.thinking is not None
    assert plan.thinking.budget_tokens == 99
    assert plan.thinking.farewell.endswith("</think>\n\n")
    assert plan.thinking.farewell.count("</think>") == 1
    short = await plan_for(HERMES, Dial(budget=5))
    assert short.thinking is not None and short.thinking.farewell == "\n</think>\n\n"
    assert (await plan_for(HERMES, Dial(), max_tokens=1)).thinking is None


async def test_auto_decides_for_each_request() -> None:
    easy = await plan_for(HERMES, Dial(switch="auto"))
    hard = await plan_for(HERMES, Dial(switch="auto"), messages=[{"role": "user", "content": "Prove this theorem."}])
    assert easy.thinking is None
    assert hard.thinking is not None and hard.thinking.budget_tokens == 2048


async def test_level_reaches_templates_that_read_it() -> None:
    template = CHATML + "{{ reasoning_effort | default('none given') }}"
    for dial, effort in ((Dial(level="minimal"), "low"), (Dial(level="medium"), "medium"), (Dial(), "none given")):
        assert (await plan_for(template, dial)).parts[-1].text.endswith(effort)


@pytest.mark.parametrize("marks", [THINK, HARMONY])
def test_endings_are_stable(marks: Any) -> None:
    opened, closed = end_open("x", marks), end_closed("x", marks)
    assert end_open(opened, marks) == opened
    assert end_closed(opened, marks) == closed
    if marks is THINK:
        assert end_closed(closed, marks) == closed
        assert end_open(closed, marks) == opened

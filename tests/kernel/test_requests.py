"""What an agent's model is asked: how its manifest keeps a small model from guessing, and from never stopping."""

from __future__ import annotations

from typing import Any

import pytest

from nimbos.kernel.program import Program, program_of
from nimbos.kernel.requests import request_of, rounds_of
from nimbos.kernel.think import ThinkRequest

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Look."}
USER: dict[str, Any] = {"role": "user", "content": "Where?"}
CALLED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}
RESULT: dict[str, Any] = {"role": "tool", "content": "There.", "tool_call_id": "1"}
SAID: dict[str, Any] = {"role": "assistant", "content": "There."}


def program(text: str) -> Program:
    return program_of({"nimbos.toml": f'name = "x"\n{text}'.encode(), "instructions.md": b"Look."})[0]


def asked(text: str, *messages: dict[str, Any], corrected: bool = False) -> ThinkRequest:
    return request_of(program(text), [SYSTEM, *messages], [TOOL], corrected=corrected)


@pytest.mark.parametrize(
    ("messages", "rounds"),
    [
        ([USER], 0),
        ([USER, CALLED, RESULT], 1),
        ([USER, CALLED, RESULT, RESULT, CALLED, RESULT], 2),
        ([USER, CALLED, RESULT, SAID, USER], 0),
        ([USER, CALLED, RESULT, SAID, USER, CALLED, RESULT], 1),
    ],
)
def test_rounds_are_counted_from_the_last_who_spoke(messages: list[dict[str, Any]], rounds: int) -> None:
    assert rounds_of(messages) == rounds


def test_a_first_call_is_demanded_once_for_each_who_speaks() -> None:
    first = "[tools]\ncall_first = true"
    assert asked(first, USER).tool_choice == "required"
    assert asked(first, USER, CALLED, RESULT).tool_choice == "auto"
    assert asked(first, USER, CALLED, RESULT, SAID, USER).tool_choice == "required"
    assert asked(first, USER, corrected=True).tool_choice == "auto"
    assert asked("", USER).tool_choice == "auto"


def test_several_calls_at_once_can_be_forbidden() -> None:
    assert asked("", USER).parallel_tool_calls
    assert not asked("[tools]\nparallel = false", USER).parallel_tool_calls


def test_after_its_rounds_it_has_no_tools_and_its_answer_has_its_form() -> None:
    two = '[tools]\nrounds = 2\n[answer]\nregex = "a+"'
    assert asked(two, USER, CALLED, RESULT).tools
    assert asked(two, USER, CALLED, RESULT).grammar is None
    last = asked(two, USER, CALLED, RESULT, CALLED, RESULT)
    assert not last.tools
    assert last.grammar is not None
    many = [CALLED, RESULT] * 50
    assert asked("", USER, *many).tools

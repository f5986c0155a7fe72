"""What a durable function's steps ask for, and what they give back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from nimbos.adk import Ended, StepFailed, ask, call, child, each, gather, send, sleep, spawn, think, tool, wait
from nimbos.adk.steps import run


@dataclass
class Line:
    """Answers each step with the next of `answers` for its verb."""

    answers: dict[str, list[Any]]
    asked: list[tuple[str, str, Any]] = field(default_factory=list)

    async def step(self, verb: str, name: str, arguments: Mapping[str, Any]) -> bytes:
        self.asked.append((verb, name, dict(arguments)))
        await asyncio.sleep(0)
        answer = self.answers[verb].pop(0)
        if isinstance(answer, StepFailed):
            raise answer
        return msgspec.json.encode(answer)


@tool(effect="pure")
def look(place: str) -> str:
    """Looks."""
    return place


@child
async def helper(input: Any) -> Any:
    return input


@dataclass
class Draft:
    title: str


async def test_each_step_says_what_it_wants_and_nothing_that_was_not_given() -> None:
    async def main(input: Any) -> Any:
        said = await think("Well?", max_tokens=5)
        seen = await call(look, place="here", step="first look")
        other = await spawn("judge", {"x": 1}, budget={"tokens": 5})
        await send(other, "hello")
        await sleep(2.5)
        return [said, seen, other.pid, await ask("Sure?", choices=["yes", "no"])]

    answers: dict[str, list[Any]] = {"think": ["I see"], "call": ["here"], "spawn": [{"pid": "proc_1"}]}
    line = Line({**answers, "send": [{}], "sleep": [{}], "ask": ["yes"]})
    assert await run(main, None, line) == ["I see", "here", "proc_1", "yes"]
    assert line.asked == [
        ("think", "think", {"messages": [{"role": "user", "content": "Well?"}], "max_tokens": 5}),
        ("call", "first look", {"tool": "look", "arguments": {"place": "here"}}),
        ("spawn", "spawn", {"program": "judge", "budget": {"tokens": 5}, "input": {"x": 1}}),
        ("send", "send", {"to": "proc_1", "message": "hello"}),
        ("sleep", "sleep", {"seconds": 2.5}),
        ("ask", "ask", {"question": "Sure?", "choices": ["yes", "no"]}),
    ]


async def test_an_answer_that_is_held_to_a_type_is_one() -> None:
    async def main(input: Any) -> Any:
        return await think("Well?", schema=Draft)

    line = Line({"think": [{"title": "A"}]})
    assert await run(main, None, line) == Draft("A")
    assert line.asked[0][2]["schema"]["$defs"]["Draft"]["required"] == ["title"]
    with pytest.raises(StepFailed, match="misfit"):
        await run(main, None, Line({"think": [{"name": "A"}]}))


async def test_each_is_spawn_and_wait_in_the_order_of_the_inputs() -> None:
    async def main(input: Any) -> Any:
        return await each(helper, input)

    exits = {"proc_2": {"reason": "ok", "result": "b"}, "proc_1": {"reason": "ok", "result": "a"}}
    line = Line({"spawn": [{"pid": "proc_1"}, {"pid": "proc_2"}], "wait": [{"exited": exits, "running": []}]})
    assert await run(main, ["x", "y"], line) == ["a", "b"]
    assert [asked[2]["input"] for asked in line.asked[:2]] == [
        {"nimbos.child": "helper", "input": "x"},
        {"nimbos.child": "helper", "input": "y"},
    ]


async def test_a_child_that_did_not_end_well_raises_only_when_its_value_is_wanted() -> None:
    async def main(input: Any) -> Any:
        return await wait("proc_1", "proc_2", "proc_1", any_of=True)

    exits = {"proc_1": {"reason": "failed", "result": "no idea"}}
    line = Line({"wait": [{"exited": exits, "running": ["proc_2"]}]})
    (ended,) = await run(main, None, line)
    assert ended == Ended(pid="proc_1", reason="failed", error="no idea")
    with pytest.raises(StepFailed, match="no idea"):
        ended.value()


async def test_several_at_once_are_all_asked_for_before_any_is_answered() -> None:
    async def main(input: Any) -> Any:
        return await gather(think("a"), think("b"), call("look", place="x"))

    line = Line({"think": ["A", "B"], "call": ["x"]})
    assert await run(main, None, line) == ["A", "B", "x"]


async def test_a_function_that_is_not_marked_cannot_be_a_child() -> None:
    async def other(input: Any) -> Any: ...

    async def main(input: Any) -> Any:
        return await spawn(other)

    with pytest.raises(TypeError, match="@child"):
        await run(main, None, Line({}))


async def test_a_step_outside_of_a_durable_function_says_so() -> None:
    with pytest.raises(RuntimeError, match="durable function"):
        await think("x")

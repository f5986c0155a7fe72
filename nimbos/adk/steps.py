"""Steps of a durable function: code that survives, because everything it asks the kernel for is recorded.

    async def main(input):
        parts = await each(summarise, input["pages"])                 # map: a child for each page …
        return await think("Join these:\\n" + "\\n".join(parts))        # … and reduce

A function that parks (a question to a person, a sleep, a child that takes its time) loses its coroutine. Woken, it runs
from the top, and every step that has a recorded outcome returns it at once. A step is known by its name, its arguments
and how many of the same came before it, never by its position; so code between steps must have no effects, and must not
ask the clock or chance for anything that becomes an argument. Steps that are alike and run at once can be told apart by
`name`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar, overload

import msgspec

from nimbos.adk.tools import Tool

T = TypeVar("T")
Budget: TypeAlias = Mapping[str, float]  # tokens, cost (in the currency of the prices), seconds, calls
ChildFunction: TypeAlias = Callable[[Any], Coroutine[Any, Any, Any]]
CHILD_MARK = "__nimbos_child__"
CHILD_KEY = "nimbos.child"  # in the input of a child that runs a function of its parent's program


class Line(Protocol):
    """To the kernel."""

    async def step(self, verb: str, name: str, arguments: Mapping[str, Any]) -> bytes:
        """The outcome as JSON. Raises: StepFailed."""
        ...


_line: ContextVar[Line] = ContextVar("nimbos_line")


class StepFailed(Exception):
    """A step ended with an error, which is recorded like a result. `code`: `raised`, `deadline`, `denied` …"""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How a child ended: `reason` is `ok`, `failed`, `cancelled`, `killed` or `rejected`. Or `asking`: it has not
    ended, and is out of budget, as `error` says."""

    pid: str
    reason: str
    result: Any = None
    error: str = ""

    def value(self) -> Any:
        """Its result. Raises: StepFailed for a child that did not end well."""
        if self.reason != "ok":
            raise StepFailed(f"child_{self.reason}", self.error or f"The child {self.pid} ended: {self.reason}.")
        return self.result


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """`sender`: `user:…`, or `process:` and an id. `body`: what was sent."""

    sender: str = msgspec.field(name="from")
    body: Any = msgspec.field(name="message", default=None)


@dataclass(frozen=True, slots=True)
class Child:
    pid: str

    async def result(self) -> Any:
        """Waits for its end. Raises: StepFailed for a child that did not end well."""
        (ended,) = await wait(self)
        return ended.value()


def child(function: ChildFunction) -> ChildFunction:
    """Lets `spawn` and `each` run this function in a process of its own. It stands at the top of the entry's file."""
    setattr(function, CHILD_MARK, True)
    return function


@overload
async def think(
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    schema: type[T],
    system: str = "",
    model: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    thinking: bool | int | str | None = None,
    name: str = "think",
) -> T: ...


@overload
async def think(
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    schema: Mapping[str, Any],
    system: str = "",
    model: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    thinking: bool | int | str | None = None,
    name: str = "think",
) -> Any: ...


@overload
async def think(
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    regex: str = "",
    system: str = "",
    model: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    thinking: bool | int | str | None = None,
    name: str = "think",
) -> str: ...


async def think(
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    schema: Any = None,
    regex: str = "",
    system: str = "",
    model: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    thinking: bool | int | str | None = None,
    name: str = "think",
) -> Any:
    """Asks the model. `prompt`: words, or messages in OpenAI's shape. `schema`: a type that the answer is an instance
    of, or a JSON Schema; `regex`: a pattern that the whole answer matches; the grammar holds both. `system`: instead of
    the program's instructions. What is not given is as the manifest has it.

    Raises: StepFailed, with the code `misfit` for an answer that its limit cut off before it was what it must be."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    typed = schema is not None and not isinstance(schema, Mapping)
    arguments: dict[str, Any] = {
        "messages": messages,
        "system": system,
        "model": model,
        "schema": msgspec.json.schema(schema) if typed else schema,
        "regex": regex,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "thinking": thinking,
    }
    given = {key: value for key, value in arguments.items() if value not in (None, "")}
    try:
        return await _step("think", name, given, str if schema is None else schema if typed else Any)
    except msgspec.ValidationError as error:  # a type may hold more than its schema says
        raise StepFailed("misfit", f"The answer is not what the type asks for: {error}") from error


async def call(
    tool: str | Tool[..., Any], /, *, step: str = "", step_deadline_s: float | None = None, **arguments: Any
) -> Any:
    """Calls a tool of the program through the gate. `step`: its name among the steps, the tool's own by default.

    Raises: StepFailed with what went wrong, which a model would be shown."""
    known_as = tool.name if isinstance(tool, Tool) else tool
    asked: dict[str, Any] = {"tool": known_as, "arguments": arguments}
    if step_deadline_s is not None:
        asked["deadline_s"] = step_deadline_s
    return await _step("call", step or f"call:{known_as}", asked, Any)


async def spawn(
    program: str | ChildFunction,
    input: Any = None,
    *,
    label: str = "",
    model: str = "",
    budget: Budget | None = None,
    detached: bool = False,
    name: str = "spawn",
) -> Child:
    """Starts a child: another program by its id or name, or a function of this one that `@child` marks. `label`: the
    child's name. `budget`: out of this process's own. A child that is not `detached` is cancelled when this ends."""
    if not isinstance(program, str):
        input = {CHILD_KEY: _marked(program), "input": input}
        program = ""
    asked = {"program": program, "name": label, "model": model, "budget": dict(budget or {}), "detached": detached}
    given = {key: value for key, value in asked.items() if value}
    return Child((await _step("spawn", name, {**given, "input": input}, dict[str, str]))["pid"])


async def wait(
    *children: Child | str,
    any_of: bool = False,
    timeout_s: float | None = None,
    asking: bool = False,
    name: str = "wait",
) -> list[Ended]:
    """Waits until all children have ended, or any of them, or the time is up; gives those that have ended, in the order
    they were named. With `asking` also when one of them is out of budget, which is among them then: `send` may give it
    more, and it is waited for again."""
    pids = [one.pid if isinstance(one, Child) else one for one in children]
    if not pids:
        return []
    asked: dict[str, Any] = {"children": pids, "mode": "any" if any_of else "all"}
    if timeout_s is not None:
        asked["timeout_s"] = timeout_s
    if asking:
        asked["asking"] = True
    waited: dict[str, Any] = await _step("wait", name, asked, dict[str, Any])
    spent = {pid: {"reason": "asking", "result": why} for pid, why in waited.get("asking", {}).items()}
    told = {**spent, **waited["exited"]}
    return [_ended(pid, told[pid]) for pid in dict.fromkeys(pids) if pid in told]


async def ask(question: str, *, choices: Sequence[str] = (), name: str = "ask") -> Any:
    """Asks a person, for as long as it takes; gives what they answer: one of the `choices`, where there are any."""
    asked: dict[str, Any] = {"question": question}
    if choices:
        asked["choices"] = list(choices)
    return await _step("ask", name, asked, Any)


async def sleep(seconds: float, *, name: str = "sleep") -> None:
    """By the wall clock, from when it was first asked for, also through a reboot."""
    await _step("sleep", name, {"seconds": seconds}, Any)


async def send(to: Child | str, message: Any, *, budget: Budget | None = None, name: str = "send") -> None:
    """A message to another process, which is given it once. `budget`: so much more for a child, out of this process's
    own."""
    pid = to.pid if isinstance(to, Child) else to
    more = {"budget": dict(budget)} if budget else {}
    await _step("send", name, {"to": pid, "message": message, **more}, Any)


async def receive(*, timeout_s: float | None = None, name: str = "receive") -> Message | None:
    """The next message that somebody sends this process, as soon as there is one; each is received once. None when the
    time is up."""
    asked = {} if timeout_s is None else {"timeout_s": timeout_s}
    return await _step("receive", name, asked, Message | None)


async def gather(*steps: Awaitable[Any]) -> list[Any]:
    """Several at once. The first error is raised when it comes; what the others bring is recorded all the same."""
    return list(await asyncio.gather(*steps))


def _ended(pid: str, exit: Mapping[str, Any]) -> Ended:
    """What came of a child that did not end well is why, as words."""
    result = exit.get("result")
    if exit["reason"] == "ok":
        return Ended(pid=pid, reason="ok", result=result)
    return Ended(pid=pid, reason=exit["reason"], error=result if isinstance(result, str) else "")


def _marked(function: ChildFunction) -> str:
    if not getattr(function, CHILD_MARK, False):
        raise TypeError(f"{function!r} cannot be spawned. Put @child above it.")
    return str(getattr(function, "__name__", ""))


async def _step(verb: str, name: str, arguments: Mapping[str, Any], shape: type[T] | Any) -> T:
    line = _line.get(None)
    if line is None:
        raise RuntimeError(f"`{verb}` is a step of a durable function; a tool or a plain script cannot take it.")
    value: T = msgspec.json.decode(await line.step(verb, name, arguments), type=shape)
    return value


async def run(function: Callable[[Any], Awaitable[Any]], input: Any, line: Line) -> Any:
    """The function, with its steps going over `line`."""
    token = _line.set(line)
    try:
        return await function(input)
    finally:
        _line.reset(token)

"""What is killed: programs that use every syscall, effect class, child, timer, question, fork and budget there is, with
a scripted model; and what a person does for them.

Tools with an effect leave a line in the file that the world is, outside of every home: what happened there happened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

TOOLS = '''
import json
from pathlib import Path
from nimbos.adk import Happened, tool

WORLD = Path({world!r})

def _do(name: str, key: str) -> str:
    with WORLD.open("a") as file:
        file.write(json.dumps([Path.cwd().name, name, key]) + "\\n")
    return f"{{name}} is done"

def _booked(key: str):
    lines = WORLD.read_text().splitlines() if WORLD.exists() else []
    return Happened("book is done") if any(json.loads(line)[1:] == ["book", key] for line in lines) else False

@tool(effect="pure")
def look() -> str:
    """Looks."""
    return _do("look", "")

@tool(effect="pure")
def large() -> str:
    """Many words."""
    return "word " * 400

@tool(effect="idempotent")
def pay(key: str) -> str:
    """Pays."""
    return _do("pay", key)

@tool(effect="checkable", verify=_booked)
def book(key: str) -> str:
    """Books."""
    return _do("book", key)

@tool(effect="opaque")
def mail(to: str = "") -> str:
    """Sends."""
    return _do("mail", "") + (f" for {{to}}" if to else "")
'''

AGENT = """name = "agent"
[tools]
builtin = ["ask", "pin", "read", "send", "sleep", "spawn", "wait"]
confirm = ["pay"]
[limits]
result_bytes = 256
turns = 500
"""
FUNCTION = """name = "function"
entry = "main.py:main"
"""
MAIN = """
from nimbos.adk import ask, call, child, each, gather, send, sleep, spawn, think, wait

@child
async def part(number):
    paid = await call("pay")
    words = await think(f"part {number}")
    return [number, paid, words]

@child
async def sender(_):
    return await call("mail")

async def main(given):
    first = await gather(call("look"), call("pay"), think("think of one"), think("think of two"))
    booked = await call("book")
    mailed = await call("mail")
    listener = await spawn("agent", "listen", label="listener")
    await send(listener, "heard you")
    parts = await each(part, [1, 2])
    sent = await spawn(sender)
    (ended,) = await wait(sent, any_of=True)
    await sleep(0.05)
    colour = await ask("Which colour?")
    heard = await listener.result()
    return [first, booked, mailed, parts, ended.result, colour, heard]
"""


def mail_result(to: str = "") -> str:
    """What the tool would have said: another word would make the model go on in another way."""
    return "mail is done" + (f" for {to}" if to else "")


def calling(name: str, **arguments: Any) -> dict[str, Any]:
    return {"text": "", "tool_calls": [{"name": name, "arguments": arguments}]}


def chain(*steps: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Replies, each to the last words that match."""
    return [{"match": match, **reply} for match, reply in steps]


LOOK_PAY_MAIL = [
    {"name": "look", "arguments": {}},
    {"name": "pay", "arguments": {}},
    {"name": "mail", "arguments": {"to": "Ada"}},
]
LOOK_LARGE: list[dict[str, Any]] = [{"name": name, "arguments": {}} for name in ("look", "look", "large")]  # at once
SCRIPT: dict[str, Any] = {
    "replies": chain(
        ("everything", calling("look")),
        ("look is done", calling("pay")),
        ("pay is done", calling("book")),
        ("book is done", calling("mail")),
        ("mail is done$", {"text": "", "tool_calls": LOOK_LARGE}),
        ("word word", calling("read", handle="00000000")),
        ("handle", calling("pin", text="promise to finish")),
        ("promise", calling("no_such_tool")),
        ("no tool 'no_such_tool'", calling("send", to="proc_nobody", message="hello")),
        ("no process", calling("spawn", input="small")),
        ("^small", {"text": "I am small."}),
        ("I am small", calling("sleep", seconds=0.05)),
        ('"pid"', calling("wait")),
        (r"slept_s.*0\.05", calling("ask", question="Which colour?")),
        ("blue", {"text": "All is done, in blue."}),
        ("heard you", {"text": "I heard."}),
        (r"listen|slept_s.*0\.3", calling("sleep", seconds=0.3)),
        ("forked", calling("ask", question="Shall I?")),
        ("go on", {"text": "", "tool_calls": LOOK_PAY_MAIL}),
        ("long", {"text": " ".join(f"w{number}" for number in range(200)), "tokens_per_second": 2000}),
    ),
    "default": {"text": "Fine."},
}


@dataclass(frozen=True)
class Scenario:
    """`input` is given to `program`. `answers`: to questions. `budget`, and what it is topped up with. `forks`: whether
    it is forked at its first question, once to be adopted and once to be dropped."""

    name: str
    program: str
    input: str
    budget: dict[str, int] | None = None
    top_up: dict[str, int] = field(default_factory=dict)
    forks: bool = False
    mails: bool = True  # has an effect that may be in doubt


SCENARIOS = {
    one.name: one
    for one in (
        Scenario("agent", "agent", "everything"),
        Scenario("function", "function", ""),
        Scenario("budget", "agent", "long", budget={"tokens": 60}, top_up={"tokens": 1_000}, mails=False),
        Scenario("fork", "agent", "forked", forks=True),
    )
}


def programs(world: str) -> dict[str, dict[str, str]]:
    tools = TOOLS.format(world=world)
    return {
        "agent": {"nimbos.toml": AGENT, "instructions.md": "Do it.", "tools.py": tools},
        "function": {"nimbos.toml": FUNCTION, "main.py": MAIN, "tools.py": tools},
    }


def script() -> str:
    return json.dumps(SCRIPT)

"""The kernel's own tools: what a model may be offered of the syscalls, and what their arguments look like. A durable
function's steps are held to the same schemas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nimbos.kernel.words import Effect, Verb

_TEXT: Final = {"type": "string", "minLength": 1, "maxLength": 20_000}
_PID: Final = {"type": "string", "minLength": 1, "maxLength": 100}
_SECONDS: Final = {"type": "number", "minimum": 0, "maximum": 31_536_000}
_COUNT: Final = {"type": "integer", "minimum": 1, "maximum": 1_000_000_000_000}
_BUDGET: Final = {
    "type": "object",
    "properties": {
        "tokens": _COUNT,
        "cost": {"type": "number", "exclusiveMinimum": 0, "maximum": 1_000_000_000},
        "seconds": _COUNT,
        "calls": _COUNT,
    },
    "required": [],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Builtin:
    """`effect`: looking again is none, so what waits is pure; what writes is in the log's own transaction."""

    verb: Verb
    effect: Effect
    description: str
    parameters: Mapping[str, Any]


BUILTINS: Final[dict[str, Builtin]] = {
    "ask": Builtin(
        verb=Verb.ASK,
        effect=Effect.PURE,
        description="Ask the person you work for a question, and get their answer. Only for what you cannot find out.",
        parameters={
            "type": "object",
            "properties": {
                "question": _TEXT,
                "choices": {"type": "array", "items": {"type": "string", "maxLength": 500}, "maxItems": 20},
            },
            "required": ["question"],
            "additionalProperties": False,
        },
    ),
    "pin": Builtin(
        verb=Verb.PIN,
        effect=Effect.INTERNAL,
        description="Keep a note in view for as long as you work: a goal, a promise, an open question. "
        "`release` takes the name that an earlier pin returned and lets that note go.",
        parameters={
            "type": "object",
            "properties": {"text": {**_TEXT, "maxLength": 4_000}, "release": {"type": "string", "maxLength": 200}},
            "required": [],
            "additionalProperties": False,
        },
    ),
    "read": Builtin(
        verb=Verb.READ,
        effect=Effect.PURE,
        description="Read on in a result of which you were shown the head: its handle, and the byte to begin at.",
        parameters={
            "type": "object",
            "properties": {
                "handle": {"type": "string", "minLength": 1, "maxLength": 200},
                "offset": {"type": "integer", "minimum": 0, "maximum": 1 << 40},
                "bytes": {"type": "integer", "minimum": 16, "maximum": 1 << 20},
            },
            "required": ["handle"],
            "additionalProperties": False,
        },
    ),
    "receive": Builtin(
        verb=Verb.RECEIVE,
        effect=Effect.PURE,
        description="Wait until somebody sends you a message, and get it with who sent it. With `timeout_s`, nothing "
        "when none has come by then.",
        parameters={
            "type": "object",
            "properties": {"timeout_s": _SECONDS},
            "required": [],
            "additionalProperties": False,
        },
    ),
    "send": Builtin(
        verb=Verb.SEND,
        effect=Effect.INTERNAL,
        description="Send a message to another process: a child, or whoever's id you know. `budget` gives a child that "
        "much more of your own.",
        parameters={
            "type": "object",
            "properties": {"to": _PID, "message": {}, "budget": _BUDGET},
            "required": ["to", "message"],
            "additionalProperties": False,
        },
    ),
    "sleep": Builtin(
        verb=Verb.SLEEP,
        effect=Effect.PURE,
        description="Do nothing for some seconds. It costs nothing.",
        parameters={
            "type": "object",
            "properties": {"seconds": _SECONDS},
            "required": ["seconds"],
            "additionalProperties": False,
        },
    ),
    "spawn": Builtin(
        verb=Verb.SPAWN,
        effect=Effect.INTERNAL,
        description="Start a process that works on `input` beside you; returns its id. `program` names one of yours; "
        "without it, it is another of your own kind. `wait` brings its result.",
        parameters={
            "type": "object",
            "properties": {
                "input": {},
                "program": {"type": "string", "maxLength": 100},
                "name": {"type": "string", "maxLength": 200},
                "model": {"type": "string", "maxLength": 200},
                "detached": {"type": "boolean"},
                "budget": _BUDGET,
            },
            "required": ["input"],
            "additionalProperties": False,
        },
    ),
    "wait": Builtin(
        verb=Verb.WAIT,
        effect=Effect.PURE,
        description="Wait until processes that you started are over, and get their results: those named, or all; "
        "with mode `any` until the first of them is; with `asking` also until one is out of budget, which goes on when "
        "`send` gives it more.",
        parameters={
            "type": "object",
            "properties": {
                "children": {"type": "array", "items": _PID, "maxItems": 1_000},
                "mode": {"enum": ["all", "any"]},
                "timeout_s": _SECONDS,
                "asking": {"type": "boolean"},
            },
            "required": [],
            "additionalProperties": False,
        },
    ),
}

INTERNAL: Final = frozenset({Verb.SEND, Verb.SPAWN, Verb.PIN})
WAITING: Final = frozenset({Verb.ASK, Verb.RECEIVE, Verb.WAIT, Verb.SLEEP})

"""The agent development kit: what a program's Python imports. Light, as a worker imports it each time it starts."""

import importlib
from typing import TYPE_CHECKING, Any

from nimbos.adk.mapping import each
from nimbos.adk.program import Program, read_program
from nimbos.adk.schema import BadTool, Field
from nimbos.adk.steps import (
    Child,
    Ended,
    Message,
    StepFailed,
    ask,
    call,
    child,
    gather,
    receive,
    send,
    sleep,
    spawn,
    think,
    wait,
)
from nimbos.adk.tools import Happened, Tool, tool

if TYPE_CHECKING:
    from nimbos.adk.client import Client, Process, Refused, Seen

__all__ = [
    "BadTool",
    "Child",
    "Client",
    "Ended",
    "Field",
    "Happened",
    "Message",
    "Process",
    "Program",
    "Refused",
    "Seen",
    "StepFailed",
    "Tool",
    "ask",
    "call",
    "child",
    "each",
    "gather",
    "read_program",
    "receive",
    "send",
    "sleep",
    "spawn",
    "think",
    "tool",
    "wait",
]


def __getattr__(name: str) -> Any:
    """What talks to a server is imported when it is asked for: no worker needs it."""
    if name in ("Client", "Process", "Refused", "Seen"):
        return getattr(importlib.import_module("nimbos.adk.client"), name)
    raise AttributeError(name)

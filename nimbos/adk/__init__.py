"""The agent development kit: what a program's Python imports. Light, as a worker imports it each time it starts."""

from nimbos.adk.program import Program, read_program
from nimbos.adk.schema import BadTool, Field
from nimbos.adk.steps import Child, Ended, StepFailed, ask, call, child, each, gather, send, sleep, spawn, think, wait
from nimbos.adk.tools import Happened, Tool, tool

__all__ = [
    "BadTool",
    "Child",
    "Ended",
    "Field",
    "Happened",
    "Program",
    "StepFailed",
    "Tool",
    "ask",
    "call",
    "child",
    "each",
    "gather",
    "read_program",
    "send",
    "sleep",
    "spawn",
    "think",
    "tool",
    "wait",
]

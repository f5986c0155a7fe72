"""Tools that a request brings, and which of them the model may or must call.
`schema.py` checks their arguments, `call_grammar.py` writes the grammar of a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nimbos.chat.family import CallForm
from nimbos.chat.schema import read_schema
from nimbos.errors import InvalidRequest, UnsupportedField

MAX_TOOLS = 256
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")

# What we say to a model whose template knows no tools. The form is the Hermes one.
_INTRODUCTION = (
    "You can call the tools listed below, one JSON object on each line.\n\n{tools}\n\n"
    "To call a tool, answer with exactly this and nothing after it:\n"
    '<tool_call>\n{{"name": "TOOL", "arguments": {{ARGUMENTS}}}}\n</tool_call>\n'
    "The result comes back between <tool_response> and </tool_response>. If no tool helps, just answer."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """`wire`: as templates want it. `schema`: of the arguments, fit for a grammar."""

    name: str
    description: str
    schema: dict[str, Any]
    strict: bool
    wire: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What may be called in this answer, and how that is written; the splitter reads it.

    `must`: the answer is a call. `hidden_tag`: the form's tags are control tokens; they have no text in an answer, so a
    call is known by its JSON alone. `bare`: a call without tags counts when the answer starts with it.
    """

    form: CallForm
    tools: tuple[Tool, ...]
    must: bool
    parallel: bool
    hidden_tag: bool
    bare: bool

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)


def read_tools(tools: Sequence[Any] | None) -> tuple[Tool, ...]:
    """Raises: InvalidRequest naming the tool and what is wrong with it."""
    if not tools:
        return ()
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"There are {len(tools)} tools; at most {MAX_TOOLS} are taken.", param="tools")
    read = tuple(_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))
    names = [tool.name for tool in read]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"Two tools are called {twice!r}. Give each its own name.", param="tools")
    return read


def choose_tools(tools: tuple[Tool, ...], choice: str | Mapping[str, Any]) -> tuple[tuple[Tool, ...], bool]:
    """Which tools may be called, and whether one must be.

    Raises: InvalidRequest for a choice that is none, or names a tool that is not there.
    """
    if choice in ("none", "auto"):
        return (tools if choice == "auto" else ()), False
    if choice == "required":
        if not tools:
            raise InvalidRequest('tool_choice is "required" and there are no tools.', param="tool_choice")
        return tools, True
    name = _chosen_name(choice)
    named = tuple(tool for tool in tools if tool.name == name)
    if not named:
        known = ", ".join(tool.name for tool in tools) or "none"
        raise InvalidRequest(f"tool_choice names {name!r}, and the tools are: {known}.", param="tool_choice")
    return named, True


def introduce(tools: Sequence[Tool]) -> str:
    """The system message for a template that knows no tools."""
    return _INTRODUCTION.format(tools="\n".join(json.dumps(t.wire["function"], ensure_ascii=False) for t in tools))


def _chosen_name(choice: str | Mapping[str, Any]) -> str:
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
        if isinstance(name, str):
            return name
    raise InvalidRequest(
        f'tool_choice is {choice!r:.60}; it must be "none", "auto", "required" or name a function.', param="tool_choice"
    )


def _read_tool(tool: Any, where: str) -> Tool:
    if not isinstance(tool, Mapping):
        raise InvalidRequest(f"{where} is not an object.", param=where)
    if tool.get("type", "function") != "function":
        raise UnsupportedField(f"{where}.type", why=f'{tool["type"]!r:.60}; only "function" tools are supported')
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{where}.function is missing.", param=f"{where}.function")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{where}.function.name is {name!r:.100}; it must have 1 to 128 letters, digits or any of _ . : / -",
            param=f"{where}.function.name",
        )
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(f"{where}.function.description must be a string.", param=f"{where}.function.description")
    strict = function.get("strict") is True
    given = function.get("parameters")
    schema = read_schema(given, where=f"{where}.function.parameters (tool {name})", strict=strict)
    described = {
        "name": name,
        "description": description or "",
        "parameters": given if given is not None else {"type": "object", "properties": {}},
    }
    wire = {"type": "function", "function": described}
    return Tool(name=name, description=description or "", schema=schema, strict=strict, wire=wire)

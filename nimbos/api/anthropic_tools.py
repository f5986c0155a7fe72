"""Anthropic's tools and the choice among them, as the chat layer takes them. Tools that the provider itself runs or
defines (`web_search_…`, `bash_…`) are refused by name: nobody runs them here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from nimbos.api.anthropic_content import joined, string_of, text_of
from nimbos.api.lenient import Ignored
from nimbos.errors import InvalidRequest, UnsupportedField

FIELDS = frozenset({"name", "description", "input_schema", "type", "strict", "input_examples", "allowed_callers"})
HINTS = frozenset({"cache_control", "defer_loading", "eager_input_streaming"})
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_EXAMPLES = "Examples of its input:"


def read_tools(tools: Sequence[Any] | None, ignored: Ignored) -> list[dict[str, Any]] | None:
    """In OpenAI's form. Raises: InvalidRequest, UnsupportedField."""
    if not tools:
        return None
    return [_read_tool(tool, f"tools[{number}]", ignored) for number, tool in enumerate(tools)]


def read_choice(choice: Any) -> tuple[str | dict[str, Any], bool]:
    """OpenAI's `tool_choice`, and whether several calls may be made at once.

    Raises: InvalidRequest.
    """
    if choice is None:
        return "auto", True
    kind = choice.get("type") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or kind not in (*_CHOICES, "tool"):
        raise InvalidRequest("`tool_choice.type` must be one of auto, any, tool, none.", param="tool_choice.type")
    parallel = choice.get("disable_parallel_tool_use") is not True
    if kind != "tool":
        return _CHOICES[str(kind)], parallel
    return {"name": string_of(choice, "name", "tool_choice")}, parallel


def _read_tool(tool: Any, where: str, ignored: Ignored) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise InvalidRequest(f"`{where}` must be an object.", param=where)
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise UnsupportedField(
            f"{where}.type",
            why=f"{str(kind)[:60]!r}, which nobody runs or defines here; send the tool with its own `input_schema`",
        )
    callers = tool.get("allowed_callers")
    if callers is not None and not (isinstance(callers, list) and "direct" in callers):
        raise UnsupportedField(f"{where}.allowed_callers", why="without 'direct', and tools are called directly here")
    for name in tool.keys() - FIELDS - HINTS:
        ignored.add(f"tools[].{name}")
    if not isinstance(tool.get("input_schema"), dict):
        raise InvalidRequest(f"`{where}.input_schema` must be a JSON Schema object.", param=f"{where}.input_schema")
    function = {
        "name": string_of(tool, "name", where),
        "description": _described(tool, where),
        "parameters": tool["input_schema"],
        "strict": tool.get("strict") is True,
    }
    return {"type": "function", "function": function}


def _described(tool: dict[str, Any], where: str) -> str:
    """The description, with the examples behind it: templates have no place for them."""
    words = text_of(tool, "description", where)
    examples = tool.get("input_examples")
    if not examples:
        return words
    if not isinstance(examples, list):
        raise InvalidRequest(f"`{where}.input_examples` must be a list.", param=f"{where}.input_examples")
    lines = [msgspec.json.encode(example).decode() for example in examples]
    return joined([*filter(None, [words]), _EXAMPLES, *lines])

"""Tools and their choice in the flat form of the Responses API, as chat takes them."""

from __future__ import annotations

from typing import Any

from nimbos.api.messages import ToolChoice, allow_tools
from nimbos.api.responses_items import HOSTED
from nimbos.errors import InvalidRequest, UnsupportedField

_REFUSED = {
    "web_search": "this server does not search the web",
    "web_search_preview": "this server does not search the web",
    "file_search": "there are no vector stores here",
    "code_interpreter": "this server runs no code for a model",
    "image_generation": "models here write text only",
    "computer": "no screen is driven here",
    "computer_use": "no screen is driven here",
    "computer_use_preview": "no screen is driven here",
    "mcp": "this server calls no MCP servers; call them yourself and offer their tools as functions",
    "local_shell": "offer your shell as a function",
    "shell": "offer your shell as a function",
    "apply_patch": "offer it as a function",
    "custom": "offer it as a function with one string",
    "namespace": "offer its functions one by one",
    "tool_search": "send the tools themselves",
    "programmatic_tool_calling": "this server runs no code for a model",
}
_FIELDS = frozenset({"type", "name", "description", "parameters", "strict"})
_CHOICES = ("none", "auto", "required")


def chat_tools(given: list[Any] | None) -> list[dict[str, Any]] | None:
    """Raises: UnsupportedField for a hosted tool, by its name; InvalidRequest."""
    if not given:
        return None
    return [_chat_tool(tool, f"tools[{number}]") for number, tool in enumerate(given)]


def chat_choice(tools: list[dict[str, Any]] | None, given: Any) -> tuple[list[dict[str, Any]] | None, ToolChoice]:
    """Raises: InvalidRequest, UnsupportedField."""
    if given is None:
        return tools, "auto"
    if given in _CHOICES:
        return tools, given
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "function" and isinstance(given.get("name"), str):
        return tools, {"name": given["name"]}
    if kind == "allowed_tools":
        nested = {"mode": given.get("mode"), "tools": _nested(given.get("tools"))}
        return allow_tools(tools, {"type": "allowed_tools", "allowed_tools": nested})
    _refuse_hosted(kind, "tool_choice")
    raise InvalidRequest(
        f"`tool_choice` must be one of {', '.join(_CHOICES)}, or an object with the type 'function' and a `name`, "
        "or 'allowed_tools'.",
        param="tool_choice",
    )


def echoed(tools: list[Any] | None) -> list[dict[str, Any]]:
    """The tools as the response repeats them, each with the fields that the official types demand."""
    return [{"description": None, "parameters": None, "strict": None, **tool} for tool in tools or []]


def _nested(listed: Any) -> Any:
    """Chat's names are inside `function`."""
    if not isinstance(listed, list):
        return None
    for tool in listed:
        if isinstance(tool, dict):
            _refuse_hosted(tool.get("type"), "tool_choice.tools")
    return [{"function": tool} for tool in listed]


def _chat_tool(tool: Any, path: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise InvalidRequest(f"`{path}` is not an object.", param=path)
    kind = tool.get("type")
    _refuse_hosted(kind, path)
    if kind != "function":
        raise InvalidRequest(f"`{path}.type` is {kind!r:.60}; it must be 'function'.", param=f"{path}.type")
    for name, value in tool.items():
        if name not in _FIELDS and not _changes_nothing(name, value):
            raise UnsupportedField(f"{path}.{name[:60]}", why=f"not supported in a function: {HOSTED}")
    function = {name: tool[name] for name in _FIELDS - {"type"} if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _refuse_hosted(kind: Any, path: str) -> None:
    if not isinstance(kind, str):
        return
    base = kind if kind in _REFUSED else kind.rsplit("_20", 1)[0].rsplit("-20", 1)[0]  # web_search_2025_08_26
    if base in _REFUSED:
        raise UnsupportedField(f"{path}.type", why=f"{kind[:60]!r}, which is not offered: {_REFUSED[base]}")


def _changes_nothing(name: str, value: Any) -> bool:
    """`output_schema` is for whoever runs the function."""
    return (
        value is None
        or name == "output_schema"
        or (name in ("defer_loading", "async") and value is False)
        or (name == "allowed_callers" and value == ["direct"])
    )

"""The messages and tools of a chat request, as far as the dialect goes; `chat` reads roles, contents and schemas.

Clients send back whole messages of earlier answers, so what an answer of ours holds is accepted in a question.
"""

from __future__ import annotations

from typing import Any, Literal

from nimbos.errors import InvalidRequest, UnsupportedField

MESSAGES_MAX = 10_000

_ECHOES = frozenset({"annotations", "refusal", "x_nimbos"})  # of our own answers; nothing in them for the model
_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"})

ToolChoice = Literal["none", "auto", "required"] | dict[str, Any]


def check_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without empty fields and echoes.

    Raises: InvalidRequest or UnsupportedField with the path.
    """
    if len(messages) > MESSAGES_MAX:
        raise InvalidRequest(f"There may be {MESSAGES_MAX} messages; here are {len(messages)}.", param="messages")
    return [_check_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def allow_tools(
    tools: list[dict[str, Any]] | None, choice: ToolChoice | None
) -> tuple[list[dict[str, Any]] | None, ToolChoice]:
    """OpenAI's `allowed_tools` choice as fewer tools and a plain choice; any other choice as it is."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return tools, choice or "auto"
    allowed = choice.get("allowed_tools")
    mode = allowed.get("mode") if isinstance(allowed, dict) else None
    listed = allowed.get("tools") if isinstance(allowed, dict) else None
    if mode not in ("auto", "required") or not isinstance(listed, list):
        raise InvalidRequest(
            "`tool_choice.allowed_tools` must have `mode` ('auto' or 'required') and `tools`.", param="tool_choice"
        )
    wanted = {_name(tool) for tool in listed}
    kept = [tool for tool in tools or [] if _name(tool) in wanted]
    if not wanted or len(kept) != len(wanted):
        raise InvalidRequest("`tool_choice.allowed_tools` names a tool that is not in `tools`.", param="tool_choice")
    return kept, "required" if mode == "required" else "auto"


def _name(tool: Any) -> str | None:
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _check_message(message: dict[str, Any], path: str) -> dict[str, Any]:
    if message.get("role") == "function":
        raise UnsupportedField(f"{path}.role", why="the deprecated 'function'; use 'tool'")
    present = {name: value for name, value in message.items() if value is not None}
    for name in present:
        if name not in _FIELDS and name not in _ECHOES:
            raise UnsupportedField(f"{path}.{name[:60]}", why="not supported in a message")
    return {name: value for name, value in present.items() if name not in _ECHOES}

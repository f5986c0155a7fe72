"""OpenAI's messages as chat templates want them: plain dicts with text content and arguments as objects.
Knows nothing of templates; `family.py` says what a template can take, and the functions below fit messages to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from nimbos.errors import InvalidRequest, UnsupportedField

Message = dict[str, Any]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_NOT_YET = ("audio", "function_call", "images", "partial", "prefix")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MAX_ARGUMENT_DEPTH = 64


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Fresh dicts: `developer` becomes `system`, text parts one string, arguments of tool calls objects,
    and leading system messages one.

    Raises: InvalidRequest and UnsupportedField, naming the message.
    """
    if not messages:
        raise InvalidRequest("There are no messages. Send at least one.", param="messages")
    names: dict[str, str] = {}  # tool call id → the tool's name, for templates that write it beside the result
    return _join_leading_system([_normalise_one(m, f"messages[{i}]", names) for i, m in enumerate(messages)])


def last_user_text(messages: Sequence[Message]) -> str:
    return next((str(m["content"]) for m in reversed(messages) if m["role"] == "user"), "")


def without_system(messages: Sequence[Message]) -> list[Message]:
    """For templates without a system role: the words go in front of the first user message."""
    words = [m["content"] for m in messages if m["role"] == "system" and m["content"]]
    rest = [m for m in messages if m["role"] != "system"]
    if not words:
        return rest
    at = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    if at is None:
        return [{"role": "user", "content": "\n\n".join(words)}, *rest]
    merged = {**rest[at], "content": "\n\n".join([*words, rest[at]["content"]])}
    return [*rest[:at], merged, *rest[at + 1 :]]


def with_thoughts_apart(messages: Sequence[Message], open_mark: str, close_mark: str) -> list[Message]:
    """Thinking that a client left in front of the assistant's words moves to `reasoning_content`, where templates
    look for it: marks inside of content are kept from being marks."""
    return [_thoughts_apart(m, open_mark, close_mark) for m in messages]


def _thoughts_apart(message: Message, open_mark: str, close_mark: str) -> Message:
    words = str(message["content"]).lstrip()
    if message["role"] != "assistant" or "reasoning_content" in message or not words.startswith(open_mark):
        return message
    thoughts, closed, rest = words[len(open_mark) :].partition(close_mark)
    if not closed:
        return message
    return {**message, "content": rest.lstrip("\n"), "reasoning_content": thoughts.strip("\n")}


def with_system_text(messages: Sequence[Message], text: str) -> list[Message]:
    """Appends to the leading system message, or makes one."""
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}".lstrip("\n")}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def without_tool_roles(messages: Sequence[Message], write_call: Callable[[str, Any], str]) -> list[Message]:
    """For templates that know no tools: calls become the assistant's words, results the user's."""
    plain: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("tool_results"):
                plain[-1]["content"] += "\n" + result
            else:
                plain.append({"role": "user", "content": result, "tool_results": True})
        elif message.get("tool_calls"):
            calls = [write_call(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
            words = "\n".join([message["content"], *calls] if message["content"] else calls)
            kept = {key: value for key, value in message.items() if key != "tool_calls"}
            plain.append({**kept, "content": words})
        else:
            plain.append(dict(message))
    return [{key: value for key, value in m.items() if key != "tool_results"} for m in plain]


def _normalise_one(message: Mapping[str, Any], where: str, names: dict[str, str]) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} is not an object.", param=where)
    given = message.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise InvalidRequest(
            f"{where}.role is {given!r}; it must be one of {', '.join(_ROLES)}.", param=f"{where}.role"
        )
    for field in _NOT_YET:
        if message.get(field):
            raise UnsupportedField(f"{where}.{field}", why="not supported in messages")
    calls = _read_calls(message, where, names) if role == "assistant" else []
    content = _read_content(message.get("content"), f"{where}.content", may_be_empty=role == "assistant")
    plain: Message = {"role": role, "content": content}
    if isinstance(message.get("name"), str):
        plain["name"] = message["name"]
    if calls:
        plain["tool_calls"] = calls
    if role == "assistant":
        plain.update(_read_reasoning(message, where))
    if role == "tool":
        plain.update(_read_result_ids(message, where, names))
    return plain


def _read_content(content: Any, where: str, *, may_be_empty: bool) -> str:
    if content is None and may_be_empty:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of text parts.", param=where)
    return "\n".join(_read_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _read_part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise InvalidRequest(f'{where} must be an object with a "type".', param=where)
    if kind == "refusal":
        text = part.get("refusal")
    elif kind in _TEXT_PARTS:
        text = part.get("text")
    else:
        raise UnsupportedField(f"{where}.{kind}", why=f"not supported: this model takes text, not {kind!r} parts")
    if not isinstance(text, str):
        raise InvalidRequest(f"{where} holds no text.", param=where)
    return text


def _read_reasoning(message: Mapping[str, Any], where: str) -> Message:
    for field in ("reasoning_content", "reasoning"):
        value = message.get(field)
        if value is None:
            continue
        if not isinstance(value, str):
            raise InvalidRequest(f"{where}.{field} must be a string.", param=f"{where}.{field}")
        return {"reasoning_content": value}
    return {}


def _read_result_ids(message: Mapping[str, Any], where: str, names: Mapping[str, str]) -> Message:
    call_id = message.get("tool_call_id")
    if not isinstance(call_id, str):
        raise InvalidRequest(
            f"{where}.tool_call_id must be the id of the call it answers.", param=f"{where}.tool_call_id"
        )
    return {"tool_call_id": call_id, **({"name": names[call_id]} if call_id in names else {})}


def _read_calls(message: Mapping[str, Any], where: str, names: dict[str, str]) -> list[Message]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where}.tool_calls must be a list.", param=f"{where}.tool_calls")
    return [_read_call(call, f"{where}.tool_calls[{i}]", names) for i, call in enumerate(calls)]


def _read_call(call: Any, where: str, names: dict[str, str]) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str):
        raise InvalidRequest(f"{where} must have a function with a name.", param=where)
    call_id = call.get("id")
    if isinstance(call_id, str):
        names[call_id] = name
    arguments = _read_arguments(function.get("arguments"))
    return {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}


def _read_arguments(arguments: Any) -> Any:
    """An object for the template. What is no JSON object (a call cut off by its length, say) stays the text it was."""
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) and depth_within(value, _MAX_ARGUMENT_DEPTH) else arguments


def depth_within(value: Any, limit: int) -> bool:
    """Whether lists and objects nest at most `limit` deep; walks level by level, so depth costs no stack."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return True
    return False


def _join_leading_system(messages: list[Message]) -> list[Message]:
    """Several system messages at the start become one; many templates take only one."""
    count = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    if count < 2:
        return messages
    joined = {**messages[0], "content": "\n\n".join(m["content"] for m in messages[:count] if m["content"])}
    return [joined, *messages[count:]]


def write_hermes_call(name: str, arguments: Any) -> str:
    """A call as the generic form writes it into history."""
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {written}}}\n</tool_call>'

"""Items as the messages of a chat: what `chat` makes the prompt of. Read `responses_items.py` first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nimbos.api.responses_items import Item, unseal


def messages_of(items: Iterable[Item], *, instructions: str | None) -> list[dict[str, Any]]:
    """One message of an assistant for what one answer had: thinking, words, calls, in this order.

    The same items give the same messages whatever comes after them, so the next turn's prompt begins like this one's.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        match item["type"]:
            case "message" if item["role"] != "assistant":
                messages.append({"role": item["role"], "content": _words(item["content"])})
            case "message":
                _say(messages, "content", _words(item["content"]))
            case "reasoning":
                if thoughts := thoughts_of(item):
                    _say(messages, "reasoning_content", thoughts)
            case "function_call":
                _call(messages, item)
            case "function_call_output":
                output = _words(item["output"])
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
            case "compaction":
                messages.append({"role": "system", "content": unseal(item["encrypted_content"], "encrypted_content")})
    return messages


def thoughts_of(item: Item) -> str:
    """A reasoning item's text: its content, else what was sealed, else its summary (ours are whole)."""
    if item.get("content"):
        return _words(item["content"])
    if "encrypted_content" in item:
        return unseal(item["encrypted_content"], "encrypted_content")
    return _words(item["summary"])


def _say(messages: list[dict[str, Any]], field: str, words: str) -> None:
    """Joins the assistant's message that is being put together, unless it has gone beyond this field."""
    last = messages[-1] if messages else {}
    beyond = (
        {"reasoning_content", "content", "tool_calls"} if field == "reasoning_content" else {"content", "tool_calls"}
    )
    if last.get("role") == "assistant" and not any(last.get(name) for name in beyond):
        last[field] = words
    else:
        messages.append({"role": "assistant", "content": "", field: words})


def _call(messages: list[dict[str, Any]], item: Item) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": item["name"], "arguments": item["arguments"]}
    messages[-1].setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})


def _words(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in content)

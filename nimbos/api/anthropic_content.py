"""Anthropic's messages as the chat layer takes them; tools are in `anthropic_tools.py`.

A message there is a list of blocks; here its texts are one string, its calls and its thinking fields of their own, and
each result of a tool a message. What no text model can read is refused by name, never passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from nimbos.api.lenient import Ignored
from nimbos.api.messages import MESSAGES_MAX
from nimbos.errors import InvalidRequest, UnsupportedField

Block = Mapping[str, Any]

# Every kind of block that is read, with its fields; those that only steer the provider's own machinery are hints.
BLOCK_FIELDS: Mapping[str, frozenset[str]] = {
    "text": frozenset({"text", "citations"}),
    "document": frozenset({"source", "title", "context", "citations"}),
    "search_result": frozenset({"content", "source", "title", "citations"}),
    "tool_reference": frozenset({"tool_name"}),
    "thinking": frozenset({"thinking", "signature"}),
    "redacted_thinking": frozenset({"data"}),
    "tool_use": frozenset({"id", "name", "input", "caller", "toolset_name"}),
    "tool_result": frozenset({"tool_use_id", "content", "is_error", "toolset_name"}),
}
_ANY_BLOCK = frozenset({"type", "cache_control"})
_TEXTS = frozenset({"text", "document", "search_result", "tool_reference"})
_OF_USER = _TEXTS | {"tool_result"}
_OF_ASSISTANT = frozenset({"text", "thinking", "redacted_thinking", "tool_use"})
_WHY_NOT = {
    "image": "this server's models read text only",
    "container_upload": "there is no container here",
}
_FAILED = "Error: "


def read_system(system: Any, ignored: Ignored, *, at: str = "system") -> str:
    """Raises: InvalidRequest, UnsupportedField."""
    return joined(_texts(system, at, ignored, allowed=frozenset({"text"})))


def read_messages(messages: Sequence[Any], ignored: Ignored) -> list[dict[str, Any]]:
    """In OpenAI's form; neighbours of one role become one message, as templates take turns.

    Raises: InvalidRequest, UnsupportedField, both with the path of the block.
    """
    if not messages:
        raise InvalidRequest("`messages` is empty; send at least one.", param="messages")
    if len(messages) > MESSAGES_MAX:
        raise InvalidRequest(f"There may be {MESSAGES_MAX} messages; here are {len(messages)}.", param="messages")
    read: list[dict[str, Any]] = []
    called: set[str] = set()
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"`{where}` must be an object.", param=where)
        for name in message.keys() - {"role", "content"}:
            ignored.add(f"messages[].{name}")
        read += _read_message(message, where, called, ignored)
    return [merged for role, turn in groupby(read, lambda one: one["role"]) for merged in _merged(role, list(turn))]


def blocks_of(content: Any) -> list[Block]:
    """The blocks of a message, a system prompt or a result, as far as there are any."""
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


def _read_message(message: dict[str, Any], where: str, called: set[str], ignored: Ignored) -> Iterator[dict[str, Any]]:
    role, content, at = message.get("role"), message.get("content"), f"{where}.content"
    if role == "system":
        yield {"role": "system", "content": read_system(content, ignored, at=at)}
    elif role == "user":
        yield from _read_user(content, at, called, ignored)
    elif role == "assistant":
        yield _read_assistant(content, at, called, ignored)
    else:
        raise InvalidRequest(f"`{where}.role` must be user, assistant or system.", param=f"{where}.role")


def _read_user(content: Any, at: str, called: set[str], ignored: Ignored) -> Iterator[dict[str, Any]]:
    texts: list[str] = []
    empty = True
    for where, block in _walk(content, at, ignored, allowed=_OF_USER):
        if block["type"] != "tool_result":
            texts += _text(block, where, ignored)
            continue
        if texts:
            yield {"role": "user", "content": joined(texts)}
            texts = []
        empty = False
        yield _read_result(block, where, called, ignored)
    if texts:
        yield {"role": "user", "content": joined(texts)}
    elif empty:
        raise InvalidRequest(f"`{at}` has no text and no result of a tool.", param=at)


def _read_result(block: Block, where: str, called: set[str], ignored: Ignored) -> dict[str, Any]:
    """A result that says it is an error is marked as one, since templates have no field for it."""
    call = string_of(block, "tool_use_id", where)
    if call not in called:
        raise InvalidRequest(
            f"`{where}.tool_use_id` is {call[:80]!r}, and no `tool_use` block before it has this id.",
            param=f"{where}.tool_use_id",
        )
    text = joined(_texts(block.get("content", ""), f"{where}.content", ignored, allowed=_TEXTS))
    failed = block.get("is_error") is True and not text.startswith(_FAILED)
    return {"role": "tool", "tool_call_id": call, "content": f"{_FAILED}{text}" if failed else text}


def _read_assistant(content: Any, at: str, called: set[str], ignored: Ignored) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for where, block in _walk(content, at, ignored, allowed=_OF_ASSISTANT):
        match block["type"]:
            case "text":
                texts += _text(block, where, ignored)
            case "thinking":
                thoughts.append(string_of(block, "thinking", where))
            case "tool_use":
                calls.append(_read_call(block, where))
                called.add(calls[-1]["id"])
    message: dict[str, Any] = {"role": "assistant", "content": joined(texts)}
    if any(thoughts):
        message["reasoning_content"] = joined(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _read_call(block: Block, where: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict):
        raise InvalidRequest(f"`{where}.input` must be an object.", param=f"{where}.input")
    function = {"name": string_of(block, "name", where), "arguments": given}
    return {"id": string_of(block, "id", where), "type": "function", "function": function}


def _merged(role: str, turn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(turn) == 1 or role not in ("user", "assistant"):
        return turn
    merged: dict[str, Any] = {"role": role, "content": "\n\n".join(one["content"] for one in turn if one["content"])}
    thoughts = [one["reasoning_content"] for one in turn if "reasoning_content" in one]
    if thoughts:
        merged["reasoning_content"] = "\n\n".join(thoughts)
    calls = [call for one in turn for call in one.get("tool_calls", ())]
    if calls:
        merged["tool_calls"] = calls
    return [merged]


def _walk(content: Any, at: str, ignored: Ignored, *, allowed: frozenset[str]) -> Iterator[tuple[str, Block]]:
    """Each block with its path; a string is one block of text.

    Raises: InvalidRequest for what is no block; UnsupportedField for a kind that is not `allowed` here.
    """
    if isinstance(content, str):
        yield at, {"type": "text", "text": content}
        return
    if not isinstance(content, list):
        raise InvalidRequest(f"`{at}` must be a string or a list of blocks.", param=at)
    for number, block in enumerate(content):
        where = f"{at}[{number}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise InvalidRequest(f"`{where}` must be an object with a `type`.", param=where)
        if kind not in allowed:
            why = _WHY_NOT.get(kind, "it is known in another place only" if kind in BLOCK_FIELDS else "not known here")
            raise UnsupportedField(f"{where}.type", why=f"{kind[:60]!r}, which is not supported here: {why}")
        for name in block.keys() - BLOCK_FIELDS[kind] - _ANY_BLOCK:
            ignored.add(f"content[].{name}")
        yield where, block


def _texts(content: Any, at: str, ignored: Ignored, *, allowed: frozenset[str]) -> list[str]:
    if content is None:
        return []
    return [
        text for where, block in _walk(content, at, ignored, allowed=allowed) for text in _text(block, where, ignored)
    ]


def _text(block: Block, where: str, ignored: Ignored) -> list[str]:
    """What a block of words says, in no or one string."""
    match block["type"]:
        case "document":
            text = _document(block, where, ignored)
        case "search_result":
            text = _search_result(block, where, ignored)
        case "tool_reference":
            text = f"The tool {string_of(block, 'tool_name', where)} can be called."
        case _:
            text = string_of(block, "text", where)
    return [text] if text else []


def _document(block: Block, where: str, ignored: Ignored) -> str:
    _refuse_citations(block, where)
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or not isinstance(kind, str):
        raise InvalidRequest(f"`{where}.source` must be an object with a `type`.", param=f"{where}.source")
    if kind == "text":
        words = string_of(source, "data", f"{where}.source")
    elif kind == "content":
        words = joined(_texts(source.get("content"), f"{where}.source.content", ignored, allowed=frozenset({"text"})))
    else:
        raise UnsupportedField(
            f"{where}.source.type", why=f"{kind[:60]!r}, which is not supported here: only documents of text are read"
        )
    heads = [text_of(block, name, where) for name in ("title", "context")]
    return f"<document>\n{joined([*filter(None, heads), words])}\n</document>"


def _search_result(block: Block, where: str, ignored: Ignored) -> str:
    _refuse_citations(block, where)
    words = _texts(block.get("content"), f"{where}.content", ignored, allowed=frozenset({"text"}))
    heads = [text_of(block, name, where) for name in ("title", "source")]
    return f"<search_result>\n{joined([*filter(None, heads), *words])}\n</search_result>"


def _refuse_citations(block: Block, where: str) -> None:
    citations = block.get("citations")
    if isinstance(citations, dict) and citations.get("enabled"):
        raise UnsupportedField(f"{where}.citations", why="not supported here: answers do not cite")


def string_of(table: Block, name: str, where: str) -> str:
    value = table.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"`{where}.{name}` must be a string.", param=f"{where}.{name}")
    return value


def text_of(table: Block, name: str, where: str) -> str:
    return "" if table.get(name) is None else string_of(table, name, where)


def joined(texts: Sequence[str]) -> str:
    return "\n".join(texts)

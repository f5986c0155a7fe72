"""Items, of which a Responses conversation is made, as clients send them and as they are kept.

An item that has passed `read_items` is plain JSON in one canonical form, the same that a client gets back: it has an
`id` and a `type`, contents are lists of parts, and nothing in it is null. What is kept of an item is its bytes without
the id (`canonical`), so the same words are kept once. Knows nothing of storage or of answers. Read
`responses_messages.py` next.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from nimbos.errors import InvalidRequest, UnsupportedField
from nimbos.types import new_id

ITEMS_MAX = 10_000

Item = dict[str, Any]

HOSTED = "this server runs no hosted tools"
_FOREIGN = {
    "file_search_call": HOSTED,
    "web_search_call": HOSTED,
    "computer_call": HOSTED,
    "computer_call_output": HOSTED,
    "image_generation_call": HOSTED,
    "code_interpreter_call": HOSTED,
    "local_shell_call": HOSTED,
    "local_shell_call_output": HOSTED,
    "shell_call": HOSTED,
    "shell_call_output": HOSTED,
    "apply_patch_call": HOSTED,
    "apply_patch_call_output": HOSTED,
    "mcp_list_tools": HOSTED,
    "mcp_approval_request": HOSTED,
    "mcp_approval_response": HOSTED,
    "mcp_call": HOSTED,
    "tool_search_call": HOSTED,
    "tool_search_output": HOSTED,
    "program": HOSTED,
    "program_output": HOSTED,
    "custom_tool_call": "only tools of the type 'function' are called here",
    "custom_tool_call_output": "only tools of the type 'function' are called here",
    "additional_tools": "send `tools` with the request",
    "configuration_update": "send the fields with the request",
    "compaction_trigger": "use POST /v1/responses/compact",
}
_FIELDS = {
    "message": {"role", "content", "status", "phase"},
    "reasoning": {"summary", "content", "encrypted_content", "status"},
    "function_call": {"call_id", "name", "arguments", "status", "caller", "created_by"},
    "function_call_output": {"call_id", "output", "status", "caller", "created_by", "name"},
    "compaction": {"encrypted_content", "created_by"},
    "item_reference": frozenset(),
}
_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "compaction": "cmp",
}
_ROLES = ("user", "assistant", "system", "developer")
_STATUSES = ("in_progress", "completed", "incomplete")
_PART_FIELDS = {
    "input_text": {"text", "prompt_cache_breakpoint"},
    "output_text": {"text", "annotations", "logprobs"},
    "refusal": {"refusal"},
}
_UNREAD_PARTS = ("input_image", "input_file", "input_audio", "computer_screenshot")

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_NAME_CHARACTERS = 256
_SHOWN_CHARACTERS = 60
_SEALED = "nimbos1."  # begins what `seal` wrote

_encoder = msgspec.json.Encoder(order="deterministic")


def read_items(given: str | list[Any], *, param: str = "input") -> list[Item]:
    """References stay references; whoever has the store resolves them.

    Raises: InvalidRequest, UnsupportedField with the path.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if len(given) > ITEMS_MAX:
        raise InvalidRequest(f"There may be {ITEMS_MAX} items; here are {len(given)}.", param=param)
    return [_read_item(item, f"{param}[{number}]") for number, item in enumerate(given)]


def canonical(item: Item) -> bytes:
    """The item's bytes without its id: what is kept, and hashed."""
    return _encoder.encode({name: value for name, value in item.items() if name != "id"})


def restored(item_id: str, content: bytes) -> Item:
    item: Item = {"id": item_id, **msgspec.json.decode(content)}
    return item


def check_context(items: Sequence[Item]) -> None:
    """What only the whole context can tell: ids that come twice, results of calls that are not there, too many.

    Raises: InvalidRequest.
    """
    if len(items) > ITEMS_MAX:
        raise InvalidRequest(f"A context may have {ITEMS_MAX} items; this one has {len(items)}.", param="input")
    ids: set[str] = set()
    calls: set[str] = set()
    for item in items:
        if item["id"] in ids:
            raise InvalidRequest(
                f"The item {item['id']!r} is there twice. Leave out of `input` what the earlier response or the "
                "conversation holds already.",
                param="input",
            )
        ids.add(item["id"])
        if item["type"] == "function_call":
            calls.add(item["call_id"])
        elif item["type"] == "function_call_output" and item["call_id"] not in calls:
            raise InvalidRequest(f"There is no function call {item['call_id']!r} before its output.", param="input")


def seal(text: str) -> str:
    """Text for a field that clients carry without looking in. No secret: whoever gets it may read it."""
    return _SEALED + base64.urlsafe_b64encode(text.encode("utf-8", "surrogatepass")).decode()


def unseal(sealed: str, param: str) -> str:
    """Raises: InvalidRequest for what another server sealed."""
    if sealed.startswith(_SEALED):
        try:
            return base64.b64decode(sealed.removeprefix(_SEALED), altchars=b"-_", validate=True).decode()
        except (binascii.Error, UnicodeDecodeError, ValueError) as error:
            raise InvalidRequest(f"`{param}` was changed on its way.", param=param) from error
    raise InvalidRequest(f"`{param}` was not written by this server, so it cannot be read here.", param=param)


def item_id(response_id: str, index: int, kind: str) -> str:
    """Of the item number `index` of an answer: the same whenever that answer is computed again."""
    return f"{_PREFIXES[kind]}_{response_id.removeprefix('resp_')}{index:04x}"


def _read_item(given: Any, path: str) -> Item:
    if not isinstance(given, dict):
        raise InvalidRequest(f"`{path}` is not an object.", param=path)
    item = {name: value for name, value in given.items() if value is not None}
    kind = item.pop("type", "item_reference" if set(item) == {"id"} else "message")
    if isinstance(kind, str) and kind in _FOREIGN:
        raise UnsupportedField(f"{path}.type", why=f"{kind!r}: {_FOREIGN[kind]}")
    if not isinstance(kind, str) or kind not in _FIELDS:
        known = ", ".join(_FIELDS)
        raise InvalidRequest(f"`{path}.type` is {kind!r:.{_SHOWN_CHARACTERS}}; it must be one of {known}.", param=path)
    for name, value in item.items():
        if name not in _FIELDS[kind] and name != "id" and not _says_nothing(name, value):
            raise UnsupportedField(f"{path}.{name[:_SHOWN_CHARACTERS]}", why=f"not known in an item {kind!r}")
    if item.get("caller") not in (None, {"type": "direct"}):
        raise UnsupportedField(f"{path}.caller", why=f"not supported: {HOSTED}")
    read = _READERS[kind](item, path)
    return {"id": _read_id(item, kind, path), "type": kind, **read}


def _says_nothing(name: str, value: Any) -> bool:
    """Fields that clients echo: of calls that wait for nobody."""
    return name == "async" and value is False


def _read_id(item: Item, kind: str, path: str) -> str:
    if "id" not in item and kind != "item_reference":
        return new_id(_PREFIXES[kind])
    given = item.get("id")
    if not isinstance(given, str) or not _ID.fullmatch(given):
        raise InvalidRequest(f"`{path}.id` must have 1 to 128 letters, digits or any of _ . : -", param=f"{path}.id")
    return given


def _read_message(item: Item, path: str) -> Item:
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidRequest(
            f"`{path}.role` is {role!r:.{_SHOWN_CHARACTERS}}; it must be one of {', '.join(_ROLES)}.",
            param=f"{path}.role",
        )
    assistant = role == "assistant"
    content = _read_parts(item.get("content"), f"{path}.content", plain="output_text" if assistant else "input_text")
    return {"role": role, "content": content, "status": _status(item, path)}


def _read_reasoning(item: Item, path: str) -> Item:
    read: Item = {"summary": _read_texts(item.get("summary", []), "summary_text", f"{path}.summary")}
    if "content" in item:
        read["content"] = _read_texts(item["content"], "reasoning_text", f"{path}.content")
    if "encrypted_content" in item:
        sealed = _text(item, "encrypted_content", path)
        unseal(sealed, f"{path}.encrypted_content")
        read["encrypted_content"] = sealed
    return {**read, "status": _status(item, path)}


def _read_call(item: Item, path: str) -> Item:
    return {
        "call_id": _short(item, "call_id", path),
        "name": _short(item, "name", path),
        "arguments": _text(item, "arguments", path),
        "status": _status(item, path),
    }


def _read_output(item: Item, path: str) -> Item:
    output = item.get("output")
    if not isinstance(output, str):
        output = _read_parts(output, f"{path}.output", plain="input_text")
    return {"call_id": _short(item, "call_id", path), "output": output, "status": _status(item, path)}


def _read_compaction(item: Item, path: str) -> Item:
    sealed = _text(item, "encrypted_content", path)
    unseal(sealed, f"{path}.encrypted_content")
    return {"encrypted_content": sealed}


def _read_reference(_: Item, __: str) -> Item:
    return {}


_READERS = {
    "message": _read_message,
    "reasoning": _read_reasoning,
    "function_call": _read_call,
    "function_call_output": _read_output,
    "compaction": _read_compaction,
    "item_reference": _read_reference,
}


def _read_parts(content: Any, path: str, *, plain: str) -> list[dict[str, Any]]:
    """`plain`: the type of part that a bare string is."""
    if isinstance(content, str):
        content = [{"type": plain, "text": content}]
    if not isinstance(content, list):
        raise InvalidRequest(f"`{path}` must be a string or a list of parts.", param=path)
    return [_read_part(part, f"{path}[{number}]", plain) for number, part in enumerate(content)]


def _read_part(part: Any, path: str, plain: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _UNREAD_PARTS:
        raise UnsupportedField(f"{path}.type", why=f"{kind!r}: models here read text only")
    if kind not in (plain, "refusal") or (kind == "refusal" and plain != "output_text"):
        raise InvalidRequest(
            f"`{path}.type` is {kind!r:.{_SHOWN_CHARACTERS}}; it must be {plain!r} here.", param=f"{path}.type"
        )
    for name, value in part.items():
        if name != "type" and name not in _PART_FIELDS[kind] and value is not None:
            raise UnsupportedField(f"{path}.{name[:_SHOWN_CHARACTERS]}", why=f"not known in a part {kind!r}")
    if kind == "refusal":
        return {"type": kind, "refusal": _text(part, "refusal", path)}
    read = {"type": kind, "text": _text(part, "text", path)}
    return {**read, "annotations": []} if kind == "output_text" else read


def _read_texts(given: Any, kind: str, path: str) -> list[dict[str, Any]]:
    if not isinstance(given, list):
        raise InvalidRequest(f"`{path}` must be a list.", param=path)
    for number, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != kind or not set(part) <= {"type", "text"}:
            raise InvalidRequest(f"`{path}[{number}]` must be an object with the type {kind!r}.", param=path)
    return [{"type": kind, "text": _text(part, "text", f"{path}[{i}]")} for i, part in enumerate(given)]


def _text(item: Item, name: str, path: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"`{path}.{name}` must be a string.", param=f"{path}.{name}")
    return value


def _short(item: Item, name: str, path: str) -> str:
    value = _text(item, name, path)
    if not 1 <= len(value) <= _NAME_CHARACTERS:
        raise InvalidRequest(f"`{path}.{name}` must have 1 to {_NAME_CHARACTERS} characters.", param=f"{path}.{name}")
    return value


def _status(item: Item, path: str) -> str:
    status = item.get("status", "completed")
    if status not in _STATUSES:
        raise InvalidRequest(f"`{path}.status` must be one of {', '.join(_STATUSES)}.", param=f"{path}.status")
    return str(status)

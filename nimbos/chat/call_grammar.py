"""Grammars of answers: tool calls, JSON, or either, in llguidance's dialect of Lark.
Knows nothing of messages; `splitter.py` reads what these grammars let through.

A grammar starts where thinking and the line breaks after it have ended. Free text runs until an opening tag and not
further: the `[lazy]` lexeme ends as soon as the tag is complete, and what follows can only be a call. JSON is written
with ", " and ": " and no other white space, as chat templates teach it.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nimbos.chat.family import CallForm
from nimbos.chat.schema import ANY_OBJECT
from nimbos.chat.tools import Tool, ToolUse
from nimbos.types import Grammar

MAX_SCHEMAS_BYTES = 96 * 1024  # above it tools that are not strict take any object; the engine refuses 128 KiB
OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"

_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_KEYS: Mapping[CallForm, str] = {CallForm.HERMES: "arguments", CallForm.LLAMA: "parameters"}


def write_call_grammar(use: ToolUse, *, schema: Mapping[str, Any] | None = None) -> Grammar:
    """`schema`: what the answer must be where it is not a call; None is any text."""
    rules = _hermes_rules(use, schema) if use.form is CallForm.HERMES else _llama_rules(use, schema)
    value = [f"value: {_json(schema, lenient=False)}"] if schema is not None and not use.must else []
    return Grammar(kind="lark", source="\n".join(["%llguidance {}", *rules, *value, *_call_rules(use), ""]))


def _hermes_rules(use: ToolUse, schema: Mapping[str, Any] | None) -> list[str]:
    opening = OPEN_TAG if use.hidden_tag else json.dumps(OPEN_TAG)
    closing = CLOSE_TAG if use.hidden_tag else json.dumps(CLOSE_TAG)
    calls = "body more*" if use.parallel else "body"
    rules = [rf'body: "\n" call "\n" {closing}', rf'more: "\n" {opening} body']
    if use.must:
        return [f"start: {opening} {calls}", *rules]
    if schema is not None:
        return [f"start: value | {opening} {calls}", *rules]
    if use.hidden_tag:
        free = [f"start: TEXT | TEXT {opening} {calls}"]
    else:
        free = [f"start: TEXT | head {calls}", f"head[lazy]: TEXT {opening}"]
    if use.bare:  # Qwen2.5-Coder leaves the tags out
        free[0] += " | bare_head bare_tail"
        free += [r'bare_head[lazy]: /[ \n]{0,4}\{"name"/', r'bare_tail: ": \"" tool "}"']
    return [*free, r"TEXT: /(.|\n)*/", *rules]


def _llama_rules(use: ToolUse, schema: Mapping[str, Any] | None) -> list[str]:
    opening = f"{PYTHON_TAG}? " if use.hidden_tag else ""
    if use.must:
        return [f"start: {opening}call"]
    if schema is not None:  # calls as JSON too: only among JSON grammars does llguidance keep several ways open
        calls = [
            f"json_call_{i}: {_json(_call_schema(tool.name, arguments), lenient=not tool.strict)}"
            for i, (tool, arguments) in enumerate(zip(use.tools, _fitting_schemas(use.tools), strict=True))
        ]
        names = " | ".join(f"json_call_{i}" for i in range(len(use.tools)))
        return [f"start: value | {names}" + (f" | {PYTHON_TAG} call" if use.hidden_tag else ""), *calls]
    return [f"start: TEXT | {opening}call", r"TEXT: /([^{](.|\n)*)?/"]


def _call_rules(use: ToolUse) -> list[str]:
    schemas = _fitting_schemas(use.tools)
    names = " | ".join(f"tool_{i}" for i in range(len(use.tools)))
    rules = [r'call: "{\"name\": \"" tool "}"', f"tool: {names}"]
    for i, (tool, schema) in enumerate(zip(use.tools, schemas, strict=True)):
        head = json.dumps(f'{tool.name}", "{_KEYS[use.form]}": ')
        rules += [f"tool_{i}: {head} arguments_{i}", f"arguments_{i}: {_json(schema, lenient=not tool.strict)}"]
    return rules


def _call_schema(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A whole call in the Llama form."""
    key = _KEYS[CallForm.LLAMA]
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: _rebase(dict(arguments), f"#/properties/{key}")},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _rebase(schema: Any, root: str) -> Any:
    """References from the schema's own root, now that it is a part of another."""
    if isinstance(schema, list):
        return [_rebase(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _rebase(value, root) for key, value in schema.items()}
    reference = moved.get("$ref")
    return {**moved, "$ref": root + reference[1:]} if isinstance(reference, str) else moved


def _fitting_schemas(tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    size = sum(len(json.dumps(tool.schema)) for tool in tools)
    if size <= MAX_SCHEMAS_BYTES:
        return [tool.schema for tool in tools]
    return [tool.schema if tool.strict else ANY_OBJECT for tool in tools]


def _json(schema: Mapping[str, Any], *, lenient: bool) -> str:
    options = {**_SPACING, "lenient": lenient, "coerce_one_of": True}
    return "%json " + json.dumps({**schema, "x-guidance": options})

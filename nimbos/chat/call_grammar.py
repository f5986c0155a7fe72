"""Grammars of answers: tool calls, JSON, or either, in llguidance's dialect of Lark.
Knows nothing of messages; `splitter.py` reads what these grammars let through.

Free text runs until an opening tag and not further: the `[lazy]` lexeme ends as soon as the tag is complete, and what
follows can only be a call. JSON is written with ", " and ": " and no other white space, as chat templates teach it.

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


def write_call_grammar(
    use: ToolUse, *, schema: Mapping[str, Any] | None = None, after_thinking: bool = False
) -> Grammar:
    """`schema`: what the answer's text must be where it is not a call; None is any text.

    `after_thinking`: the answer may start with the line breaks that follow a closed block of thinking.
    """
    write = _hermes_rules if use.form is CallForm.HERMES else _llama_rules
    rules = write(use, has_schema=schema is not None, blank="BLANK? " if after_thinking else "")
    if schema is not None:
        rules.append(f"value: {_json(schema, lenient=False)}")
    return Grammar(
        kind="lark", source="\n".join(["%llguidance {}", *rules, *_call_rules(use), r"BLANK: /\n{1,2}/", ""])
    )


def write_json_grammar(schema: Mapping[str, Any], *, after_thinking: bool) -> Grammar:
    """An answer that is this JSON and nothing else."""
    if not after_thinking:
        return Grammar(kind="json_schema", source=json.dumps(schema, ensure_ascii=False))
    rules = ["%llguidance {}", "start: BLANK? value", f"value: {_json(schema, lenient=False)}", r"BLANK: /\n{1,2}/", ""]
    return Grammar(kind="lark", source="\n".join(rules))


def _hermes_rules(use: ToolUse, *, has_schema: bool, blank: str) -> list[str]:
    opening = OPEN_TAG if use.hidden_tag else json.dumps(OPEN_TAG)
    closing = CLOSE_TAG if use.hidden_tag else json.dumps(CLOSE_TAG)
    more = " more*" if use.parallel else ""
    rules = [
        rf'body: "\n" call "\n" {closing}'.replace("\n", "\\n"),
        rf'more: "\n" {opening} body'.replace("\n", "\\n"),
    ]
    if use.must:
        return [f"start: {blank}{opening} body{more}", *rules]
    if has_schema:
        return [f"start: {blank}value | {blank}{opening} body{more}", *rules]
    bare = " | bare_head bare_tail" if use.bare else ""
    if use.hidden_tag:
        free = [f"start: TEXT | TEXT {opening} body{more}{bare}"]
    else:
        free = [f"start: TEXT | head body{more}{bare}", f"head[lazy]: TEXT {opening}"]
    if use.bare:  # Qwen2.5-Coder leaves the tags out
        free += [r'bare_head[lazy]: /[ \n]{0,4}\{"name"/', r'bare_tail: ": \"" tool "}"']
    return [*free, r"TEXT: /(.|\n)*/", *rules]


def _llama_rules(use: ToolUse, *, has_schema: bool, blank: str) -> list[str]:
    opening = f"{PYTHON_TAG}? " if use.hidden_tag else ""
    if use.must:
        return [f"start: {blank}{opening}call"]
    if has_schema:
        return [f"start: {blank}value | {blank}{opening}call"]
    return [f"start: TEXT | {blank}{opening}call", r"TEXT: /([^{\n](.|\n)*|\n+[^{\n](.|\n)*)?/"]


def _call_rules(use: ToolUse) -> list[str]:
    schemas = _fitting_schemas(use.tools)
    names = " | ".join(f"tool_{i}" for i in range(len(use.tools)))
    rules = [r'call: "{\"name\": \"" tool "}"', f"tool: {names}"]
    for i, (tool, schema) in enumerate(zip(use.tools, schemas, strict=True)):
        head = json.dumps(f'{tool.name}", "{_KEYS[use.form]}": ')
        rules += [f"tool_{i}: {head} arguments_{i}", f"arguments_{i}: {_json(schema, lenient=not tool.strict)}"]
    return rules


def _fitting_schemas(tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    size = sum(len(json.dumps(tool.schema)) for tool in tools)
    if size <= MAX_SCHEMAS_BYTES:
        return [tool.schema for tool in tools]
    return [tool.schema if tool.strict else ANY_OBJECT for tool in tools]


def _json(schema: Mapping[str, Any], *, lenient: bool) -> str:
    options = {**_SPACING, "lenient": lenient, "coerce_one_of": True}
    return "%json " + json.dumps({**schema, "x-guidance": options})

"""A function's signature as a JSON Schema, and arguments checked against it. Used by `tools.py`.

Parameters must be annotated with what JSON can say: plain types, `list`, `dict`, `Literal`, enums, dataclasses, typed
dictionaries, dates, `X | None`. `Annotated[int, Field(ge=1, description="…")]` narrows one; a docstring's `Args:`
section describes them, too.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import msgspec

Field = msgspec.Meta
_PLAIN = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Raises|Yields|Example|Examples):\s*$")
_PARAMETER = re.compile(r"^(\s*)(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")


class BadTool(TypeError):
    """A function that cannot be a tool; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """`schema`: of the arguments, closed: other names are refused. `shape`: what arguments are decoded as."""

    description: str
    schema: dict[str, Any]
    shape: type[msgspec.Struct]

    def arguments(self, given: bytes) -> dict[str, Any]:
        """From a JSON object, as the function's types. Raises: msgspec.ValidationError, saying where."""
        read = msgspec.json.decode(given, type=self.shape)
        return {name: getattr(read, name) for name in self.shape.__struct_fields__}


def read_signature(function: Callable[..., Any], *, without: frozenset[str] = frozenset()) -> Signature:
    """`without`: parameters that the kernel fills. Raises: BadTool."""
    name = getattr(function, "__name__", "tool")
    description, texts = read_docstring(inspect.getdoc(function) or "")
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise BadTool(f"The tool {name} has an annotation that cannot be resolved: {error}") from error
    parameters = inspect.signature(function).parameters.values()
    fields = [_field(name, parameter, hints) for parameter in parameters if parameter.name not in without]
    try:
        shape = msgspec.defstruct(f"{name}_arguments", fields, kw_only=True, forbid_unknown_fields=True)
        schema = _schema_of(shape)
    except (TypeError, ValueError) as error:
        raise BadTool(f"The tool {name} has a parameter that JSON cannot say: {error}") from error
    for parameter_name, text in texts.items():
        if isinstance(about := schema["properties"].get(parameter_name), dict):
            about.setdefault("description", text)
    return Signature(description=description, schema=schema, shape=shape)


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the first section, and the parameters' descriptions."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if _SECTION.match(line)), len(lines))
    described: dict[str, str] = {}
    inside, at, depth = False, "", 0
    for line in lines[first:]:
        if section := _SECTION.match(line):
            inside = section[1] in ("Args", "Arguments", "Parameters")
            at = ""
        elif inside and (found := _PARAMETER.match(line)) and (not at or len(found[1]) <= depth):
            at, depth = found[2], len(found[1])
            described[at] = found[3].strip()
        elif inside and at and line.strip():
            described[at] = f"{described[at]} {line.strip()}".strip()
    return "\n".join(lines[:first]).strip(), described


def _field(tool: str, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> tuple[str, Any] | tuple[str, Any, Any]:
    name = parameter.name
    if parameter.kind not in _PLAIN:
        raise BadTool(f"The tool {tool} takes {parameter}; each argument needs a name and a type of its own.")
    if name not in hints:
        raise BadTool(f"The parameter {name!r} of the tool {tool} has no type. Annotate it: `{name}: str`.")
    if parameter.default is inspect.Parameter.empty:
        return (name, hints[name])
    default = parameter.default
    if isinstance(default, list | dict | set | bytearray):
        return (name, hints[name], msgspec.field(default_factory=lambda: copy.deepcopy(default)))
    return (name, hints[name], default)


def _schema_of(shape: type[msgspec.Struct]) -> dict[str, Any]:
    """The object itself, not a reference to it; what it refers to stands under `$defs`."""
    (reference,), parts = msgspec.json.schema_components([shape], ref_template="#/$defs/{name}")
    root = parts.pop(reference["$ref"].rpartition("/")[2])
    schema = {
        "type": "object",
        "properties": root.get("properties", {}),
        "required": root.get("required", []),
        "additionalProperties": False,
    }
    return {**schema, "$defs": parts} if parts else schema

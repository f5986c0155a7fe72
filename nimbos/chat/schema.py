"""Argument schemas: a stranger's JSON Schema made fit for a grammar, or refused.
Knows nothing of grammars' syntax; `call_grammar.py` writes them.

The engine enforces what llguidance can. A strict tool that uses more is refused, naming tool, place and keyword. For a
tool that is not strict such keywords are left unenforced, and a schema that could not compile at all (an unknown type,
a reference to elsewhere, a pattern with look-around) becomes "any object". In both, an object that lists `properties`
and does not speak of others takes no others, because free keys are where small models lose themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from nimbos.chat.messages import depth_within
from nimbos.errors import InvalidRequest

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

UNENFORCED = frozenset(
    [
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "propertyNames",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedItems",
        "unevaluatedProperties",
        "$dynamicRef",
        "$recursiveRef",
    ]
)
_TYPES = frozenset(["object", "array", "string", "number", "integer", "boolean", "null"])
_COMBINERS = frozenset(["allOf", "anyOf", "oneOf", "$ref", "patternProperties"])
_LISTS_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "additionalProperties")
_BEYOND_AUTOMATA = re.compile(r"\(\?[=!<]|\\[1-9]")


def read_schema(value: Any, *, where: str, strict: bool) -> dict[str, Any]:
    """A schema of an object, ready for a grammar.

    Raises: InvalidRequest when it is no object, too large or too deep, or (strict) not enforceable.
    """
    if value is None:
        return dict(NO_ARGUMENTS)
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be a JSON Schema object, not {type(value).__name__}.", param=where)
    check_size(value, where=where)
    if value.get("type", "object") != "object":
        raise InvalidRequest(f"{where}.type is {value['type']!r:.60}; arguments are always an object.", param=where)
    problem = next(_problems(value, value, where), None)
    if problem is not None:
        if strict:
            raise InvalidRequest(f"{problem}. Change the schema, or leave out strict.", param=where)
        return dict(ANY_OBJECT)
    unenforced = next(_unenforced(value, where), None) if strict else None
    if unenforced is not None:
        place, keyword = unenforced
        raise InvalidRequest(
            f"{place} uses {keyword!r}, which cannot be enforced. Leave it or strict out.", param=where
        )
    closed = _close({"type": "object", **value})
    closed.pop("x-guidance", None)
    return closed


def check_size(value: Any, *, where: str) -> None:
    if not depth_within(value, MAX_SCHEMA_DEPTH):
        raise InvalidRequest(f"{where} nests more than {MAX_SCHEMA_DEPTH} deep.", param=where)
    size = len(msgspec.json.encode(value))
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"{where} has {size} bytes and may have {MAX_SCHEMA_BYTES}.", param=where)


def _children(schema: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key in _SCHEMAS:
        if key in schema:
            yield f"{where}.{key}", schema[key]
    for key in _LISTS_OF_SCHEMAS:
        if isinstance(schema.get(key), list):
            yield from ((f"{where}.{key}[{i}]", child) for i, child in enumerate(schema[key]))
    for key in _MAPS_OF_SCHEMAS:
        if isinstance(schema.get(key), dict):
            yield from ((f"{where}.{key}.{name}", child) for name, child in schema[key].items())


def _problems(schema: Any, root: Mapping[str, Any], where: str) -> Iterator[str]:
    """What would keep a grammar from compiling at all."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        yield f"{where} is no schema"
        return
    types = schema.get("type", [])
    for name in types if isinstance(types, list) else [types]:
        if not isinstance(name, str) or name not in _TYPES:
            yield f"{where}.type is {name!r:.60}, which is no type"
    for key, kind in (("required", list), ("enum", list), ("properties", dict), ("$defs", dict)):
        if key in schema and not isinstance(schema[key], kind):
            yield f"{where}.{key} is not {'a list' if kind is list else 'an object'}"
    if "$ref" in schema and not _resolves(schema["$ref"], root):
        yield f"{where}.$ref points to {schema['$ref']!r:.100}, which is not in this schema"
    if "pattern" in schema and not _is_regular(schema["pattern"]):
        yield f"{where}.pattern is no regular expression, or looks around or back"
    for place, child in _children(schema, where):
        yield from _problems(child, root, place)


def _unenforced(schema: Any, where: str) -> Iterator[tuple[str, str]]:
    if not isinstance(schema, dict):
        return
    for keyword in sorted(UNENFORCED.intersection(schema)):
        yield where, keyword
    for place, child in _children(schema, where):
        yield from _unenforced(child, place)


def _resolves(reference: Any, root: Mapping[str, Any]) -> bool:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return False
    at: Any = root
    for step in reference[1:].strip("/").split("/") if len(reference) > 1 else []:
        key = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(at, dict) or key not in at:
            return False
        at = at[key]
    return isinstance(at, dict | bool)


def _is_regular(pattern: Any) -> bool:
    if not isinstance(pattern, str) or _BEYOND_AUTOMATA.search(pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _close(schema: dict[str, Any]) -> dict[str, Any]:
    """Forbids other keys where only `properties` are spoken of. Not inside combinations: they add up to one object."""
    closed = dict(schema)
    properties, items = closed.get("properties"), closed.get("items")
    if isinstance(properties, dict):
        closed["properties"] = {k: _close(v) if isinstance(v, dict) else v for k, v in properties.items()}
        if "additionalProperties" not in closed and not _COMBINERS.intersection(closed):
            closed["additionalProperties"] = False
    if isinstance(items, dict):
        closed["items"] = _close(items)
    return closed

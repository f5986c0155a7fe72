"""Arguments of a call: a model's JSON text, and whether it fits the schema of what is called. Hostile on both sides:
the text comes from a model, the schema from a program. What is wrong is said in words that a model can act on.

Schemas are checked by jsonschema-rs: linear-time patterns, no reference that leaves the schema, a loop of references
ends. A schema that is none at all holds nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import jsonschema_rs
import msgspec

from nimbos.errors import InvalidRequest
from nimbos.kernel.segments import canonical

ARGUMENTS_BYTES_MAX = 1 << 20
_SCHEMA_CHARACTERS_MAX = 256 << 10
_PATTERN_BYTES_MAX = 1 << 20  # compiled
_COMPILED_MAX = 512
_PROBLEMS_MAX = 5
_PROBLEM_CHARACTERS = 300
_SHOWN_CHARACTERS = 80


class WrongArguments(Exception):
    """Never leaves the gate, which makes it a `call.denied`. Says what is wrong, for a model."""


def read_arguments(text: str) -> Any:
    """What the model wrote, as a value. Nothing written is no arguments.

    Raises: WrongArguments.
    """
    if len(text) > ARGUMENTS_BYTES_MAX:
        raise WrongArguments(f"The arguments have {len(text)} characters; at most {ARGUMENTS_BYTES_MAX} are taken.")
    if not text.strip():
        return {}
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        shown = text.strip()[:_SHOWN_CHARACTERS]
        raise WrongArguments(f"The arguments are no JSON ({str(error)[:_SHOWN_CHARACTERS]}): {shown}") from error


class Checker:
    """Keeps schemas compiled, by their content: no program can change another's. One for a server."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def check(self, value: Any, schema: Mapping[str, Any], *, tool: str) -> None:
        """Raises: WrongArguments naming the places."""
        try:
            canonical(value)
        except InvalidRequest as error:
            raise WrongArguments(error.message) from error
        problems = [_shortened(problem) for problem in islice(self._problems(value, schema), _PROBLEMS_MAX)]
        if problems:
            raise WrongArguments(f"The arguments do not fit the tool {tool!r}: {'; '.join(problems)}.")

    def _problems(self, value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"they are {type(value).__name__} and must be an object"
            return
        validator = self._validator(canonical(schema).decode())
        if validator is None:
            return
        try:
            for error in validator.iter_errors(value):
                place = ".".join(str(step)[:_SHOWN_CHARACTERS] for step in error.instance_path)
                yield f"{place}: {error.message}" if place else error.message
        except ValueError as error:  # numbers that the validator cannot hold
            yield str(error)

    def _validator(self, schema: str) -> Any:
        """None for a schema that is none."""
        if schema not in self._compiled:
            self._compiled[schema] = _compiled(schema)
            while len(self._compiled) > _COMPILED_MAX:
                self._compiled.popitem(last=False)
        return self._compiled[schema]


def _compiled(schema: str) -> Any:
    if len(schema) > _SCHEMA_CHARACTERS_MAX:
        return None
    patterns = jsonschema_rs.RegexOptions(size_limit=_PATTERN_BYTES_MAX)
    try:
        return jsonschema_rs.validator_for(schema, pattern_options=patterns, offline=True)
    except (ValueError, jsonschema_rs.ReferencingError):
        return None


def _shortened(problem: str) -> str:
    """The middle is the value, which the model knows; what is wrong with it stands at the end."""
    if len(problem) <= _PROBLEM_CHARACTERS:
        return problem
    half = _PROBLEM_CHARACTERS // 2
    return f"{problem[:half]} … {problem[-half:]}"

"""Whether a last answer is what the program promised, and the value it stands for. Pure.

The grammar holds a model to it while it speaks; this looks again, since an answer may be cut off by its limit, and not
every source bends to grammars. The text and the schema are both hostile: matching takes linear time.
"""

from __future__ import annotations

import re
from typing import Any

import jsonschema_rs
import msgspec
from llguidance import LLMatcher, LLTokenizer

from nimbos.types import Grammar

_PROBLEM_CHARACTERS = 300
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)


class Misfit(Exception):
    """Never leaves the agent, which tells the model so."""


def value_of(text: str, answer: Grammar | None) -> Any:
    """The answer as a JSON value: words, or what the schema describes. Raises: Misfit."""
    if answer is None:
        return text
    if answer.kind == "regex":
        return _matched(text, answer.source)
    return _described(text, answer.source)


def _matched(text: str, pattern: str) -> str:
    for candidate in (text, text.strip()):
        matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_regex(pattern), log_level=0)
        raw = candidate.encode("utf-8", "replace")
        if matcher.try_consume_tokens(list(raw)) == len(raw) and matcher.is_accepting():
            return candidate
    raise Misfit(f"The answer does not match the regular expression {pattern[:_PROBLEM_CHARACTERS]}")


def _described(text: str, schema: str) -> Any:
    fenced = _FENCE.match(text.strip())
    try:
        value = msgspec.json.decode(fenced[1] if fenced else text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Misfit(f"The answer is no JSON: {str(error)[:_PROBLEM_CHARACTERS]}") from error
    try:
        validator = jsonschema_rs.validator_for(
            schema, pattern_options=jsonschema_rs.RegexOptions(size_limit=1 << 20), offline=True
        )
        problem = next(iter(validator.iter_errors(value)), None)
    except (ValueError, jsonschema_rs.ReferencingError):
        return value  # a schema that is none holds nothing
    if problem is not None:
        place = ".".join(map(str, problem.instance_path))[:_PROBLEM_CHARACTERS]
        raise Misfit(f"The answer does not fit its schema: {place}: {problem.message[:_PROBLEM_CHARACTERS]}")
    return value

"""Whether a last answer is what the program promised, and the value it stands for. Pure.

The grammar holds a model to it while it speaks; this looks again, since an answer may be cut off by its limit, and not
every source bends to grammars. The text and the schema are both hostile: matching takes linear time.
"""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from nimbos.types import Grammar

_PROBLEM_CHARACTERS = 300
_FENCES = ("```", "```json")


class Misfit(Exception):
    """Never leaves the agent, which tells the model so."""


class NothingFits(Misfit):
    """What the program promises cannot be read: no answer will do."""


def value_of(text: str, answer: Grammar | None) -> Any:
    """The answer as a JSON value: words, or what the schema describes. Raises: Misfit."""
    if answer is None:
        return text
    if answer.kind == "regex":
        return _matched(text, answer.source)
    return _described(text, answer.source)


def _matched(text: str, pattern: str) -> str:
    """Raises: Misfit; NothingFits for a pattern that is none."""
    limits = LLParserLimits(
        step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=50_000, verbose_errors=False
    )
    for candidate in (text, text.strip()):
        grammar = LLMatcher.grammar_from_regex(pattern)
        matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise NothingFits("The regular expression of the answer cannot be used.")
        raw = candidate.encode("utf-8", "replace")
        if matcher.try_consume_tokens(list(raw)) == len(raw) and matcher.is_accepting():
            return candidate
    raise Misfit(f"The answer does not match the regular expression {pattern[:_PROBLEM_CHARACTERS]}")


def _unfenced(text: str) -> str:
    """Without the fence of a code block, which models like to put around JSON."""
    first, _, rest = text.strip().partition("\n")
    return rest.removesuffix("```") if first in _FENCES and rest.endswith("```") else text


def _described(text: str, schema: str) -> Any:
    try:
        value = msgspec.json.decode(_unfenced(text))
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

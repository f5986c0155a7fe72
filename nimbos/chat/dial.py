"""One thinking dial, read from every dialect's fields.
Knows nothing of models; `thinking.py` turns a dial into a number of tokens.

| says            | fields                                                                                          |
| --------------- | ----------------------------------------------------------------------------------------------- |
| budget (tokens) | thinking_budget, thinking_token_budget, reasoning_budget_tokens, thinking_budget_tokens,          |
|                 | thinking.budget_tokens, reasoning.max_tokens                                                      |
| level           | reasoning_effort, reasoning.effort, think, output_config.effort                                   |
| switch          | enable_thinking, thinking.type, thinking, think, reasoning.enabled                                |

The same names count inside chat_template_kwargs. A budget beats a level, a level beats a switch. Two fields that cannot
both be meant are an error naming both. `output_config.effort` is about more than thinking, so it never contradicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from nimbos.errors import InvalidRequest, UnsupportedField

Switch = bool | Literal["auto"]

LEVEL_TOKENS: Mapping[str, int | None] = {
    "none": 0,
    "minimal": 128,
    "low": 512,
    "medium": 2_048,
    "high": 8_192,
    "xhigh": 16_384,
    "max": None,  # as much as the window holds
}

BUDGET_FIELDS = ("thinking_budget", "thinking_token_budget", "reasoning_budget_tokens", "thinking_budget_tokens")
DIAL_FIELDS = frozenset(
    [*BUDGET_FIELDS, "reasoning_effort", "reasoning", "think", "thinking", "output_config", "enable_thinking"]
)
_KWARGS = "chat_template_kwargs"
_TYPES: Mapping[str, Switch] = {
    "enabled": True,
    "disabled": False,
    "between_tools": True,
    "adaptive": "auto",
    "auto": "auto",
}
_SILENT_KEYS = {
    "thinking": {"display"},
    "reasoning": {"summary", "generate_summary", "exclude"},
    "output_config": {"format"},  # the API's business
}


@dataclass(frozen=True, slots=True)
class _Said:
    """One field's meaning. A soft one gives way to a harder one instead of contradicting it."""

    field: str
    meaning: int | str | bool
    kind: Literal["budget", "level", "switch"]
    soft: bool = False

    @property
    def off(self) -> bool:
        return self.meaning in (0, "none") if self.kind != "switch" else self.meaning is False

    @property
    def on(self) -> bool:
        return not self.off and self.meaning != "auto"


class Dial(msgspec.Struct, frozen=True, kw_only=True):
    """How much thinking was asked for; all None: the model's own habit.

    `budget`: tokens. `level`: a key of `LEVEL_TOKENS`. `switch`: on, off, or "auto": a rule decides for each request.
    """

    budget: int | None = None
    level: str | None = None
    switch: bool | Literal["auto"] | None = None

    @property
    def given(self) -> bool:
        return self != Dial()

    @staticmethod
    def read(fields: Mapping[str, Any]) -> Dial:
        """Fields of a request body; those that are not the dial's are left alone, and null means absent.

        Raises: InvalidRequest for a wrong type, an unknown level, a negative budget, or a contradiction.
        """
        said = list(_statements(fields, ""))
        kwargs = fields.get(_KWARGS)
        if isinstance(kwargs, Mapping):
            said += _statements(kwargs, f"{_KWARGS}.")
        said = _without_overruled(said)
        _refuse_contradictions(said)
        budget = next((s.meaning for s in said if s.kind == "budget"), None)
        level = next((s.meaning for s in said if s.kind == "level"), None)
        switch = next((s.meaning for s in said if s.kind == "switch"), None)
        return msgspec.convert({"budget": budget, "level": level, "switch": switch}, Dial)


def _statements(fields: Mapping[str, Any], prefix: str) -> Iterator[_Said]:
    for name in BUDGET_FIELDS:
        yield from _budget(fields.get(name), prefix + name)
    yield from _switch(fields.get("enable_thinking"), f"{prefix}enable_thinking")
    yield from _level(fields.get("reasoning_effort"), f"{prefix}reasoning_effort")
    think = fields.get("think")
    yield from _level(think, f"{prefix}think") if isinstance(think, str) else _switch(think, f"{prefix}think")
    yield from _thinking(fields.get("thinking"), f"{prefix}thinking")
    reasoning = _object(fields.get("reasoning"), f"{prefix}reasoning", ("effort", "enabled", "max_tokens"))
    yield from _level(reasoning.get("effort"), f"{prefix}reasoning.effort")
    yield from _switch(reasoning.get("enabled"), f"{prefix}reasoning.enabled")
    yield from _budget(reasoning.get("max_tokens"), f"{prefix}reasoning.max_tokens")
    output = _object(fields.get("output_config"), f"{prefix}output_config", ("effort",))
    yield from _level(output.get("effort"), f"{prefix}output_config.effort", soft=True)


def _thinking(value: Any, field: str) -> Iterator[_Said]:
    if isinstance(value, bool | str):
        yield from _switch(value, field)
        return
    table = _object(value, field, ("type", "budget_tokens"))
    kind = table.get("type")
    if kind is not None:
        if not isinstance(kind, str) or kind not in _TYPES:
            raise InvalidRequest(
                f"{field}.type is {kind!r}; it must be one of {', '.join(_TYPES)}.", param=f"{field}.type"
            )
        yield _Said(f"{field}.type", _TYPES[kind], "switch")
    yield from _budget(table.get("budget_tokens"), f"{field}.budget_tokens")


def _object(value: Any, field: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{field} must be an object, not {value!r:.60}.", param=field)
    for key, item in value.items():
        if key not in known and key not in _SILENT_KEYS[field.rsplit(".", 1)[-1]] and item is not None:
            raise UnsupportedField(f"{field}.{key}", why="not known here")
    return value


def _budget(value: Any, field: str) -> Iterator[_Said]:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{field} must be a whole number of tokens, not {value!r:.60}.", param=field)
    if value < 0:
        raise InvalidRequest(
            f"{field} is {value}; a number of tokens cannot be negative. 0 means no thinking.", param=field
        )
    yield _Said(field, value, "budget")


def _level(value: Any, field: str, *, soft: bool = False) -> Iterator[_Said]:
    if value is None:
        return
    if value == "auto":
        yield _Said(field, "auto", "switch", soft)
    elif isinstance(value, str) and value in LEVEL_TOKENS:
        yield _Said(field, value, "level", soft)
    else:
        known = ", ".join([*LEVEL_TOKENS, "auto"])
        raise InvalidRequest(f"{field} is {value!r:.60}; it must be one of {known}.", param=field)


def _switch(value: Any, field: str) -> Iterator[_Said]:
    if value is None:
        return
    if not isinstance(value, bool) and value != "auto":
        raise InvalidRequest(f'{field} must be true, false or "auto", not {value!r:.60}.', param=field)
    yield _Said(field, value, "switch")


def _without_overruled(said: list[_Said]) -> list[_Said]:
    """A soft statement stays only when nothing harder of its kind, and no clear off, stands beside it."""
    hard = [s for s in said if not s.soft]
    return [s for s in said if not s.soft or not any(h.off or h.kind == s.kind for h in hard)]


def _refuse_contradictions(said: list[_Said]) -> None:
    for index, one in enumerate(said):
        for other in said[index + 1 :]:
            same_kind_differs = one.kind == other.kind and one.meaning != other.meaning
            if same_kind_differs or (one.off and other.on) or (one.on and other.off):
                raise InvalidRequest(
                    f"{one.field} ({one.meaning!r}) and {other.field} ({other.meaning!r}) contradict each other. "
                    "Send one of them.",
                    param=other.field,
                )

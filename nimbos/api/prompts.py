"""Prompts as OpenAI's older routes take them: a string, strings, token ids, or lists of token ids."""

from __future__ import annotations

from typing import cast

from nimbos.errors import InvalidRequest
from nimbos.types import Part, Text, Tokens

Prompts = str | list[str | int | list[int]]

_TOKEN_MAX = 2**31 - 1


def prompts_of(given: Prompts, *, param: str, most: int, special: bool) -> list[Part]:
    """One part for each prompt. `special`: control tokens written in the text are meant as such.

    Raises: InvalidRequest.
    """
    if isinstance(given, str):
        return [_text(given, param, special=special)]
    if not given:
        raise InvalidRequest(f"`{param}` is empty.", param=param)
    if all(isinstance(one, int) for one in given):
        return [_tokens(cast("list[int]", given), param)]
    if len(given) > most:
        raise InvalidRequest(f"`{param}` has {len(given)} entries; there may be {most}.", param=param)
    if all(isinstance(one, str) for one in given):
        return [_text(one, f"{param}[{i}]", special=special) for i, one in enumerate(cast("list[str]", given))]
    if all(isinstance(one, list) for one in given):
        return [_tokens(one, f"{param}[{i}]") for i, one in enumerate(cast("list[list[int]]", given))]
    raise InvalidRequest(f"`{param}` mixes strings and token ids.", param=param)


def _text(text: str, param: str, *, special: bool) -> Part:
    if not text:
        raise InvalidRequest(f"`{param}` is an empty string.", param=param)
    return Text(text, special=special)


def _tokens(ids: list[int], param: str) -> Part:
    if not ids:
        raise InvalidRequest(f"`{param}` is empty.", param=param)
    if not all(0 <= token <= _TOKEN_MAX for token in ids):
        raise InvalidRequest(f"`{param}` holds a number that is no token id.", param=param)
    return Tokens(tuple(ids))

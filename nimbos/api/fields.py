"""Fields that the chat and the completions dialect share: sampling, stops, classes, guided output.

Ranges are checked here. A field that is null counts as absent, as OpenAI's clients send it.
"""

from __future__ import annotations

import os
import re
from typing import Any, Literal

import msgspec

from nimbos.accounts import allowed_classes
from nimbos.errors import Forbidden, InvalidRequest, UnsupportedField
from nimbos.types import Account, AskClass, Grammar, Sampling

STOPS_MAX = 16
STOP_IDS_MAX = 64
N_MAX = 32
TOP_LOGPROBS_MAX = 20
BIASES_MAX = 1024
GRAMMAR_CHARACTERS_MAX = 256 * 1024

_METACHARACTER = re.compile(r"[\\.+*?()|\[\]{}^$]")

Tier = Literal["auto", "default", "flex", "scale", "priority", "fast"]
_TIERS = {"priority": AskClass.INTERACTIVE, "fast": AskClass.INTERACTIVE, "flex": AskClass.BATCH}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_obfuscation` pads chunks against eavesdroppers elsewhere; there is nothing to obfuscate here."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's object; one of them."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class NimbosFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"ask_class": "class"}):
    """Our own extension object, `x_nimbos`."""

    ask_class: AskClass | None = None
    grammar: Grammar | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What every generating route takes. OpenAI's, then vLLM's and llama.cpp's."""

    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    user: str | None = None
    service_tier: Tier | None = None

    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    grammar: str | None = None
    x_nimbos: NimbosFields | None = None


# Where a request says nothing of how to sample: small open models write nonsense from the untouched distribution.
SILENT_TEMPERATURE = 0.7
SILENT_MIN_P = 0.05


def sampling_of(fields: SamplingFields, *, logprobs: int | None) -> Sampling:
    """A request that names any of temperature, top_p, top_k, min_p and typical_p gets just what it names.

    Raises: InvalidRequest naming the field and its range."""
    seed = fields.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(8), "little", signed=True)
    else:
        _within("seed", seed, -(2**63), 2**63 - 1)
    chosen = (fields.temperature, fields.top_p, fields.top_k, fields.min_p, fields.typical_p)
    silent = all(value is None for value in chosen)
    return Sampling(
        temperature=_within("temperature", fields.temperature, 0, 2, absent=SILENT_TEMPERATURE if silent else 1.0),
        top_p=_within("top_p", fields.top_p, 0, 1, absent=1.0),
        top_k=max(0, int(_within("top_k", fields.top_k, -1, 1_000_000, absent=0))),
        min_p=_within("min_p", fields.min_p, 0, 1, absent=SILENT_MIN_P if silent else 0.0),
        typical_p=_within("typical_p", fields.typical_p, 0, 1, absent=1.0),
        repetition_penalty=_within("repetition_penalty", fields.repetition_penalty, 0.01, 10, absent=1.0),
        frequency_penalty=_within("frequency_penalty", fields.frequency_penalty, -2, 2, absent=0.0),
        presence_penalty=_within("presence_penalty", fields.presence_penalty, -2, 2, absent=0.0),
        logit_bias=_biases(fields.logit_bias or {}),
        seed=seed,
        logprobs=logprobs,
    )


def count_of(fields: SamplingFields) -> int:
    return int(_within("n", fields.n, 1, N_MAX, absent=1))


def stops_of(fields: SamplingFields) -> tuple[str, ...]:
    if fields.stop is None:
        return ()
    stops = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
    if len(stops) > STOPS_MAX:
        raise InvalidRequest(f"`stop` has {len(stops)} strings; there may be {STOPS_MAX}.", param="stop")
    if any(not stop or len(stop) > 1000 for stop in stops):
        raise InvalidRequest("Each string of `stop` must have 1 to 1000 characters.", param="stop")
    return stops


def stop_ids_of(fields: SamplingFields) -> tuple[int, ...]:
    ids = tuple(dict.fromkeys(fields.stop_token_ids or ()))
    if len(ids) > STOP_IDS_MAX or not all(0 <= token < 2**31 for token in ids):
        raise InvalidRequest(
            f"`stop_token_ids` takes up to {STOP_IDS_MAX} ids of tokens, which are not below zero.",
            param="stop_token_ids",
        )
    return ids


def limit_of(fields: SamplingFields) -> int | None:
    if fields.max_tokens is None:
        return None
    return int(_within("max_tokens", fields.max_tokens, 1, 2**31 - 1))


def min_tokens_of(fields: SamplingFields, limit: int | None) -> int:
    least = int(_within("min_tokens", fields.min_tokens, 0, 2**31 - 1, absent=0))
    if limit is not None and least > limit:
        raise InvalidRequest(f"`min_tokens` is {least} and `max_tokens` only {limit}.", param="min_tokens")
    return least


def check_stream(fields: SamplingFields) -> None:
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequest("`stream_options` is only allowed with `stream: true`.", param="stream_options")


def check_unstreamed(stream: bool | None) -> None:
    """Raises: UnsupportedField where nobody is there to read a stream."""
    if stream:
        raise UnsupportedField("stream", why="not supported in a batch, whose answers are whole")


def class_of(tier: Tier | None, extension: AskClass | None, header: str | None, account: Account) -> AskClass:
    """From the header `x-nimbos-class`, `x_nimbos.class` or `service_tier`; a key's `class:` scopes limit it.

    Raises: InvalidRequest on a contradiction; Forbidden.
    """
    wanted: dict[str, AskClass] = {}
    if header is not None:
        if header not in set(AskClass):
            raise InvalidRequest(f"The header `x-nimbos-class` must be one of {', '.join(AskClass)}.")
        wanted["x-nimbos-class"] = AskClass(header)
    if extension is not None:
        wanted["x_nimbos.class"] = extension
    if tier in _TIERS:
        wanted["service_tier"] = _TIERS[tier]
    if len(set(wanted.values())) > 1:
        named = " and ".join(f"`{name}` ({value})" for name, value in wanted.items())
        raise InvalidRequest(f"{named} contradict each other.", param="service_tier")
    allowed = allowed_classes(account)
    chosen = next(iter(wanted.values()), allowed[0])
    if chosen not in allowed:
        raise Forbidden(f"This key is not for the class {chosen.value!r}, but for {', '.join(allowed)}.")
    return chosen


def extension_class(fields: SamplingFields) -> AskClass | None:
    return fields.x_nimbos.ask_class if fields.x_nimbos is not None else None


def grammar_of(fields: SamplingFields) -> Grammar | None:
    """The one grammar that the guided fields ask for.

    Raises: InvalidRequest naming both fields when there are two.
    """
    found: dict[str, Grammar] = {}
    _add_guided(
        found,
        "guided_",
        json=fields.guided_json,
        regex=fields.guided_regex,
        choice=fields.guided_choice,
        grammar=fields.guided_grammar,
    )
    if fields.grammar is not None:
        found["grammar"] = Grammar(kind=_grammar_kind(fields.grammar), source=fields.grammar)
    if fields.structured_outputs is not None:
        given = fields.structured_outputs
        _add_guided(
            found,
            "structured_outputs.",
            json=given.json,
            regex=given.regex,
            choice=given.choice,
            grammar=given.grammar,
        )
        if given.json_object:
            found["structured_outputs.json_object"] = Grammar(kind="json_schema", source='{"type": "object"}')
    if fields.x_nimbos is not None and fields.x_nimbos.grammar is not None:
        found["x_nimbos.grammar"] = fields.x_nimbos.grammar
    return only_one(found)


def only_one(found: dict[str, Grammar]) -> Grammar | None:
    if len(found) > 1:
        first, second, *_ = found
        raise InvalidRequest(f"`{first}` and `{second}` both say what the answer looks like; give one.", param=second)
    for name, grammar in found.items():
        if len(grammar.source) > GRAMMAR_CHARACTERS_MAX:
            raise InvalidRequest(f"`{name}` is longer than {GRAMMAR_CHARACTERS_MAX} characters.", param=name)
        return grammar
    return None


def _add_guided(
    found: dict[str, Grammar],
    prefix: str,
    *,
    json: dict[str, Any] | str | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
) -> None:
    if json is not None:
        source = json if isinstance(json, str) else msgspec.json.encode(json).decode()
        found[f"{prefix}json"] = Grammar(kind="json_schema", source=source)
    if regex is not None:
        found[f"{prefix}regex"] = Grammar(kind="regex", source=regex)
    if choice is not None:
        if not choice:
            raise InvalidRequest(f"`{prefix}choice` is empty.", param=f"{prefix}choice")
        found[f"{prefix}choice"] = Grammar(kind="regex", source="|".join(map(_literal, choice)))
    if grammar is not None:
        found[f"{prefix}grammar"] = Grammar(kind=_grammar_kind(grammar), source=grammar)


def _literal(text: str) -> str:
    """Only what means something is escaped: the engine's expressions know no `\\<` and refuse `\\€`."""
    return _METACHARACTER.sub(r"\\\g<0>", text)


def _grammar_kind(source: str) -> Literal["gbnf", "lark"]:
    """Only GBNF defines with `::=`."""
    return "gbnf" if "::=" in source else "lark"


def _biases(given: dict[str, float]) -> dict[int, float]:
    if len(given) > BIASES_MAX:
        raise InvalidRequest(f"`logit_bias` has {len(given)} entries; there may be {BIASES_MAX}.", param="logit_bias")
    biases: dict[int, float] = {}
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            raise InvalidRequest(f"`logit_bias` has the key {token[:40]!r}; keys are token ids.", param="logit_bias")
        biases[int(token)] = _within(f"logit_bias[{token}]", bias, -100, 100)
    return biases


def _within(name: str, value: float | None, low: float, high: float, *, absent: float = 0) -> float:
    if value is None:
        return absent
    if not low <= value <= high:
        raise InvalidRequest(f"`{name}` is {value}; it must be from {low} to {high}.", param=name)
    return value

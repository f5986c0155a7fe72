"""What tokens cost: a table of whole millionths for each million tokens, in versions that are never changed.

Pure but for the statements at the end. The kinds of tokens are disjoint: see `quantities`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from sqlalchemy import bindparam, select, update

from nimbos.db import Statement, Transaction, insert, insert_ignored
from nimbos.db.tables.ledger import price_versions, prices
from nimbos.errors import InvalidRequest
from nimbos.types import AskClass, Usage

PRICED = ("input", "cached", "cache_write", "cache_read", "output", "thinking")
RECOMPUTED = "recomputed"
ANY = "*"
MICROS_PER_MILLION_MAX = 10**12  # a million of the currency for a million tokens
NO_PRICES = 0
_MILLION = 1_000_000
# whose price a kind has that has none of its own
_INSTEAD = {"cached": "input", "cache_write": "input", "cache_read": "cached", "thinking": "output"}
_CURRENT = "current"


def quantities(usage: Usage, pin_tokens: int = 0) -> dict[str, int]:
    """Tokens by kind, each token in one kind, without those that are zero: `input` is what was computed of the prompt,
    `output` the answer without its thinking. Of the prompt's first `pin_tokens`, which the ask wanted to be kept, those
    that were computed are `cache_write` and those that were in memory `cache_read`."""
    read = min(usage.cached, pin_tokens)
    written = max(0, min(usage.input, pin_tokens) - usage.cached)
    found = {
        "input": usage.input - usage.cached - written,
        "cached": usage.cached - read,
        "cache_write": written,
        "cache_read": read,
        "output": usage.output - usage.thinking,
        "thinking": usage.thinking,
        RECOMPUTED: usage.recomputed,
    }
    return {meter: quantity for meter, quantity in found.items() if quantity}


def tokens_of(usage: Usage) -> int:
    """What a budget of tokens is charged: prompt and answer, whatever they cost."""
    return usage.input + usage.output


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """`model` and `ask_class` may be `*`."""

    model: str = ANY
    meter: str
    ask_class: str = ANY
    micros_per_million: int


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """The prices of one model for one class, in millionths for a million tokens, for an ask that wants so many
    tokens of its prompt kept."""

    version: int = NO_PRICES
    input: int = 0
    cached: int = 0
    cache_write: int = 0
    cache_read: int = 0
    output: int = 0
    thinking: int = 0
    pin_tokens: int = 0

    def of(self, meter: str) -> int:
        return 0 if meter == RECOMPUTED else int(getattr(self, meter))

    def cost_micros(self, usage: Usage) -> int:
        """The one place where money is rounded, once for each ask: the exact sum over all kinds, to the nearest
        millionth, a half upwards."""
        exact = sum(quantity * self.of(meter) for meter, quantity in quantities(usage, self.pin_tokens).items())
        return (exact + _MILLION // 2) // _MILLION

    @property
    def _prompt_most(self) -> int:
        plain = max(self.input, self.cached)
        return max(plain, self.cache_write, self.cache_read) if self.pin_tokens else plain

    def bound_micros(self, *, prompt_tokens: int, output_tokens: int) -> int:
        """No less than what so many more tokens can add to the cost, whatever kinds they turn out to be."""
        exact = prompt_tokens * self._prompt_most + output_tokens * max(self.output, self.thinking)
        return -(-exact // _MILLION)

    def outputs_for(self, micros: int, *, prompt_tokens: int, most: int) -> int:
        """How many tokens of answer, up to `most`, `micros` pay for besides the prompt; below zero when not even
        that."""
        left = micros * _MILLION - prompt_tokens * self._prompt_most
        if left < 0:
            return -1
        each = max(self.output, self.thinking)
        return most if each == 0 else min(most, left // each)


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """One version, whole. Without a row a price is 0. `_found`: what was asked for so far."""

    version: int = NO_PRICES
    rows: dict[tuple[str, str, str], int] = field(default_factory=dict)
    _found: dict[tuple[str, str], Rates] = field(default_factory=dict, repr=False, compare=False)

    def rates(self, model: str, ask_class: AskClass | str, pin_tokens: int = 0) -> Rates:
        known = self._found.get((model, ask_class))
        if known is None:
            known = self._found[model, ask_class] = self._rates(model, ask_class)
        return msgspec.structs.replace(known, pin_tokens=pin_tokens) if pin_tokens else known

    def _rates(self, model: str, ask_class: str) -> Rates:
        found = {meter: self._find(model, meter, str(ask_class)) for meter in PRICED}
        for meter, other in _INSTEAD.items():
            if found[meter] is None:
                found[meter] = found[other]
        prices = {meter: price or 0 for meter, price in found.items()}
        return Rates(version=self.version, **prices)

    def prices(self) -> list[Price]:
        return [
            Price(model=model, meter=meter, ask_class=ask_class, micros_per_million=micros)
            for (model, meter, ask_class), micros in sorted(self.rows.items())
        ]

    def _find(self, model: str, meter: str, ask_class: str) -> int | None:
        """The model's own row goes before everybody's, and then the class's before every class's."""
        for key in ((model, ask_class), (model, ANY), (ANY, ask_class), (ANY, ANY)):
            price = self.rows.get((key[0], meter, key[1]))
            if price is not None:
                return price
        return None


def check_price(price: Price) -> None:
    """Raises: InvalidRequest."""
    if price.meter not in PRICED:
        raise InvalidRequest(f"There is no meter {price.meter[:60]!r}; priced are {', '.join(PRICED)}.", param="meter")
    if price.ask_class != ANY and price.ask_class not in set(AskClass):
        classes = ", ".join(AskClass)
        raise InvalidRequest(f"There is no class {price.ask_class[:60]!r}; there are {classes} and *.", param="class")
    if not 0 <= price.micros_per_million <= MICROS_PER_MILLION_MAX:
        raise InvalidRequest(
            f"A price is from 0 to {MICROS_PER_MILLION_MAX} millionths for a million tokens, "
            f"not {price.micros_per_million}.",
            param="micros_per_million",
        )
    if not price.model or len(price.model) > 300:
        raise InvalidRequest("A price needs a model's id of at most 300 characters, or *.", param="model")


_SELECT_VERSION = Statement(select(price_versions.c.version).where(price_versions.c.name == _CURRENT))
_LOCK_VERSION = Statement(select(price_versions.c.version).where(price_versions.c.name == _CURRENT).with_for_update())
_BEGIN_VERSIONS = insert_ignored(price_versions, key=("name",))
_SET_VERSION = Statement(
    update(price_versions)
    .where(price_versions.c.name == _CURRENT)
    .values(version=bindparam("new_version"), changed_ms=bindparam("now_ms"))
)
_SELECT_TABLE = Statement(select(prices).where(prices.c.version == bindparam("of_version")))
_INSERT_PRICE = insert(prices)


def current_version() -> Transaction[int]:
    rows = yield _SELECT_VERSION()
    return rows[0]["version"] if rows else NO_PRICES


def load_table(version: int) -> Transaction[PriceTable]:
    rows = yield _SELECT_TABLE(of_version=version)
    return PriceTable(
        version=version,
        rows={(row["model"], row["meter"], row["class"]): row["micros_per_million"] for row in rows},
    )


def current_table() -> Transaction[PriceTable]:
    version = yield from current_version()
    return (yield from load_table(version))


def set_prices(changes: Sequence[Price], *, removed: Sequence[Price] = (), replace: bool = False) -> Transaction[int]:
    """Makes a new version: the current one with `changes`, without `removed`; with `replace`, `changes` alone.
    Asks that were admitted before keep their version. Returns its number.

    Raises: InvalidRequest.
    """
    for price in changes:
        check_price(price)
    now_ms = time.time_ns() // _MILLION
    yield _BEGIN_VERSIONS(name=_CURRENT, version=NO_PRICES, changed_ms=now_ms)
    locked = yield _LOCK_VERSION()
    version = int(locked[0]["version"])
    rows = {} if replace else dict((yield from load_table(version)).rows)
    for price in removed:
        rows.pop((price.model, price.meter, price.ask_class), None)
    for price in changes:
        rows[price.model, price.meter, price.ask_class] = price.micros_per_million
    for (model, meter, ask_class), micros in sorted(rows.items()):
        values: dict[str, str | int] = {"model": model, "meter": meter, "class": ask_class}
        yield _INSERT_PRICE(version=version + 1, micros_per_million=micros, **values)
    yield _SET_VERSION(new_version=version + 1, now_ms=now_ms)
    return version + 1

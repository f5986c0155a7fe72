"""What people write for money, times and lists, read exactly. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal

from nimbos.errors import InvalidRequest

_MONEY = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,6}))? ?(?:usd)?", re.IGNORECASE | re.ASCII)
_SPAN = re.compile(r"([0-9]{1,6})([mhdwy])")
_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}
_MICROS = 1_000_000


def micros_of(money: str) -> int:
    """`12.50` or `12.50usd` in millionths, without a float in between.

    Raises: InvalidRequest, also for more than six decimals.
    """
    found = _MONEY.fullmatch(money.strip())
    if found is None:
        raise InvalidRequest(f"{money[:60]!r} is no sum of money; write it like 12.50, with at most six decimals.")
    return int(found[1]) * _MICROS + int((found[2] or "").ljust(6, "0"))


def money_of(micros: int) -> str:
    """At least two decimals, and as many as it needs."""
    whole, rest = divmod(abs(micros), _MICROS)
    decimals = f"{rest:06d}".rstrip("0").ljust(2, "0")
    return f"{'-' if micros < 0 else ''}{whole:,}.{decimals}"


def exact_money(value: str | int | Decimal) -> int:
    """From a TOML file, whose numbers were read as decimals."""
    text = format(value, "f") if isinstance(value, Decimal) else str(value)
    return micros_of(text)


def seconds_until(expiry: str, *, now: datetime) -> int:
    """From `90d`, `12h`, or a moment such as `2027-01-31`.

    Raises: InvalidRequest.
    """
    span = _SPAN.fullmatch(expiry)
    seconds = int(span[1]) * _SECONDS[span[2]] if span else round((moment_of(expiry) - now).total_seconds())
    if seconds <= 0:
        raise InvalidRequest(f"{expiry!r} is not in the future.")
    return seconds


def since_ms(text: str, *, now: datetime) -> int:
    """A moment such as `2026-11-01` or `2026-11-01T12:00`, in UTC where it says nothing; or `7d`: so long ago."""
    span = _SPAN.fullmatch(text)
    at_s = now.timestamp() - int(span[1]) * _SECONDS[span[2]] if span else moment_of(text).timestamp()
    return max(0, round(at_s * 1000))


def moment_of(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequest(
            f"{text[:60]!r} is no time; write it like 2026-11-01, 2026-11-01T12:00 or 7d (m, h, d, w, y)."
        ) from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def words_of(text: str | None, option: str) -> list[str]:
    """A list with commas; none where the option is not given.

    Raises: InvalidRequest for an option without a word: it would allow everything, and an empty variable of a script
    must not.
    """
    if text is None:
        return []
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise InvalidRequest(f"{option} names nothing. Name at least one, or leave {option} out to allow all.")
    return words

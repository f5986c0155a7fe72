"""When a budget's period begins and ends: days and months in UTC, or never. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

Period = Literal["day", "month", "total"]
PERIODS: tuple[Period, ...] = get_args(Period)
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


def start_ms(period: str, now_ms: int) -> int:
    """The beginning of the period that `now_ms` lies in; 0 for `total`."""
    if period == "day":
        return now_ms - now_ms % DAY_MS
    if period == "month":
        now = datetime.fromtimestamp(now_ms / 1000, UTC)
        return _ms(now.replace(day=1, hour=0, minute=0, second=0, microsecond=0))
    return 0


def end_ms(period: str, now_ms: int) -> int | None:
    """The beginning of the next period; None where none follows."""
    if period == "day":
        return start_ms(period, now_ms) + DAY_MS
    if period == "month":
        begun = datetime.fromtimestamp(start_ms(period, now_ms) / 1000, UTC)
        return _ms((begun + timedelta(days=32)).replace(day=1))
    return None


def _ms(moment: datetime) -> int:
    return round(moment.timestamp()) * 1000

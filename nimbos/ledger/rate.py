"""The token bucket, as one integer: when the bucket will be full again. Pure.

A bucket of `burst` units fills at `per_min` a minute. `due_ns` is the moment (since the epoch) when it is full; what
lies between now and then is what is in use. Taking `n` units moves it by n / rate. This is the generic cell rate
algorithm; one number in the database is all that several servers have to share.
Source: ITU-T I.371, annex A.

An amount larger than the whole bucket could never be taken, so it is taken from a full one, which is then in debt: the
average holds, and nobody waits for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

MINUTE_NS = 60_000_000_000
DUE_NS_MAX = 2**62  # in the year 2116; a bucket that takes longer fills no later
_SLACK_NS_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """`due_ns`: the bucket afterwards; None where the amount does not fit. `remaining` and `used` are units, after
    the taking where there was one; `full_in_s` until all are back; `retry_after_s` until this amount would fit, None:
    never."""

    due_ns: int | None
    used: int
    remaining: int
    full_in_s: float
    retry_after_s: float | None = 0.0


def take(due_ns: int, now_ns: int, *, per_min: int, burst: int, amount: int) -> Take:
    if per_min <= 0:
        return Take(due_ns=None, used=0, remaining=0, full_in_s=60.0, retry_after_s=None)
    begun = max(due_ns, now_ns)
    cost_ns = span_ns(amount, per_min)
    window_ns = span_ns(burst, per_min)
    wait_ns = begun - now_ns + min(cost_ns, window_ns) - window_ns
    if wait_ns <= _slack_ns(burst):
        full_at_ns = min(begun + cost_ns, DUE_NS_MAX)
        return _standing(full_at_ns, now_ns, per_min=per_min, burst=burst, due_ns=full_at_ns)
    return _standing(begun, now_ns, per_min=per_min, burst=burst, due_ns=None, retry_after_s=wait_ns / 1e9)


def at_new_rate(due_ns: int, now_ns: int, *, before_per_min: int | None, per_min: int | None, burst: int | None) -> int:
    """The same units in use, where they come back faster or slower than before. Nobody waits longer for a lower rate
    than an empty bucket takes, nor for one that is new."""
    if not before_per_min or not per_min:
        return 0
    in_use_ns = max(0, due_ns - now_ns)
    scaled_ns = -(-in_use_ns * before_per_min // per_min)
    window_ns = span_ns(per_min if burst is None else burst, per_min)
    return now_ns + min(scaled_ns, max(in_use_ns, window_ns), DUE_NS_MAX - now_ns)


def span_ns(amount: int, per_min: int) -> int:
    """How long the bucket takes for so many units, or for units given back (below zero); rounded so that rounding gives
    nothing away."""
    return -(-amount * MINUTE_NS // per_min)


def _slack_ns(burst: int) -> int:
    """Each taking is rounded up by less than a nanosecond; so much must not cost the last of a burst its place."""
    return min(burst, _SLACK_NS_MAX)


def _standing(
    full_at_ns: int, now_ns: int, *, per_min: int, burst: int, due_ns: int | None, retry_after_s: float = 0.0
) -> Take:
    waiting_ns = max(0, full_at_ns - now_ns)
    used = max(0, -(-(waiting_ns - _slack_ns(burst)) * per_min // MINUTE_NS))
    return Take(
        due_ns=due_ns,
        used=used,
        remaining=max(0, burst - used),
        full_in_s=waiting_ns / 1e9,
        retry_after_s=retry_after_s,
    )

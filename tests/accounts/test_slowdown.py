"""Guessing is slowed more and more, good secrets never, and memory is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.accounts.slowdown import Slowdown, place_of


def make(**changes: float) -> Slowdown:
    return Slowdown(**{"free": 3, "longest_s": 60.0, "forget_s": 300.0, "places_max": 8, **changes})  # type: ignore[arg-type]


def test_the_first_failures_are_free_and_then_the_wait_doubles_up_to_a_limit() -> None:
    slow = make()
    waits = [slow.failed("a", 100.0) for _ in range(12)]
    assert waits == [0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert slow.wait_s("a", 130.0) == 30
    assert slow.wait_s("a", 160.0) == 0
    assert slow.wait_s("b", 100.0) == 0


def test_a_place_that_is_quiet_for_long_is_as_new() -> None:
    slow = make()
    for _ in range(9):
        slow.failed("a", 0.0)
    assert slow.failed("a", 299.0) == 60
    assert slow.failed("a", 599.0) == 0


def test_forgetting_is_at_once() -> None:
    slow = make()
    for _ in range(9):
        slow.failed("a", 0.0)
    slow.forget("a")
    assert (slow.wait_s("a", 0.0), slow.count("a"), slow.failed("a", 0.0)) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 10)), max_size=200))
def test_memory_is_bounded_and_waits_are_never_longer_than_the_limit(tries: list[tuple[int, float]]) -> None:
    slow, now = make(), 0.0
    for place, passed in tries:
        now += passed
        assert 0 <= slow.failed(str(place), now) <= 60
        assert len(slow) <= 8
        assert slow.wait_s(str(place), now) <= 60


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("x" * 500, "x" * 64),
    ],
)
def test_a_place_is_an_address_or_all_that_one_has(address: str, place: str) -> None:
    assert place_of(address) == place

"""Who gets a place when several queues want one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nimbos.work import shares_of

HOLDING = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 20), min_size=1)


@given(st.integers(0, 40), HOLDING)
def test_places_go_to_those_that_have_fewest(free: int, holding: dict[str, int]) -> None:
    shares = shares_of(free, holding)
    after = {name: count + shares.get(name, 0) for name, count in holding.items()}
    assert sum(shares.values()) == free
    for name, count in shares.items():
        assert count > 0
        assert after[name] <= min(after.values()) + 1


def test_of_those_that_have_as_few_the_first_is_first() -> None:
    """The first waits longest: by name, the last ones would never have a place where there are more than places."""
    assert shares_of(1, {"z": 0, "a": 0}) == {"z": 1}
    assert shares_of(2, {"z": 1, "m": 0, "a": 0}) == {"m": 1, "a": 1}


@given(st.integers(0, 60), st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1))
def test_twice_the_weight_is_twice_the_places(free: int, weights: dict[str, float]) -> None:
    shares = shares_of(free, dict.fromkeys(weights, 0), weights=weights)
    assert sum(shares.values()) == free
    each = [(shares.get(name, 0), weight) for name, weight in weights.items()]
    fewest = min(count / weight for count, weight in each)
    assert all((count - 1) / weight <= fewest for count, weight in each)


def test_the_weight_of_a_queue_counts_with_what_it_has() -> None:
    assert shares_of(3, {"light": 2, "heavy": 2}, weights={"heavy": 2.0}) == {"heavy": 2, "light": 1}

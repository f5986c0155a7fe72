"""Guessing ahead: what repeats is guessed, what does not pay is left, and the answer is the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import cycle, islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nimbos.engine.guessing import MATCH_TOKENS, MATCH_TOKENS_MAX, PAUSE_TOKENS, Guesser, Offer, worth

# Milliseconds of a step of so many rows, measured on two cores (see bench/RESULTS.md); in between, interpolated.
MEASURED = {1: 26.0, 2: 44.0, 3: 59.0, 4: 66.0, 6: 100.0, 8: 122.0, 12: 151.0, 16: 182.0, 24: 226.0, 32: 297.0}


def measured_ms(rows: int) -> float:
    for (low, low_ms), (high, high_ms) in pairwise(MEASURED.items()):
        if low <= rows <= high:
            return low_ms + (high_ms - low_ms) * (rows - low) / (high - low)
    return float("inf")


def offer(trust: float, tokens: int) -> Offer:
    return Offer(trust, (7,) * tokens)


def naive(tokens: list[int], most: int) -> tuple[int, ...]:
    """The longest end that stood before, the latest of equal ones; what came after it, in a circle."""
    best, best_length = None, 0
    for at in range(len(tokens) - 1):
        length = 0
        while length < MATCH_TOKENS_MAX and length <= at and tokens[at - length] == tokens[-1 - length]:
            length += 1
        if length >= best_length and length >= MATCH_TOKENS:
            best, best_length = at, length
    return () if best is None else tuple(islice(cycle(tokens[best + 1 :]), most))


@given(st.lists(st.integers(0, 2), max_size=80), st.integers(0, 10))
def test_it_guesses_what_followed_the_longest_match(tokens: list[int], most: int) -> None:
    expected = naive(tokens, most) if most else ()
    assert Guesser().guess(tokens, most) == expected


def test_it_goes_on_with_a_growing_text() -> None:
    rng = random.Random(3)
    tokens = [rng.randrange(3) for _ in range(20)]
    guesser = Guesser()
    for _ in range(600):
        assert guesser.guess(tokens, 6) == naive(tokens, 6)
        tokens += [rng.randrange(3) for _ in range(rng.randrange(3))]


def test_trust_follows_what_came_true() -> None:
    sure, unsure = Guesser(), Guesser()
    for _ in range(5):
        sure.learn(7, 7)
        unsure.learn(7, 0)
    assert sure.trust > 0.95
    assert unsure.trust < 0.4
    unsure.learn(7, 7)
    assert unsure.trust > 0.6


def test_after_wrong_guesses_it_is_silent_for_longer_and_longer() -> None:
    text = list(range(40)) * 2
    guesser = Guesser()
    silences: list[int] = []
    while len(silences) < 4:
        assert guesser.guess(text, 4)
        guesser.learn(4, 0)
        begun = len(text)
        while not guesser.guess(text, 4):
            text.append(text[-40])
        silences.append(len(text) - begun)
    assert silences == [PAUSE_TOKENS, 2 * PAUSE_TOKENS, 4 * PAUSE_TOKENS, 8 * PAUSE_TOKENS]


def test_a_copy_is_guessed_far_and_a_doubtful_one_not_at_all() -> None:
    def count(trust: float, time_ms: Callable[[int], float] = measured_ms) -> int:
        return worth([offer(trust, 31)], rows=1, most_rows=32, time_ms=time_ms)[0]

    assert count(0.99) == 23
    assert count(0.9) == 3
    assert count(0.5) == 0
    assert count(0.5, lambda rows: 10.0 + rows / 10) > 0, "where rows cost next to nothing"


def test_steps_that_may_not_be_are_not_made() -> None:
    def at_most_12_rows(rows: int) -> float:
        return measured_ms(rows) if rows <= 12 else float("inf")

    assert worth([offer(0.99, 31)], rows=1, most_rows=32, time_ms=at_most_12_rows) == [11]
    assert worth([offer(0.99, 31)], rows=1, most_rows=8, time_ms=measured_ms) == [7]
    assert worth([offer(0.99, 3)], rows=1, most_rows=8, time_ms=measured_ms) == [3]
    assert worth([], rows=1, most_rows=8, time_ms=measured_ms) == []


@given(
    st.lists(st.builds(offer, st.floats(0.05, 0.99), st.integers(0, 16)), max_size=6),
    st.floats(0, 3), st.integers(0, 10),
)  # fmt: skip
def test_no_choice_is_worse_than_none(offers: list[Offer], row_cost: float, more: int) -> None:
    def time_ms(rows: int) -> float:
        return 10.0 + row_cost * rows

    rows = len(offers) + more
    if not rows:
        return
    counts = worth(offers, rows=rows, most_rows=64, time_ms=time_ms)
    assert all(0 <= count <= len(each.tokens) for count, each in zip(counts, offers, strict=True))
    expected = rows + sum(
        sum(each.trust**n for n in range(1, count + 1)) for count, each in zip(counts, offers, strict=True)
    )
    assert expected / time_ms(rows + sum(counts)) >= rows / time_ms(rows) - 1e-9
    assert rows + sum(counts) <= 64


@pytest.mark.parametrize("jobs", [4, 8])
def test_full_steps_are_left_alone_unless_guesses_are_all_but_certain(jobs: int) -> None:
    counts = worth([offer(0.75, 15)] * jobs, rows=jobs, most_rows=64, time_ms=measured_ms)
    assert counts == [0] * jobs

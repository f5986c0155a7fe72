"""Sampling against a naive reference in float64, and its promises about randomness."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nimbos.engine.cuts import cut, largest, smallest_reaching
from nimbos.engine.sampler import Picked, RecentCounts, pick, uniform
from nimbos.errors import AnswerFailed
from nimbos.types import Sampling

PINNED = (0.9401345329172969, 0.5629829957017561)
SIZES = (1, 7, 300, 5000, 20000)  # below, at and above where other algorithms take over


def draw_logits(seed: int, size: int, *, spread: float = 3.0, ties: bool = False) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * np.float32(spread)
    return np.round(values) if ties else values


def run(logits: np.ndarray, sampling: Sampling, **options: object) -> Picked:
    pieces = [str(token).encode() for token in range(len(logits))] if sampling.logprobs is not None else ()
    return pick(logits, sampling, **{"branch": 0, "position": 0, "pieces": pieces, **options})


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values.astype(np.float64) - values.max())
    return weights / weights.sum()


def reached(sums: np.ndarray, share: float) -> int:
    """How many are needed for `share`; cases so near to a limit that float32 may differ are left out."""
    assume(not np.any(np.abs(sums - share) < 1e-4))
    return int(np.searchsorted(sums, share)) + 1


def naive_cut(values: np.ndarray, sampling: Sampling) -> set[int]:
    order = sorted(range(len(values)), key=lambda token: (-float(values[token]), token))
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    if sampling.typical_p < 1:
        probability = softmax(values[order])
        surprise = -np.log(probability)
        distance = np.abs(surprise - (probability * surprise).sum())
        nearest = np.argsort(distance, kind="stable")
        count = reached(np.cumsum(probability[nearest]), sampling.typical_p)
        gaps = np.abs(np.delete(distance, nearest[count - 1]) - distance[nearest[count - 1]])
        assume(not np.any(gaps < 1e-4))
        chosen = sorted(nearest[:count])
        order = [order[at] for at in chosen]
    if sampling.top_p < 1:
        order = order[: reached(np.cumsum(softmax(values[order])), sampling.top_p)]
    if sampling.min_p > 0:
        floor = float(values[order].max()) + math.log(sampling.min_p)
        assume(not np.any(np.abs(values[order].astype(np.float64) - floor) < 1e-4))
        order = [token for token in order if values[token] >= floor]
    return set(order)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
def test_top_k_keeps_so_many_and_of_fewer_all(top_k: int) -> None:
    values = np.array([0.0, 3.0, 1.0, 2.0], dtype=np.float32)
    kept = cut(values, Sampling(top_k=top_k))
    assert (list(range(4)) if kept is None else kept.tolist()) == sorted([1, 3, 2, 0][:top_k])


@given(st.integers(0, 2**32), st.sampled_from(SIZES), st.integers(1, 3000), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_largest_equals_a_full_sort(seed: int, size: int, count: int, ties: bool, masked: bool) -> None:
    values = draw_logits(seed, size, ties=ties)
    if masked:
        values[np.random.default_rng(seed).random(size) < 0.9] = -np.inf
    count = min(count, size)
    expected = np.argsort(-values.astype(np.float64), kind="stable")[:count]
    assert largest(values, count).tolist() == expected.tolist()


@given(st.integers(0, 2**32), st.sampled_from((1, 50, 5000, 30000)), st.floats(0, 1.01), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_smallest_keys_are_taken_until_their_weights_reach_a_sum(
    seed: int, size: int, share: float, ties: bool, outlier: bool
) -> None:
    keys = draw_logits(seed, size, ties=ties)
    keys[-1] = 1e20 if outlier else keys[-1]
    weights = np.random.default_rng(seed).integers(1, 4, size).astype(np.float32)  # sums are exact
    wanted = float(np.floor(share * float(weights.sum()))) - 0.5
    order = np.argsort(keys, kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1
    assert smallest_reaching(keys, weights, wanted).tolist() == sorted(order[:count].tolist())


@given(
    st.integers(0, 2**32),
    st.sampled_from(SIZES),
    st.sampled_from((0.0, 0.05, 1.0, 4.0)),
    st.sampled_from((0, 1, 5, 40, 2000)),
    st.sampled_from((1.0, 0.2, 0.9, 0.99)),
    st.sampled_from((1.0, 0.1, 0.9, 0.99)),
    st.sampled_from((0.0, 0.05, 0.5)),
)
@settings(deadline=None, max_examples=100)
def test_cuts_keep_what_the_naive_ones_keep(
    seed: int, size: int, spread: float, top_k: int, typical_p: float, top_p: float, min_p: float
) -> None:
    values = draw_logits(seed, size, spread=spread)
    sampling = Sampling(top_k=top_k, typical_p=typical_p, top_p=top_p, min_p=min_p)
    expected = naive_cut(values, sampling)
    kept = cut(values, sampling)
    got = range(size) if kept is None else kept.tolist()
    assert list(got) == sorted(expected)


@given(
    st.integers(0, 2**32),
    st.sampled_from(SIZES),
    st.sampled_from((0.3, 1.0, 2.0)),
    st.sampled_from((0, 40)),
    st.sampled_from((0.0, 0.5, 0.999)),
    st.integers(0, 1000),
)
@settings(deadline=None, max_examples=100)
def test_a_draw_is_an_inverse_of_the_cumulative_distribution(
    seed: int, size: int, temperature: float, top_k: int, masked: float, position: int
) -> None:
    values = draw_logits(seed, size)
    mask = np.random.default_rng(seed).random(size) >= masked
    mask[seed % size] = True
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    token = run(values.copy(), sampling, position=position, mask=mask if masked else None).id

    allowed = np.flatnonzero(mask) if masked else np.arange(size)
    kept = allowed[sorted(naive_cut(values[allowed], sampling))]
    assert token in kept
    width = 1024 if len(kept) >= 1024 and not top_k and (not masked or len(allowed) * 16 >= size) else len(kept)
    if width == len(kept):  # a large vocabulary is summed in another order; see the next test
        sums = np.cumsum(softmax(values[kept] / np.float32(temperature)))
        chance = uniform(seed, 0, position)
        assume(not np.any(np.abs(sums - chance) < 1e-4))
        assert token == kept[np.searchsorted(sums, chance, side="right")]


@pytest.mark.parametrize("size", [5, 1024, 1500, 9000])
def test_draws_follow_the_distribution(size: int) -> None:
    values = draw_logits(7, size, spread=0.0)
    values[[0, size // 2, size - 1]] += np.float32(math.log(size))
    sampling = Sampling(seed=11)
    count = 3000
    got = np.bincount([run(values, sampling, position=at).id for at in range(count)], minlength=size)
    heavy = softmax(values)[0]
    spread = math.sqrt(count * heavy * (1 - heavy))
    assert all(abs(got[token] - count * heavy) < 4 * spread for token in (0, size // 2, size - 1))
    light = np.delete(got, [0, size // 2, size - 1])
    assert light.max() < 12 + 4 * light.mean()
    assert np.count_nonzero(light[: len(light) // 2]) and np.count_nonzero(light[len(light) // 2 :])


def test_randomness_depends_on_seed_branch_and_position_only() -> None:
    values = draw_logits(3, 2000, spread=0.5)
    again = [run(values.copy(), Sampling(seed=5), position=at).id for at in range(30)]
    assert again == [run(values.copy(), Sampling(seed=5), position=at).id for at in range(30)]
    assert again[10:] == [run(values.copy(), Sampling(seed=5), position=at).id for at in range(10, 30)]
    assert again != [run(values.copy(), Sampling(seed=6), position=at).id for at in range(30)]
    assert again != [run(values.copy(), Sampling(seed=5), position=at, branch=1).id for at in range(30)]


def test_uniform_numbers_are_spread_evenly_and_pinned() -> None:
    numbers = np.array([uniform(seed, branch, at) for seed in (0, 1) for branch in range(8) for at in range(500)])
    assert len(set(numbers)) == len(numbers)
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 43.8  # chi-square, 19 degrees of freedom, one in a thousand
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05
    assert uniform(-1, 0, 0) != uniform(2**64, 0, 0) == uniform(0, 0, 0)
    # A change of these breaks the promise that an answer goes on after an update of Nimbos as it would have.
    assert (uniform(0, 0, 0), uniform(42, 3, 1000)) == PINNED


def test_greedy_takes_the_first_of_the_largest_and_leaves_the_logits_alone() -> None:
    values = np.array([1, 5, 5, 2], dtype=np.float32)
    values.setflags(write=False)
    assert run(values, Sampling(temperature=0)).id == 1
    assert run(values, Sampling(temperature=0), mask=np.array([1, 1, 0, 0], bool), banned=(0,)).id == 1


@given(st.integers(0, 2**32), st.sampled_from(SIZES), st.floats(0, 1), st.integers(0, 20))
@settings(deadline=None)
def test_greedy_takes_the_best_that_is_allowed(seed: int, size: int, share: float, bans: int) -> None:
    values = draw_logits(seed, size)
    generator = np.random.default_rng(seed)
    mask = generator.random(size) < share
    banned = tuple(int(token) for token in np.argsort(-values)[:bans])
    expected = values.copy()
    expected[~mask] = -np.inf
    expected[list(banned)] = -np.inf
    if expected.max() == -np.inf:
        with pytest.raises(AnswerFailed, match="allowed"):
            run(values, Sampling(temperature=0), mask=mask, banned=banned)
    else:
        assert run(values, Sampling(temperature=0), mask=mask, banned=banned).id == expected.argmax()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_hopeless_logits_fail_clearly(temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=5)
    for bad in (np.nan, np.inf):
        values = draw_logits(1, 5000)
        values[4990] = bad
        with pytest.raises(AnswerFailed, match="finite"):
            run(values, sampling)
    with pytest.raises(AnswerFailed, match="allowed"):
        run(np.full(5000, -np.inf, np.float32), sampling)
    for size in (3, 5000):
        with pytest.raises(AnswerFailed, match="allowed"):
            run(draw_logits(1, size), sampling, mask=np.zeros(size, bool))


def test_penalties_and_bias() -> None:
    values = np.array([2.0, -2.0, 1.0, 0.0], dtype=np.float32)
    recent = RecentCounts([0, 0, 1], window=8)
    sampling = Sampling(
        temperature=0,
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
        logit_bias={3: 0.125, 99: 50.0, -1: 50.0},
        logprobs=0,
    )
    picked = run(values, sampling, recent=recent)
    assert values.tolist() == [2.0 / 2 - 2 * 0.25 - 0.5, -2.0 * 2 - 0.25 - 0.5, 1.0, 0.125]
    assert picked.id == 2


def test_recent_counts_forget_what_left_the_window() -> None:
    recent = RecentCounts([1, 1, 2], window=3)
    for token in (3, 3):
        recent.append(token)
    assert dict(zip(*(part.tolist() for part in recent.arrays()), strict=True)) == {2: 1.0, 3: 2.0}


@pytest.mark.parametrize("size", [6, 9000])
def test_logprobs_are_the_models_own(size: int) -> None:
    values = draw_logits(9, size)
    expected = np.log(softmax(values))
    best = np.argsort(-values, kind="stable")[:3]
    mask = np.ones(size, bool)
    mask[best[0]] = False
    sampling = Sampling(temperature=0, logprobs=3, logit_bias={int(best[1]): -100.0})
    picked = run(values, sampling, mask=mask, banned=(int(best[0]),))
    assert picked.id == best[2]
    assert picked.logprob is not None
    assert picked.logprob.chosen.logprob == pytest.approx(expected[best[2]], abs=1e-4)
    assert [entry.id for entry in picked.logprob.top] == best.tolist()
    assert [entry.logprob for entry in picked.logprob.top] == pytest.approx(expected[best].tolist(), abs=1e-4)
    assert picked.logprob.top[0].piece == str(best[0]).encode()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("forbidden", ["mask", "banned"])
def test_what_may_not_come_has_its_logprob_all_the_same(forbidden: str, temperature: float) -> None:
    values = draw_logits(9, 100)
    best, expected = int(values.argmax()), np.log(softmax(values)).max()
    options = {"mask": np.arange(100) != best} if forbidden == "mask" else {"banned": (best,)}
    picked = run(values, Sampling(temperature=temperature, logprobs=1), **options)
    assert picked.id != best
    assert picked.logprob is not None
    assert picked.logprob.top[0].id == best
    assert picked.logprob.top[0].logprob == pytest.approx(expected, abs=1e-4)


def test_a_cold_temperature_is_nearly_greedy_and_extreme_logits_are_fine() -> None:
    values = np.array([-1e30, 3.0, 3.5, 1e30], dtype=np.float32)
    assert run(values.copy(), Sampling(temperature=1e-9)).id == 3
    assert run(values.copy(), Sampling(temperature=1.0, top_p=0.5, typical_p=0.5, min_p=0.1)).id == 3
    assert run(values.copy(), Sampling(temperature=1e-9), banned=(3,)).id == 2


@pytest.mark.parametrize("strange", [-1.0, math.nan, math.inf, 1e300])
def test_no_number_in_a_request_breaks_a_draw(strange: float) -> None:
    values = draw_logits(1, 2000)
    mask = np.arange(2000) % 2 == 0
    for name in ("temperature", "top_p", "typical_p", "min_p"):
        token = run(values.copy(), Sampling(**{name: strange}), mask=mask).id
        assert token % 2 == 0
    assert run(values.copy(), Sampling(top_k=10**30, penalty_window=10**30, presence_penalty=1.0)).id < 2000
    assert RecentCounts([5], window=10**30).arrays()[0].tolist() == [5]

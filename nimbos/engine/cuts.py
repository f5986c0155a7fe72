"""Which tokens remain candidates: top_k, typical_p, top_p, min_p. Pure functions on numpy arrays.

Every function takes `values` (logits, at least one finite, no nan) and `kept`, the ascending indices that remain so far
or None for all, and returns ascending indices. Of equal values the lower index counts as the larger. At least one
remains. None of them sorts a whole vocabulary: that costs 25 ms at 152,000 tokens and would stall every other ask.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nimbos.types import Sampling

Values = NDArray[np.float32]
Ids = NDArray[np.intp]

COLUMNS = 4096  # groups of a large vocabulary whose maxima are compared; down a column numpy is eight times faster
BUCKETS = 4096
HEADS = (128, 1024)  # top_p is first tried on so many
SMALL = 4096  # up to here sorting is cheapest


def cut(values: Values, sampling: Sampling) -> Ids | None:
    """Applies the cuts that are on, in the order of `sampler.py`; None when none is."""
    kept: Ids | None = None
    if 0 < sampling.top_k < len(values):
        kept = np.sort(largest(values, sampling.top_k))
    if sampling.typical_p < 1.0:
        kept = _typical(values, kept, sampling.typical_p)
    if sampling.top_p < 1.0:
        kept = _nucleus(values, kept, sampling.top_p)
    if sampling.min_p > 0.0:
        kept = _near_the_best(values, kept, min(sampling.min_p, 1.0))
    return kept


def largest(values: Values, count: int) -> Ids:
    """Indices of the `count` largest, greatest first.

    The count-th largest of the columns' maxima is a floor under which nothing can be among the `count` largest, so
    only the columns that reach it are looked at.
    """
    size = len(values)
    grid = values[: size // COLUMNS * COLUMNS].reshape(-1, COLUMNS)
    if size <= SMALL or count > COLUMNS // 4:
        return _sorted(values, _floor_candidates(values, count), count)
    maxima = grid.max(axis=0)
    floor = np.partition(maxima, COLUMNS - count)[COLUMNS - count]
    columns = np.flatnonzero(maxima >= floor)
    rows, at = np.nonzero(grid[:, columns] >= floor)
    rest = np.flatnonzero(values[grid.size :] >= floor) + grid.size
    return _sorted(values, np.concatenate((np.sort(rows * COLUMNS + columns[at]), rest)), count)


def _floor_candidates(values: Values, count: int) -> Ids:
    if count >= len(values) or len(values) <= SMALL:
        return np.arange(len(values))
    return np.flatnonzero(values >= np.partition(values, len(values) - count)[len(values) - count])


def _sorted(values: Values, candidates: Ids, count: int) -> Ids:
    """`candidates` are ascending, so that a stable sort keeps the lower of equals first."""
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]


def _typical(values: Values, kept: Ids | None, share: float) -> Ids:
    """The tokens whose surprise is nearest to the expected one, together at least `share` (arXiv:2202.00666)."""
    kept, values = _possible(values, kept)
    relative = values - values.max()
    weights = np.exp(relative)
    total = float(weights.sum(dtype=np.float64))
    expected = float((weights * relative).sum(dtype=np.float64)) / total
    return _of(kept, smallest_reaching(np.abs(relative - np.float32(expected)), weights, share * total))


def _nucleus(values: Values, kept: Ids | None, share: float) -> Ids:
    """The likeliest tokens that together have at least `share`."""
    kept, values = _possible(values, kept)
    relative = values - values.max()
    weights = np.exp(relative)
    wanted = share * float(weights.sum(dtype=np.float64))
    for size in HEADS if len(values) > SMALL else ():
        head = largest(values, size)
        reached = np.cumsum(weights[head], dtype=np.float64)
        if reached[-1] >= wanted:
            return _of(kept, np.sort(head[: int(np.searchsorted(reached, wanted)) + 1]))
    return _of(kept, smallest_reaching(-relative, weights, wanted))


def _near_the_best(values: Values, kept: Ids | None, share: float) -> Ids:
    """The tokens at least `share` times as likely as the likeliest that remains."""
    candidates = values if kept is None else values[kept]
    return _of(kept, np.flatnonzero(candidates >= candidates.max() + np.float32(math.log(share))))


def _possible(values: Values, kept: Ids | None) -> tuple[Ids | None, Values]:
    """What remains, with its values, without those that are -inf: their surprise has no number."""
    if kept is not None:
        values = values[kept]
    if np.isfinite(values.min()):
        return kept, values
    finite = np.flatnonzero(np.isfinite(values))
    return _of(kept, finite), values[finite]


def _of(kept: Ids | None, chosen: Ids) -> Ids:
    return chosen if kept is None else kept[chosen]


def smallest_reaching(keys: Values, weights: Values, wanted: float) -> Ids:
    """Ascending indices of the smallest `keys` whose `weights` reach `wanted`, and at least one.

    A histogram of the keys tells in which bucket the sum is reached; only that bucket is looked at again.
    """
    here: Ids | None = None  # where `keys` and `weights` came from
    sure: list[Ids] = []
    while len(keys) > SMALL:
        low, high = float(keys.min()), float(keys.max())
        if not high > low:
            break
        bucket = ((keys - np.float32(low)) * np.float32((BUCKETS - 1) / (high - low))).astype(np.int32)
        running = np.cumsum(np.bincount(bucket, weights, BUCKETS))
        at = min(int(np.searchsorted(running, wanted)), int(np.searchsorted(running, running[-1])))
        inside = np.flatnonzero(bucket == at)
        if len(inside) == len(keys):
            break
        sure.append(_of(here, np.flatnonzero(bucket < at)))
        wanted -= float(running[at - 1]) if at else 0.0
        here, keys, weights = _of(here, inside), keys[inside], weights[inside]
    order = np.argsort(keys, kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), wanted)) + 1
    return np.sort(np.concatenate((*sure, _of(here, order[:count]))))

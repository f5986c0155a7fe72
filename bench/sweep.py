"""The peer's best flags: one varied at a time on a quarter-size workload, at most ten runs.

Honest comparison means the peer as its users would tune it for this very workload, not its defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence

from bench.abba import Arm, Measures, once

Flags = tuple[str, ...]
MOST_RUNS = 10


async def best_flags(
    starts: Sequence[Flags],
    variants: Sequence[Flags],
    *,
    measure: Callable[[Flags], Awaitable[Measures]],
    score: Callable[[Measures], float],
    limit_s: float,
) -> list[tuple[float, Flags]]:
    """First each of `starts`, then the best of them with each of `variants` added, then with the best two variants
    together. Returns (score, flags), lowest score first; a run that fails or takes too long is left out.
    """
    tried: dict[Flags, float] = {}

    async def attempt(flags: Flags) -> None:
        if flags in tried or len(tried) == MOST_RUNS:
            return
        arm = Arm(name=f"peer {' '.join(flags)}", run=lambda: measure(flags))
        try:
            tried[flags] = score(await once(arm, limit_s=limit_s, label="sweep"))
        except (TimeoutError, RuntimeError) as error:
            tried[flags] = float("inf")
            print(f"sweep {arm.name}: {error or 'too slow'}", file=sys.stderr, flush=True)

    for flags in starts:
        await attempt(flags)
    base = min(tried, key=lambda flags: tried[flags])
    for variant in variants:
        await attempt((*base, *variant))
    better = sorted(
        (v for v in variants if tried.get((*base, *v), float("inf")) < tried[base]), key=lambda v: tried[base + v]
    )
    if len(better) > 1 and better[0][0] != better[1][0]:
        await attempt((*base, *better[0], *better[1]))
    return sorted((value, flags) for flags, value in tried.items() if value < float("inf"))

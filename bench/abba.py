"""Interleaved runs: A B B A, or with more arms A B C C B A, so that a drift of the machine falls on all alike."""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

Measures = dict[str, float]
Runs = dict[str, list[Measures]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """`run` starts its own server, measures once and stops it."""

    name: str
    run: Callable[[], Awaitable[Measures]]


async def interleave(arms: Sequence[Arm], *, repeats: int, limit_s: float, one_pass: bool = False) -> Runs:
    """Each arm twice for each repeat, or once in `one_pass`. Raises: TimeoutError when a run takes longer than
    `limit_s`."""
    runs: Runs = {arm.name: [] for arm in arms}
    order = [*arms] if one_pass else [*arms, *reversed(arms)] * repeats
    for number, arm in enumerate(order, 1):
        runs[arm.name].append(await once(arm, limit_s=limit_s, label=f"{number}/{len(order)}"))
    return runs


async def once(arm: Arm, *, limit_s: float, label: str = "") -> Measures:
    async with asyncio.timeout(limit_s):
        measures = await arm.run()
    shown = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
    print(f"{label} {arm.name}: {shown}", file=sys.stderr, flush=True)
    return measures


def medians(runs: Runs) -> dict[str, Measures]:
    return {
        arm: {name: statistics.median(run[name] for run in measured) for name in measured[0]}
        for arm, measured in runs.items()
        if measured
    }

"""Memory: are the cells of a shared prefix there once, and does the resident memory stay flat over many mixed asks?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial

import numpy as np

from bench import fanout, ours
from bench.abba import Arm, Measures, Runs, once
from bench.load import Client, Question, client_of
from bench.report import Finding, publish
from bench.server import Server, total
from bench.setup import Setup, from_arguments, parser, where

CELLS_USED = "cells_used"  # how the name of our gauge ends
ASKS, CLIENTS, CELLS = 1000, 8, 8192
SETTLED = 0.2  # share of the asks until which buffers and caches may still fill up
MIB = 1024 * 1024


async def run_shared(setup: Setup, work: fanout.Work) -> Measures:
    """Fan-out once, with the cells watched."""
    home = ours.make_home(setup, "shared", cells=work.branches * work.longest, context_tokens=work.longest + 64)
    async with ours.serving(setup, home=home) as server:
        seen = [await _cells_used(server)]
        watch = asyncio.create_task(_watch(server, seen))
        try:
            measures = await fanout.run(setup, server, work)
        finally:
            watch.cancel()
        seen.append(await _cells_used(server))
    return measures | {"most cells used": max(seen), "sum of all branches": float(work.branches * work.longest)}


async def _watch(server: Server, seen: list[float]) -> None:
    while True:
        seen.append(await _cells_used(server))
        await asyncio.sleep(0.25)


async def _cells_used(server: Server) -> float:
    used = total(await server.counters(), CELLS_USED)
    if used is None:
        raise RuntimeError(f"`/metrics` has no gauge that ends with {CELLS_USED}.")
    return used


async def run_mixed(setup: Setup) -> Measures:
    """Resident memory of server and engine together, sampled after each ask, in the settled part of the run."""
    home = ours.make_home(setup, "mixed", cells=CELLS, context_tokens=1024)
    samples: list[int] = []
    async with ours.serving(setup, home=home) as server, client_of(server, limit_s=setup.limit_s) as client:
        questions = _mixed(setup, setup.scaled(ASKS))
        await asyncio.gather(*(_take_turns(server, client, questions, samples) for _ in range(CLIENTS)))
    settled = samples[int(len(samples) * SETTLED) :]
    tenth = max(1, len(settled) // 10)
    first, last = (float(np.median(part)) for part in (settled[:tenth], settled[-tenth:]))
    return {
        "asks": float(len(samples)),
        "resident MiB, settled": first / MIB,
        "resident MiB, end": last / MIB,
        "growth MiB": (last - first) / MIB,
        "left early": float(sum(answer.question.leave_after is not None for answer in client.answers)),
    }


async def _take_turns(server: Server, client: Client, questions: Iterator[Question], samples: list[int]) -> None:
    """Each client takes the next question as soon as it is free."""
    for question in questions:
        answer = await client.ask(question)
        if answer.error:
            raise RuntimeError(f"ask {len(samples)} failed: {answer.error}")
        samples.append(server.resident_bytes())


def _mixed(setup: Setup, count: int) -> Iterator[Question]:
    """Short and long, shared and new, one choice and two, greedy and not; each fifth client leaves early."""
    random = np.random.default_rng(9)
    shared = [setup.words.prompt(256, seed=(10, number)) for number in range(6)]
    for number in range(count):
        head = shared[int(random.integers(len(shared)))] if random.random() < 0.4 else ()
        tail = setup.words.prompt(int(random.integers(8, 256)), seed=(11, number))
        extra = {"temperature": 0.8, "n": 2, "seed": number} if random.random() < 0.2 else {}
        leave_after = int(random.integers(1, 8)) if random.random() < 0.2 else None
        out = int(random.integers(4, 40))
        yield Question(prompt=head + tail, out_tokens=out, extra=extra, leave_after=leave_after)


async def measure(setup: Setup) -> None:
    work = fanout.Work().quarter() if setup.quick else fanout.Work()
    place = where(setup)
    arms = [
        Arm(name="fan-out", run=partial(run_shared, setup, work)),
        Arm(name="mixed asks", run=partial(run_mixed, setup)),
    ]
    runs: Runs = {arm.name: [await once(arm, limit_s=setup.limit_s)] for arm in arms}
    shared, mixed = (runs[arm.name][0] for arm in arms)
    once_each = work.shared + work.branches * (work.own + work.out)
    findings = [
        Finding(
            name=f"most cells used ÷ {once_each} (the shared prefix once)",
            value=shared["most cells used"] / once_each,
            at_most=1.02,
        ),
        Finding(
            name=f"growth of resident memory over the last {1 - SETTLED:.0%} of {mixed['asks']:.0f} asks, %",
            value=100 * mixed["growth MiB"] / mixed["resident MiB, settled"],
            at_most=2,
        ),
    ]
    publish(setup, title="Memory", runs=runs, findings=findings, place=place)


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

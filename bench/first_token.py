"""First token: from starting `nimbos up`, with the model on disk, to the first token of an answer."""

from __future__ import annotations

import asyncio
import time
from functools import partial

from bench import ours
from bench.abba import Arm, Measures, once
from bench.load import Question, client_of
from bench.report import Finding, publish
from bench.setup import Setup, from_arguments, parser, where

STARTS = 5
AIM_S = 3.0


async def run(setup: Setup) -> Measures:
    """The file is in the page cache from the second start on, as after any use of the machine's own model."""
    home = ours.make_home(setup, "first-token")
    start = time.monotonic()
    async with ours.serving(setup, home=home) as server, client_of(server, limit_s=60) as client:
        answer = (await client.ask(Question(prompt=setup.words.prompt(16, seed=(0,)), out_tokens=4))).require()
        return {"ready s": server.ready_s, "first token s": answer.arrivals[0] - start}


async def measure(setup: Setup) -> None:
    place = where(setup)
    arm = Arm(name="nimbos up", run=partial(run, setup))
    runs = {arm.name: [await once(arm, limit_s=setup.limit_s) for _ in range(STARTS)]}
    times = sorted(measures["first token s"] for measures in runs[arm.name])
    findings = [
        Finding(name="first token, median, s", value=times[len(times) // 2], at_most=AIM_S),
        Finding(name="first token, slowest, s", value=times[-1]),
    ]
    publish(setup, title="First token of `nimbos up`", runs=runs, findings=findings, place=place)


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

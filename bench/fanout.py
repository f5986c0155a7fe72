"""Fan-out: many branches of one context at once, cold. Who computes the shared part once, and who batches the rest?"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from functools import partial

from bench import limits, ours, peer
from bench.abba import Arm, Measures, interleave, medians
from bench.load import Question, client_of
from bench.report import Finding, publish
from bench.server import Server
from bench.setup import Setup, from_arguments, parser, where
from bench.sweep import Flags, best_flags

MANY_SLOTS: Flags = ("-np", "16", "-kvu")
STARTS: tuple[Flags, ...] = tuple(("-np", str(count)) for count in (1, 2, 4, 8, 16))
VARIANTS: tuple[Flags, ...] = (("-kvu",), ("-b", "64"), ("-b", "512"), ("--cache-ram", "0"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """In tokens, but for `branches`."""

    branches: int = 16
    shared: int = 2048
    own: int = 64
    out: int = 64

    def quarter(self) -> Work:
        """As many branches, each a quarter as long."""
        return Work(branches=self.branches, shared=self.shared // 4, own=self.own // 4, out=self.out // 4)

    @property
    def longest(self) -> int:
        return self.shared + self.own + self.out

    @property
    def least_computed(self) -> int:
        return self.shared + self.branches * self.own


async def run(setup: Setup, server: Server, work: Work) -> Measures:
    async with client_of(server, limit_s=setup.limit_s) as client:
        await client.warm_up(setup.words.prompt(16, seed=(0,)))
        shared = setup.words.prompt(work.shared, seed=(1,))
        answers = await client.burst(
            [
                Question(
                    prompt=shared + setup.words.prompt(work.own, seed=(2, branch)),
                    out_tokens=work.out,
                    headers={"x-nimbos-class": "agent"},
                )
                for branch in range(work.branches)
            ]
        )
    start = min(answer.asked_s for answer in answers)
    return {
        "makespan s": max(answer.finished_s or 0.0 for answer in answers) - start,
        "mean first token s": statistics.fmean(answer.first_token_s or 0.0 for answer in answers),
        "prompt tokens computed": float(sum(answer.computed_tokens for answer in answers)),
    }


async def run_ours(setup: Setup, work: Work) -> Measures:
    cells = work.branches * (work.longest + 256)  # what the peer gets; ours fills a part of it
    home = ours.make_home(setup, "fanout", cells=cells, context_tokens=work.longest + 64)
    async with ours.serving(setup, home=home) as server:
        return await run(setup, server, work)


async def run_peer(setup: Setup, work: Work, flags: Flags) -> Measures:
    async with peer.serving(setup, flags, tokens_per_slot=work.longest + 64) as server:
        return await run(setup, server, work)


async def rivals(setup: Setup, work: Work) -> tuple[list[Flags], list[str]]:
    """The flags to measure against, best first, and notes on how they were found."""
    if setup.peer_flags:
        return list(setup.peer_flags), ["the peer's flags were given, not swept"]
    found = await best_flags(
        STARTS,
        VARIANTS,
        measure=lambda flags: run_peer(setup, work.quarter(), flags),
        score=lambda measures: measures["makespan s"],
        limit_s=setup.limit_s,
    )
    listed = ", ".join(f"`{' '.join(flags)}` {seconds:.3g} s" for seconds, flags in found)
    return [flags for _, flags in found[:2]], [f"sweep on a quarter of the size, best first: {listed}"]


async def measure(setup: Setup) -> None:
    work = Work().quarter() if setup.quick else Work()
    place = where(setup)
    times = await limits.measured(setup)
    best, notes = await rivals(setup, work)
    flag_sets = list(dict.fromkeys([*best, MANY_SLOTS]))
    arms = [Arm(name="ours", run=partial(run_ours, setup, work))]
    arms += [Arm(name=f"peer {' '.join(f)}", run=partial(run_peer, setup, work, f)) for f in flag_sets]
    runs = await interleave(arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    middle = {arm: measures["makespan s"] for arm, measures in medians(runs).items()}
    peers = {arm: seconds for arm, seconds in middle.items() if arm != "ours"}
    findings = [
        Finding(
            name="makespan, `-np 16 -kvu` ÷ ours",
            value=peers[f"peer {' '.join(MANY_SLOTS)}"] / middle["ours"],
            at_least=6,
        ),
        Finding(name="makespan, best of the peer ÷ ours", value=min(peers.values()) / middle["ours"], at_least=1.3),
        Finding(
            name=f"prompt tokens computed ÷ {work.least_computed} (every token once)",
            value=medians(runs)["ours"]["prompt tokens computed"] / work.least_computed,
            at_most=1,
        ),
    ]
    if times is not None:
        limit_s = times.fan_out_ms(shared=work.shared, branches=work.branches, own=work.own, out=work.out) / 1000
        findings.append(Finding(name="limit from t(rows, cells) ÷ ours", value=limit_s / middle["ours"], at_least=0.9))
        notes += [f"limit: {limit_s:.2f} s", times.shown()]
    publish(setup, title=f"Fan-out: {work}", runs=runs, findings=findings, place=place, notes=notes)


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

"""Many agents that share a program: how long do they take, and how much of the prompt is computed twice?

Each agent's context begins with the same program; turn by turn it grows by what a tool said and by what the model said,
and between turns it waits for its tool. The same agents, with the same lengths and waits, are driven over HTTP against
our engine and against the peer, with equal memory for keys and values. What the model said goes into the next prompt as
so many other ids, on both sides: neither gives the ids back, so those tokens are computed by both.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from bench import ours, peer
from bench.abba import Arm, Measures, interleave, medians
from bench.load import Client, Question, client_of, percentile
from bench.report import Finding, publish
from bench.server import Server
from bench.setup import Setup, from_arguments, parser, where
from bench.sweep import Flags

AGENT = {"x-nimbos-class": "agent"}
ONE_SLOT: Flags = ("-np", "1")
SLOTS: Flags = ("-np", "8", "-kvu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Lengths are log-normal with these medians; `waits`: (share, mean seconds) of exponential tool times."""

    agents: int = 24
    program: int = 2048
    turns: int = 8
    appended: int = 64
    generated: int = 28
    spread: float = 0.5
    waits: tuple[tuple[float, float], ...] = ((0.70, 0.1), (0.25, 1.0), (0.05, 10.0))
    cells: int = 24_576

    @property
    def slot_tokens(self) -> int:
        """As long as one agent gets, with room for the log-normal's tail."""
        return self.program + 4 * self.turns * (self.appended + self.generated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    appended: int
    generated: int
    wait_s: float


def turns_of(work: Work, agent: int) -> list[Turn]:
    """The same for the same agent, whatever serves it."""
    random = np.random.default_rng((11, agent))
    shares = [share for share, _ in work.waits]
    found = []
    for _ in range(work.turns):
        lengths = [
            int(np.clip(round(median * random.lognormal(0.0, work.spread)), 1, 4 * median))
            for median in (work.appended, work.generated)
        ]
        mean_s = work.waits[int(random.choice(len(shares), p=shares))][1]
        found.append(Turn(appended=lengths[0], generated=lengths[1], wait_s=float(random.exponential(mean_s))))
    return found


async def run(setup: Setup, server: Server, work: Work) -> Measures:
    program = setup.words.prompt(work.program, seed=(12,))
    async with client_of(server, limit_s=setup.limit_s) as client:
        await client.warm_up(setup.words.prompt(16, seed=(0,)))
        client.answers.clear()
        began = time.monotonic()
        took = await asyncio.gather(*(_agent(setup, client, work, program, n) for n in range(work.agents)))
        makespan = time.monotonic() - began
    computed = sum(answer.computed_tokens for answer in client.answers)
    turns = [turn for agent in range(work.agents) for turn in turns_of(work, agent)]
    last = [turns_of(work, agent)[-1].generated for agent in range(work.agents)]
    least = work.program + sum(turn.appended + turn.generated for turn in turns) - sum(last)
    return {
        "mean completion s": statistics.mean(took),
        "p95 completion s": percentile(list(took), 95),
        "makespan s": makespan,
        "prefill amplification": computed / least,
        "mean first token s": statistics.mean(answer.first_token_s or 0.0 for answer in client.answers),
    }


async def _agent(setup: Setup, client: Client, work: Work, program: tuple[int, ...], number: int) -> float:
    began = time.monotonic()
    context = program
    for at, turn in enumerate(turns_of(work, number)):
        context += setup.words.prompt(turn.appended, seed=(13, number, at))
        question = Question(prompt=context, out_tokens=turn.generated, headers=AGENT)
        (await client.ask(question)).require()
        context += setup.words.prompt(turn.generated, seed=(14, number, at))
        await asyncio.sleep(turn.wait_s)
    return time.monotonic() - began


async def run_ours(setup: Setup, work: Work) -> Measures:
    home = ours.make_home(setup, "agents", cells=work.cells, context_tokens=work.slot_tokens)
    async with ours.serving(setup, home=home) as server:
        return await run(setup, server, work)


async def run_peer(setup: Setup, work: Work, flags: Flags) -> Measures:
    async with peer.serving(setup, flags, tokens_per_slot=work.cells // peer.slots(flags)) as server:
        return await run(setup, server, work)


async def measure(setup: Setup) -> None:
    work = Work(agents=12, turns=4, cells=16_384) if setup.quick else Work()
    place = where(setup)
    best = list(setup.peer_flags) or [SLOTS]
    arms = [
        Arm(name="ours", run=partial(run_ours, setup, work)),
        *(Arm(name=f"peer {' '.join(f)}", run=partial(run_peer, setup, work, f)) for f in best),
        Arm(name=f"peer {' '.join(ONE_SLOT)}", run=partial(run_peer, setup, work, ONE_SLOT)),
    ]
    runs = await interleave(arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    middle = medians(runs)
    mine, one = middle["ours"], middle[arms[-1].name]
    many = [middle[arm.name] for arm in arms[1:-1]]
    findings = [
        Finding(name="prefill amplification, ours", value=mine["prefill amplification"], at_most=1.05),
        *(
            Finding(
                name=f"{what}, best of the peer ÷ ours", value=min(p[what] for p in many) / mine[what], at_least=1.5
            )
            for what in ("mean completion s", "p95 completion s")
        ),
        *(
            Finding(name=f"{what}, peer with one slot ÷ ours", value=one[what] / mine[what], at_least=2.5)
            for what in ("mean completion s", "p95 completion s")
        ),
    ]
    publish(setup, title="Agents that share a program", runs=runs, findings=findings, place=place, notes=[str(work)])


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

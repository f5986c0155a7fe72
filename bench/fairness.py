"""Fairness: an account that floods and one that asks now and then, in our engine with fairness on and off (FIFO)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial

from bench import limits, ours
from bench.abba import Arm, Measures, interleave, medians
from bench.load import Answer, Client, Question, client_of, percentile
from bench.report import Finding, publish
from bench.server import Server
from bench.setup import Setup, from_arguments, parser, where

CLASS = {"x-nimbos-class": "agent"}  # both accounts alike: classes are not what is measured here


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One account's: either `clients` that ask without pause, or one ask every `every_s`."""

    account: str
    prompt: int
    out: int
    clients: int = 0
    every_s: float = 0.0


FLOOD = Demand(account="first", prompt=512, out=64, clients=64)
# Asks for about a quarter of what the machine computes, less than its share: of more than that, no order could give it.
POLITE = Demand(account="second", prompt=128, out=24, every_s=5.0)
# Both always have asks waiting; one has twice as many, of twice the size.
GREEDY = Demand(account="first", prompt=512, out=64, clients=48)
MODEST = Demand(account="second", prompt=256, out=32, clients=24)
LENGTH_S = 180.0
LAST_SHARE = 1 / 3  # of the run, in which single asks are answered and none begins: an unanswered one counts as the run
ROOM = 16  # asks that the cells can hold at once: the rest waits in the queue, where order matters most


async def run(setup: Setup, *, demands: tuple[Demand, Demand], fair: bool, length_s: float) -> list[list[Answer]]:
    """The answers of both accounts, also the unfinished ones."""
    longest = max(demand.prompt + demand.out for demand in demands)
    home = ours.make_home(setup, f"fair-{fair}", fair=fair, cells=ROOM * (longest + 64), context_tokens=longest + 64)
    async with ours.serving(setup, home=home) as server, client_of(server, limit_s=length_s + 60) as warm:
        await warm.warm_up(setup.words.prompt(16, seed=(0,)))
        return await _both(setup, server, demands, length_s)


async def _both(setup: Setup, server: Server, demands: tuple[Demand, Demand], length_s: float) -> list[list[Answer]]:
    async with client_of(server, limit_s=length_s + 60) as one, client_of(server, limit_s=length_s + 60) as other:
        clients = (one, other)
        tasks = [
            asyncio.create_task(_loop(setup, client, demand, number))
            for client, demand in zip(clients, demands, strict=True)
            for number in range(demand.clients or int((1 - LAST_SHARE) * length_s // demand.every_s))
        ]
        await asyncio.sleep(length_s)
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        return [client.answers for client in clients]


async def _loop(setup: Setup, client: Client, demand: Demand, number: int) -> None:
    """An endless client, or the `number`-th of the single asks."""
    if demand.every_s:
        await asyncio.sleep(demand.every_s * number)
    turn = 0
    while True:
        seed = (8, len(demand.account), number, turn)
        headers = CLASS | ours.bearer(ours.BY_ACCOUNT[demand.account])
        prompt = setup.words.prompt(demand.prompt, seed=seed)
        (await client.ask(Question(prompt=prompt, out_tokens=demand.out, headers=headers))).require()
        turn += 1
        if demand.every_s:
            return


async def run_flood(setup: Setup, fair: bool) -> Measures:
    length_s = setup.scaled(int(LENGTH_S))
    flood, polite = await run(setup, demands=(FLOOD, POLITE), fair=fair, length_s=length_s)
    latencies = [answer.latency_s if answer.latency_s is not None else float(length_s) for answer in polite]
    waits = [answer.first_token_s if answer.first_token_s is not None else float(length_s) for answer in polite]
    return {
        "polite p95 latency s": percentile(latencies, 95),
        "polite p50 latency s": percentile(latencies, 50),
        "polite p95 first token s": percentile(waits, 95),
        "polite answered": float(sum(answer.finished_s is not None for answer in polite)),
        "total tokens/s": sum(served(answer) for answer in [*flood, *polite]) / length_s,
    }


async def run_backlogged(setup: Setup, times: limits.StepTimes | None, fair: bool) -> Measures:
    length_s = setup.scaled(int(LENGTH_S))
    started = time.monotonic()
    both = await run(setup, demands=(GREEDY, MODEST), fair=fair, length_s=length_s)
    tokens = [float(sum(served(answer) for answer in answers)) for answers in both]
    costs = [sum(cost_ms(answer, times) for answer in answers) for answers in both]
    return {
        "Jain of cost": jain(costs),
        "Jain of tokens": jain(tokens),
        "greedy tokens": tokens[0],
        "modest tokens": tokens[1],
        "took s": time.monotonic() - started,
    }


def served(answer: Answer) -> int:
    """Computed tokens that are known: the prompt's once its first token is out, and those of the answer."""
    if not answer.arrivals:
        return 0
    prompt = answer.computed_tokens if answer.prompt_tokens else len(answer.question.prompt)
    return prompt + answer.received_tokens()


def cost_ms(answer: Answer, times: limits.StepTimes | None) -> float:
    """By the calibrated price of a prompt token in a full step and of an answer token in a batch of 16; without a
    calibration an answer token costs as much as four of the prompt."""
    step, rows = limits.STEP_TOKENS, 16
    prefill = times.at(step, step) / step if times else 1.0
    decode = times.at(rows, rows * step) / rows if times else 4.0
    received = answer.received_tokens()
    return prefill * max(0, served(answer) - received) + decode * received


def jain(shares: list[float]) -> float:
    """1 for equal shares, 1/n when one has all."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else float("nan")


async def measure(setup: Setup) -> None:
    place = where(setup)
    times = await limits.measured(setup)
    flood_arms = [Arm(name=f"flood, {_name(fair)}", run=partial(run_flood, setup, fair)) for fair in (True, False)]
    both_arms = [
        Arm(name=f"backlogged, {_name(fair)}", run=partial(run_backlogged, setup, times, fair))
        for fair in (True, False)
    ]
    runs = await interleave(flood_arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    runs |= await interleave(both_arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    middle = medians(runs)
    fair, fifo = (middle[arm.name] for arm in flood_arms)
    findings = [
        Finding(
            name="polite account's p95 latency, FIFO ÷ fair",
            value=fifo["polite p95 latency s"] / fair["polite p95 latency s"],
            at_least=5,
        ),
        Finding(name="Jain index of served cost, fair", value=middle[both_arms[0].name]["Jain of cost"], at_least=0.95),
        Finding(name="Jain index of served cost, FIFO", value=middle[both_arms[1].name]["Jain of cost"]),
        Finding(
            name="total tokens/s, fair ÷ FIFO", value=fair["total tokens/s"] / fifo["total tokens/s"], at_least=0.97
        ),
    ]
    notes = [f"{demand}" for demand in (FLOOD, POLITE, GREEDY, MODEST)]
    notes += [times.shown()] if times else ["no calibration: an answer token is counted as four of the prompt"]
    publish(setup, title="Fairness", runs=runs, findings=findings, place=place, notes=notes)


def _name(fair: bool) -> str:
    return "fair" if fair else "FIFO"


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

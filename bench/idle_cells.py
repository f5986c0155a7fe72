"""Idle contexts: what do they cost those that run, and how fast do they go on? Our engine writing them out, and not.

Each arm computes as many contexts as it can hold, lets them rest, then runs streams beside them and at last goes on
with each of the contexts. A third arm has no idle contexts at all: faster than that it cannot be.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from functools import partial

from bench import ours
from bench.abba import Arm, Measures, interleave, medians
from bench.load import Answer, Client, Question, client_of, percentile
from bench.report import Finding, publish
from bench.setup import Setup, from_arguments, parser, where

REST_S = 20.0  # an engine without work waits for a few seconds before it tidies up
STREAM_PROMPT, STREAM_OUT = 64, 64
IDLE = {"x-nimbos-class": "agent"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """`contexts` of `tokens` are idle; streams run alone and `streams` at a time, `rounds` times."""

    contexts: int = 8
    tokens: int = 1024
    streams: int = 16
    rounds: int = 3

    @property
    def cells(self) -> int:
        """Room for all of it."""
        return self.contexts * (self.tokens + 64) + 2 * self.streams * (STREAM_PROMPT + STREAM_OUT)


async def run(setup: Setup, work: Work, *, idle: bool, swap_mib: int) -> Measures:
    name = f"idle-{idle}-{swap_mib}"
    home = ours.make_home(setup, name, cells=work.cells, context_tokens=work.tokens + 256, swap_memory_mib=swap_mib)
    async with ours.serving(setup, home=home) as server, client_of(server, limit_s=setup.limit_s) as client:
        await client.warm_up(setup.words.prompt(16, seed=(0,)))
        contexts = [setup.words.prompt(work.tokens, seed=(1, number)) for number in range(work.contexts)]
        for context in contexts if idle else []:
            (await client.ask(Question(prompt=context, out_tokens=1, headers=IDLE))).require()
        await asyncio.sleep(REST_S if idle else 0)
        alone = [await _streams(setup, client, 1, number) for number in range(work.rounds)]
        many = [await _streams(setup, client, work.streams, work.rounds + number) for number in range(work.rounds)]
        resumed = [await _go_on(client, context) for context in contexts]
    return {
        "1 stream, ms a token": statistics.median(_gap_ms(answer) for answers in alone for answer in answers),
        f"{work.streams} streams, ms a token": statistics.median(_gap_ms(a) for answers in many for a in answers),
        "p99 gap ms": 1e3 * percentile([gap for answers in many for a in answers for gap in a.gaps_s], 99),
        "resumed, first token ms": 1e3 * statistics.median(answer.first_token_s or 0.0 for answer in resumed),
        "resumed, cached tokens": statistics.median(float(answer.cached_tokens) for answer in resumed),
    }


async def _streams(setup: Setup, client: Client, count: int, number: int) -> list[Answer]:
    prompts = [setup.words.prompt(STREAM_PROMPT, seed=(2, number, stream)) for stream in range(count)]
    return await client.burst([Question(prompt=prompt, out_tokens=STREAM_OUT) for prompt in prompts])


async def _go_on(client: Client, context: tuple[int, ...]) -> Answer:
    return (await client.ask(Question(prompt=(*context, *context[:8]), out_tokens=1))).require()


def _gap_ms(answer: Answer) -> float:
    """The later half: by then all streams of a burst run."""
    gaps = answer.gaps_s
    return 1e3 * statistics.mean(gaps[len(gaps) // 2 :])


async def measure(setup: Setup) -> None:
    work = Work(contexts=3, streams=4, rounds=1) if setup.quick else Work()
    place = where(setup)
    arms = [
        Arm(name="written out", run=partial(run, setup, work, idle=True, swap_mib=4096)),
        Arm(name="left in the cells", run=partial(run, setup, work, idle=True, swap_mib=0)),
        Arm(name="no idle contexts", run=partial(run, setup, work, idle=False, swap_mib=0)),
    ]
    runs = await interleave(arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    middle = medians(runs)
    out, left, none = (middle[arm.name] for arm in arms)
    many = f"{work.streams} streams, ms a token"
    findings = [
        Finding(
            name="1 stream beside idle contexts, left in ÷ written out",
            value=left["1 stream, ms a token"] / out["1 stream, ms a token"],
        ),
        Finding(name=f"{work.streams} streams, left in ÷ written out", value=left[many] / out[many]),
        Finding(
            name=f"{work.streams} streams, written out ÷ no idle contexts", value=out[many] / none[many], at_most=1.25
        ),
        Finding(
            name="going on, computed again ÷ put back",
            value=none["resumed, first token ms"] / out["resumed, first token ms"],
            at_least=10,
        ),
    ]
    notes = [f"{work}", f"streams of {STREAM_PROMPT} + {STREAM_OUT} tokens; idle for {REST_S:.0f} s"]
    publish(setup, title="Idle contexts", runs=runs, findings=findings, place=place, notes=notes)


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

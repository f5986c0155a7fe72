"""Interactive asks under endless batch load: how long does a person wait, and what does the batch lose?

Arms: ours; ours without the interactive asks; the peer with all slots busy; the peer with one slot kept free in which
the shared prefix is resident (the batch clients name their slots, so they never take that one).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench import limits, ours, peer
from bench.abba import Arm, Measures, interleave, medians
from bench.load import Answer, Client, Question, client_of, percentile
from bench.report import Finding, publish
from bench.server import Server
from bench.setup import Setup, from_arguments, parser, where
from bench.sweep import Flags, best_flags

BATCH, INTERACTIVE = {"x-nimbos-class": "batch"}, {"x-nimbos-class": "interactive"}
STALL_TARGET_S = 0.150
VARIANTS: tuple[Flags, ...] = (
    *(("-b", str(size)) for size in (64, 128, 256, 512)),
    ("-kvu",),
    ("--cache-ram", "0"),
    ("--threads-http", "2"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """`every_s`: between interactive asks, the first after a half of it."""

    clients: int = 8
    batch_in: int = 1024
    batch_out: int = 256
    cached: int = 2048
    new: int = 64
    out: int = 24
    every_s: float = 30.0
    length_s: float = 600.0

    @property
    def longest(self) -> int:
        return max(self.batch_in + self.batch_out, self.cached + self.new + self.out)

    @property
    def cells(self) -> int:
        """Enough for all that can be alive at once."""
        return (self.clients + 1) * (self.longest + 256)

    def shorter(self) -> Work:
        return Work(every_s=self.every_s / 2, length_s=self.length_s / 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Which slot an ask names: the peer's `id_slot` for a batch client's number, and for an interactive ask."""

    batch: bool = False
    interactive: int | None = None

    def of_batch(self, client: int) -> Mapping[str, Any]:
        return {"id_slot": client} if self.batch else {}

    def of_interactive(self) -> Mapping[str, Any]:
        return {} if self.interactive is None else {"id_slot": self.interactive, "cache_prompt": True}


async def run(setup: Setup, server: Server, work: Work, *, places: Places, ask_interactive: bool) -> Measures:
    words = setup.words
    prefix = words.prompt(work.cached, seed=(4,))
    async with (
        client_of(server, limit_s=work.length_s + 60) as batch,
        client_of(server, limit_s=work.length_s) as person,
    ):
        warm = Question(prompt=prefix + words.prompt(4, seed=(5,)), out_tokens=2, extra=places.of_interactive())
        (await person.ask(warm)).require()
        person.answers.clear()
        start = time.monotonic()
        tasks = [asyncio.create_task(_batch_client(setup, batch, work, places, n)) for n in range(work.clients)]
        if ask_interactive:
            tasks += [
                asyncio.create_task(_ask_later(person, delay_s, _question(setup, work, prefix, places, n)))
                for n, delay_s in enumerate(_schedule(work))
            ]
        await asyncio.sleep(work.length_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        _refuse_errors(tasks, [*batch.answers, *person.answers])
    return _measures(work, start, batch.answers, person.answers, expected=len(_schedule(work)) * ask_interactive)


def _schedule(work: Work) -> list[float]:
    """The last one leaves time to be answered."""
    count = int((work.length_s - work.every_s / 2) // work.every_s)
    return [work.every_s * (n + 0.5) for n in range(count)]


def _question(setup: Setup, work: Work, prefix: tuple[int, ...], places: Places, number: int) -> Question:
    prompt = prefix + setup.words.prompt(work.new, seed=(6, number))
    return Question(prompt=prompt, out_tokens=work.out, headers=INTERACTIVE, extra=places.of_interactive())


async def _ask_later(client: Client, delay_s: float, question: Question) -> None:
    await asyncio.sleep(delay_s)
    await client.ask(question)


async def _batch_client(setup: Setup, client: Client, work: Work, places: Places, number: int) -> None:
    """Endless: the next ask follows the last, each with a prompt of its own."""
    turn = 0
    while True:
        prompt = setup.words.prompt(work.batch_in, seed=(7, number, turn))
        extra = places.of_batch(number)
        answer = await client.ask(Question(prompt=prompt, out_tokens=work.batch_out, headers=BATCH, extra=extra))
        answer.require()
        turn += 1


def _refuse_errors(tasks: list[asyncio.Task[None]], answers: list[Answer]) -> None:
    """An ask that was refused is not a slow one. Cut off at the end is fine."""
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    if errors := [answer.error for answer in answers if answer.error]:
        raise RuntimeError(f"{len(errors)} asks failed, the first with {errors[0]}")


def _measures(work: Work, start: float, batch: list[Answer], person: list[Answer], *, expected: int) -> Measures:
    """An ask without a first token counts as the length of the run, also one that could not even be sent."""
    end = start + work.length_s
    out = sum(_tokens_per_event(answer) * sum(arrived <= end for arrived in answer.arrivals) for answer in batch)
    measures = {"batch tokens/s": out / work.length_s}
    if not expected:
        return measures
    first = [answer.first_token_s if answer.first_token_s is not None else work.length_s for answer in person]
    first += [work.length_s] * (expected - len(first))
    gaps = [gap for answer in person for gap in answer.gaps_s]
    finished = [answer for answer in person if answer.finished_s is not None]
    return measures | {
        "p50 first token s": percentile(first, 50),
        "p95 first token s": percentile(first, 95),
        "answered": float(len(finished)),
        "asked": float(expected),
        "prompt tokens computed for each": statistics.fmean(answer.computed_tokens for answer in finished)
        if finished
        else 0.0,
        "p99 gap ms": 1000 * percentile(gaps, 99),
        "gaps within stall target": sum(gap <= STALL_TARGET_S for gap in gaps) / len(gaps) if gaps else 0.0,
    }


def _tokens_per_event(answer: Answer) -> float:
    """Above 1 only where half a character was held back."""
    return answer.output_tokens / len(answer.arrivals) if answer.output_tokens and answer.arrivals else 1.0


async def run_ours(setup: Setup, work: Work, ask_interactive: bool) -> Measures:
    stall_ms = int(STALL_TARGET_S * 1000)
    home = ours.make_home(
        setup, "interactive", cells=work.cells, context_tokens=work.longest + 64, stall_target_ms=stall_ms
    )
    async with ours.serving(setup, home=home) as server:
        return await run(setup, server, work, places=Places(), ask_interactive=ask_interactive)


async def run_busy(setup: Setup, work: Work, flags: Flags) -> Measures:
    async with peer.serving(setup, flags, tokens_per_slot=work.longest + 64) as server:
        return await run(setup, server, work, places=Places(), ask_interactive=True)


async def run_kept(setup: Setup, work: Work, flags: Flags) -> Measures:
    """`--no-cache-idle-slots`: otherwise each launch would clear the idle slot that holds the prefix."""
    places = Places(batch=True, interactive=work.clients)
    async with peer.serving(setup, flags, tokens_per_slot=work.longest + 64) as server:
        return await run(setup, server, work, places=places, ask_interactive=True)


async def kept_flags(setup: Setup, work: Work) -> tuple[list[Flags], list[str]]:
    if setup.peer_flags:
        return list(setup.peer_flags), ["the peer's flags were given, not swept"]
    start = ("-np", str(work.clients + 1), "--no-cache-idle-slots")
    found = await best_flags(
        [start],
        VARIANTS,
        measure=lambda flags: run_kept(setup, work.shorter(), flags),
        score=lambda measures: measures["p95 first token s"],
        limit_s=setup.limit_s,
    )
    listed = ", ".join(f"`{' '.join(flags)}` {seconds:.3g} s" for seconds, flags in found)
    return [flags for _, flags in found[:2]], [f"sweep of a quarter of the time, by p95 first token: {listed}"]


async def measure(setup: Setup) -> None:
    work = Work().shorter() if setup.quick else Work()
    place = where(setup)
    times = await limits.measured(setup)
    best, notes = await kept_flags(setup, work)
    busy = ("-np", str(work.clients))
    arms = [
        Arm(name="ours", run=partial(run_ours, setup, work, True)),
        Arm(name="ours, batch alone", run=partial(run_ours, setup, work, False)),
        Arm(name=f"peer, all slots busy, {' '.join(busy)}", run=partial(run_busy, setup, work, busy)),
        *(Arm(name=f"peer, a slot kept, {' '.join(f)}", run=partial(run_kept, setup, work, f)) for f in best),
    ]
    runs = await interleave(arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    middle = medians(runs)
    mine, alone, all_busy = (middle[arm.name] for arm in arms[:3])
    kept = min(middle[arm.name]["p95 first token s"] for arm in arms[3:])
    wait = mine["p95 first token s"]
    findings = [
        Finding(
            name="p95 first token, peer with all slots busy ÷ ours",
            value=all_busy["p95 first token s"] / wait,
            at_least=10,
        ),
        Finding(name="p95 first token, peer with a slot kept ÷ ours", value=kept / wait, at_least=5),
        Finding(
            name=f"gaps within {STALL_TARGET_S * 1000:.0f} ms, share",
            value=mine["gaps within stall target"],
            at_least=0.99,
        ),
    ]
    if times is not None:
        cost_ms = times.alone_ms(cached=work.cached, new=work.new, out=work.out)
        left = 1 - cost_ms / (work.every_s * 1000)
        findings.append(
            Finding(
                name="batch tokens/s ÷ (batch alone − the interactive asks' calibrated cost)",
                value=mine["batch tokens/s"] / (alone["batch tokens/s"] * left),
                at_least=0.9,
            )
        )
        least_ms = times.prefill_ms(work.new, after=work.cached)
        notes += [
            f"one interactive ask costs {cost_ms:.0f} ms by calibration; no first token comes before {least_ms:.0f} ms",
            times.shown(),
        ]
    title = "Interactive under batch load"
    publish(setup, title=title, runs=runs, findings=findings, place=place, notes=[str(work), *notes])


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

"""Tax: what our engine costs over the bare library, with one stream and with eight, nothing shared."""

from __future__ import annotations

import asyncio
import statistics
from functools import partial

from bench import limits, ours, peer
from bench.abba import Arm, Measures, Runs, interleave, medians
from bench.load import Answer, Question, client_of
from bench.report import Finding, publish
from bench.server import Server, total
from bench.setup import Setup, from_arguments, parser, where
from bench.sweep import Flags

PROMPT, OUT, STREAMS = 128, 256, 8
NO_STALL_TARGET_MS = 60_000
# How our counters' names end: seconds of all steps inside llama_decode, and those that a step takes beside it.
DECODE_SECONDS = ("step_seconds_sum",)
BESIDE_SECONDS = ("overhead_seconds_sum", "overhead_seconds_total")
PEER_FLAGS: tuple[Flags, ...] = (("-np", "1"), ("-np", "8", "-kvu"))


def rate(answers: list[Answer]) -> float:
    """Tokens a second while all streams decode: from the last first token to the first end. An event that holds more
    than one token (half a character was held back) counts as the mean of its answer."""
    start = max(answer.arrivals[0] for answer in answers)
    end = min(answer.arrivals[-1] for answer in answers)
    within = (
        sum(start < arrived <= end for arrived in answer.arrivals) * answer.output_tokens / len(answer.arrivals)
        for answer in answers
    )
    return sum(within) / (end - start)


async def run(setup: Setup, server: Server, streams: int) -> Measures:
    out = setup.scaled(OUT)
    async with client_of(server, limit_s=setup.limit_s) as client:
        await client.warm_up(setup.words.prompt(16, seed=(0,)))
        before = await server.counters()
        questions = [
            Question(prompt=setup.words.prompt(PROMPT, seed=(3, streams, stream)), out_tokens=out)
            for stream in range(streams)
        ]
        answers = await client.burst(questions)
        after = await server.counters()
    measures = {
        "tokens/s": rate(answers),
        "events ÷ tokens": sum(len(answer.arrivals) for answer in answers) / (streams * out),
        "median gap ms": 1000 * statistics.median(gap for answer in answers for gap in answer.gaps_s),
    }
    return measures | _overhead(before, after)


def _overhead(before: dict[str, float], after: dict[str, float]) -> Measures:
    """Of a server that counts it; the peer does not."""
    decode, beside = (_grown(before, after, endings) for endings in (DECODE_SECONDS, BESIDE_SECONDS))
    if decode is None or beside is None:
        return {}
    return {"overhead %": 100 * beside / (decode + beside) if decode else float("nan")}


def _grown(before: dict[str, float], after: dict[str, float], endings: tuple[str, ...]) -> float | None:
    first, last = total(before, *endings), total(after, *endings)
    return None if first is None or last is None else last - first


async def run_ours(setup: Setup, streams: int) -> Measures:
    """Without a stall target: the peer has none, and with it a prompt waits for the rows that run already."""
    home = ours.make_home(setup, "tax", cells=STREAMS * 512, context_tokens=512, stall_target_ms=NO_STALL_TARGET_MS)
    async with ours.serving(setup, home=home) as server:
        return await run(setup, server, streams)


async def run_peer(setup: Setup, streams: int, flags: Flags) -> Measures:
    async with peer.serving(setup, flags, tokens_per_slot=512) as server:
        return await run(setup, server, streams)


async def measure(setup: Setup) -> None:
    place = where(setup)
    times = await limits.measured(setup)
    flag_sets = {1: PEER_FLAGS[0], STREAMS: PEER_FLAGS[1]}
    runs: Runs = {}
    findings: list[Finding] = []
    for streams, flags in flag_sets.items():
        arms = [
            Arm(name=f"ours, {streams} streams", run=partial(run_ours, setup, streams)),
            Arm(name=f"peer {' '.join(flags)}", run=partial(run_peer, setup, streams, flags)),
        ]
        runs |= await interleave(arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
        ours_middle, peer_middle = (medians(runs)[arm.name] for arm in arms)
        findings.append(
            Finding(
                name=f"tokens/s, {streams} streams, ours ÷ peer",
                value=ours_middle["tokens/s"] / peer_middle["tokens/s"],
                at_least=0.97 if streams == 1 else 0.95,
            )
        )
        findings.append(
            Finding(
                name=f"share of a step outside the library, {streams} streams, %",
                value=ours_middle.get("overhead %", float("nan")),
                at_most=3,
            )
        )
    notes = [f"{PROMPT} tokens in, {setup.scaled(OUT)} out, greedy, nothing shared; every prompt is new"]
    if times is not None:
        alone = 1000 / times.at(1, PROMPT + setup.scaled(OUT) // 2)
        together = STREAMS * 1000 / times.at(STREAMS, PROMPT + setup.scaled(OUT) // 2)
        notes += [f"limit: {alone:.1f} tokens/s alone, {together:.1f} with {STREAMS} streams", times.shown()]
    publish(setup, title="Tax", runs=runs, findings=findings, place=place, notes=notes)


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

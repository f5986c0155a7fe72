"""Two models at once: do two engines on the same cores, taking turns, work as fast as one after the other?"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx2

from bench import ours
from bench.abba import Arm, Measures, interleave, medians
from bench.load import Client, Question, client_of
from bench.report import Finding, publish
from bench.server import Server
from bench.setup import Setup, from_arguments, parser, where

PROMPT, OUT, STREAMS = 256, 128, 4


async def run(setup: Setup, second: Path, together: bool) -> Measures:
    """Both models are loaded and warm before the clock starts."""
    home = ours.make_home(setup, f"two-{together}", cells=STREAMS * 512, context_tokens=512)
    for model in (setup.model, second):
        await ours.pull(home, model)
    async with ours.serving(setup, home=home) as server:
        ids = await _model_ids(server)
        sides = [replace(server, model=id) for id in ids]
        async with client_of(sides[0], limit_s=setup.limit_s) as one, client_of(sides[1], limit_s=setup.limit_s) as two:
            for client in (one, two):
                await client.warm_up(setup.words.prompt(16, seed=(0,)))
            start = time.monotonic()
            if together:
                await asyncio.gather(_work(setup, one, 1), _work(setup, two, 2))
            else:
                await _work(setup, one, 1)
                await _work(setup, two, 2)
            seconds = time.monotonic() - start
    tokens = 2 * STREAMS * setup.scaled(OUT)
    return {"makespan s": seconds, "output tokens/s": tokens / seconds}


async def _work(setup: Setup, client: Client, number: int) -> None:
    out = setup.scaled(OUT)
    prompts = (setup.words.prompt(PROMPT, seed=(12, number, stream)) for stream in range(STREAMS))
    await client.burst([Question(prompt=prompt, out_tokens=out) for prompt in prompts])


async def _model_ids(server: Server) -> list[str]:
    async with httpx2.AsyncClient(timeout=30, trust_env=False) as http:
        reply = await http.get(f"{server.url}/v1/models", headers=server.headers)
        reply.raise_for_status()
        ids = [str(model["id"]) for model in reply.json()["data"]]
    if len(ids) != 2:
        raise RuntimeError(f"Two models are needed and the server lists {ids}.")
    return ids


async def measure(setup: Setup, second: Path) -> None:
    place = [*where(setup), f"second model: {second.name}"]
    arms = [
        Arm(name="together", run=partial(run, setup, second, True)),
        Arm(name="one after the other", run=partial(run, setup, second, False)),
    ]
    runs = await interleave(arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    middle = medians(runs)
    ratio = middle["one after the other"]["makespan s"] / middle["together"]["makespan s"]
    findings = [Finding(name="speed together ÷ one after the other", value=ratio, at_least=0.9)]
    notes = [f"each model: {STREAMS} streams of {PROMPT} tokens in, {setup.scaled(OUT)} out, all prompts new"]
    publish(setup, title="Two models at once", runs=runs, findings=findings, place=place, notes=notes)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--second", type=Path, required=True, help="the other model's GGUF file")
    given = options.parse_args()
    asyncio.run(measure(from_arguments(given), given.second.resolve(strict=True)))


if __name__ == "__main__":
    main()

"""Prompt lookup (`engine.guess_tokens`): how much faster is an answer that repeats its context, and what does one cost
that does not?

Two kinds of asks, each alone in the engine, greedy: to write a file of the prompt once more with one name changed, and
to tell a story. Rates are of the answer alone, from its first token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from functools import partial

import httpx2

from bench import ours
from bench.abba import Arm, Measures, interleave, medians
from bench.report import Finding, publish
from bench.server import Server
from bench.setup import Setup, from_arguments, parser, where

GUESS_TOKENS = 16
OUT = 384
REPEATING, FRESH = "repeating tokens/s", "fresh tokens/s"
NAMES = ("orders", "readings", "visits")


def source(name: str) -> str:
    """Some sixty lines of ordinary code."""
    fields = ("count", "total", "largest", "smallest", "latest", "earliest")
    lines = ["class Table:", "    def __init__(self, rows):", "        self.rows = list(rows)", ""]
    for field in fields:
        lines += [
            f"    def {field}_of_{name}(self, key):",
            f'        """The {field} of all {name} under this key."""',
            f"        found = [row['{field}'] for row in self.rows if row['key'] == key]",
            "        if not found:",
            f"            raise KeyError('no {name} under ' + key)",
            f"        return self.reduce_{field}(found)",
            "",
        ]
    return "\n".join(lines)


def repeating(name: str) -> str:
    wanted = "Write this file again, whole, with `rows` renamed to `entries`. Only the code."
    return f"{wanted}\n\n```python\n{source(name)}```"


def fresh(name: str) -> str:
    return f"Tell a long story about somebody who finds old {name} in a lighthouse."


async def run(setup: Setup, guess_tokens: int) -> Measures:
    home = ours.make_home(setup, f"guess-{guess_tokens}", guess_tokens=guess_tokens, cells=4096, context_tokens=2048)
    async with ours.serving(setup, home=home) as server:
        await _rate(server, ["Say yes."], 8)
        measures = {
            REPEATING: await _rate(server, [repeating(name) for name in NAMES], setup.scaled(OUT)),
            FRESH: await _rate(server, [fresh(name) for name in NAMES], setup.scaled(OUT)),
        }
        counters = await server.counters()
    guessed, right = (
        sum(value for name, value in counters.items() if name.startswith(f"nimbos_engine_{kind}_tokens_total"))
        for kind in ("guessed", "guessed_right")
    )
    return {**measures, "guessed": guessed, "right": right}


async def _rate(server: Server, prompts: Sequence[str], most: int) -> float:
    """Tokens a second behind the first token, over all prompts."""
    tokens, seconds = 0, 0.0
    async with httpx2.AsyncClient(timeout=None, trust_env=False, headers=server.headers) as http:
        for prompt in prompts:
            body = {
                "model": server.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": most,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            first = last = 0.0
            async with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if event["choices"] and event["choices"][0]["delta"].get("content"):
                        last = time.monotonic()
                        first = first or last
                    if event.get("usage"):
                        tokens += event["usage"]["completion_tokens"] - 1
            seconds += last - first
    return tokens / seconds if seconds else 0.0


async def measure(setup: Setup) -> None:
    place = where(setup)
    arms = [
        Arm(name="without", run=partial(run, setup, 0)),
        Arm(name=f"up to {GUESS_TOKENS} tokens", run=partial(run, setup, GUESS_TOKENS)),
    ]
    runs = await interleave(arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    middle = medians(runs)
    off, on = middle["without"], middle[f"up to {GUESS_TOKENS} tokens"]
    findings = [
        Finding(name="repeating answers, with ÷ without", value=on[REPEATING] / off[REPEATING], at_least=1.0),
        Finding(name="fresh answers, with ÷ without", value=on[FRESH] / off[FRESH], at_least=0.97),
    ]
    notes = [f"{len(NAMES)} answers of at most {setup.scaled(OUT)} tokens of each kind, greedy, one at a time"]
    publish(setup, title="Guessing ahead", runs=runs, findings=findings, place=place, notes=notes)


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

"""How many agents fit into the memory for keys and values, when they share their program, and when each has a copy?

Contexts of the same size are computed one after the other until the cells have no room for another. What is counted
are those that are really there: at the end each goes on, and must find all of it in the cells. In the other arm each
agent's program has words of its own, so nothing can be shared: full copies, in the same engine. Nothing is written out.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from functools import partial

from bench import ours
from bench.abba import Arm, Measures, interleave, medians
from bench.load import Client, Question, client_of
from bench.report import Finding, publish
from bench.server import Server, total
from bench.setup import Setup, from_arguments, parser, where

AGENT = {"x-nimbos-class": "agent"}
SEQUENCES = 256  # each context that is kept has an id
SLACK = 64  # cells: an agent that goes on computes its last token once more


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """`shared` tokens of program and `own` ones for each agent, in cells of `kv_mib` MiB."""

    shared: int = 3072
    own: int = 512
    kv_mib: int = 256

    @property
    def whole(self) -> int:
        return self.shared + self.own


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    used: int
    there: int
    forgotten: int


async def run(setup: Setup, work: Work, *, copies: bool) -> Measures:
    home = ours.make_home(
        setup,
        f"density-{copies}",
        kv_memory_mib=work.kv_mib,
        swap_memory_mib=0,
        sequences=SEQUENCES,
        context_tokens=work.whole + SLACK,
    )
    async with ours.serving(setup, home=home) as server, client_of(server, limit_s=setup.limit_s) as client:
        await client.warm_up(setup.words.prompt(16, seed=(0,)))
        held = await _fill(setup, server, client, work, copies=copies)
        full = await _cells(server)
        computed, first_s = [], []
        for prompt in held:
            answer = (await client.ask(Question(prompt=prompt, out_tokens=1, headers=AGENT))).require()
            computed.append(answer.computed_tokens)
            first_s.append(answer.first_token_s or 0.0)
        forgotten = (await _cells(server)).forgotten
    if max(computed) > 1 or forgotten:
        raise RuntimeError(f"Not all {len(held)} contexts were kept: up to {max(computed)} tokens computed again.")
    return {
        "agents held": float(len(held)),
        "cells used": float(full.used),
        "cells there": float(full.there),
        "cells for each agent": full.used / len(held),
        "agents for each GiB": len(held) * 1024 / work.kv_mib,
        "goes on, computed again": float(max(computed)),
        "goes on, first token ms": 1e3 * statistics.median(first_s),
    }


async def _fill(setup: Setup, server: Server, client: Client, work: Work, *, copies: bool) -> list[tuple[int, ...]]:
    """Agents' contexts, as many as there are cells for."""
    held: list[tuple[int, ...]] = []
    now = await _cells(server)
    needs = work.whole
    while now.used + needs + SLACK <= now.there:
        number = len(held)
        program = setup.words.prompt(work.shared, seed=(31, number if copies else 0))
        held.append(program + setup.words.prompt(work.own, seed=(32, number)))
        (await client.ask(Question(prompt=held[-1], out_tokens=1, headers=AGENT))).require()
        before, now = now, await _cells(server)
        if len(held) > 1:
            needs = now.used - before.used  # as the engine counts it
    if now.forgotten or len(held) >= SEQUENCES - 2:
        raise RuntimeError("Something else than cells was short: smaller --kv-mib.")
    return held


async def _cells(server: Server) -> Cells:
    samples = await server.counters()
    used, there, forgotten = (total(samples, end) for end in ("_cells_used", "engine_cells", "_evictions_total"))
    if used is None or there is None or forgotten is None:
        raise RuntimeError("`/metrics` has no cells.")
    return Cells(used=round(used), there=round(there), forgotten=round(forgotten))


async def measure(setup: Setup, kv_mib: int) -> None:
    work = Work(shared=768, own=128, kv_mib=kv_mib // 4) if setup.quick else Work(kv_mib=kv_mib)
    place = where(setup)
    arms = [
        Arm(name="program shared", run=partial(run, setup, work, copies=False)),
        Arm(name="full copies", run=partial(run, setup, work, copies=True)),
    ]
    runs = await interleave(arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    shared, copies = (medians(runs)[arm.name] for arm in arms)
    findings = [
        Finding(
            name="agents held, program shared ÷ full copies",
            value=shared["agents held"] / copies["agents held"],
            at_least=4,
        ),
        Finding(
            name="agents for each GiB, program shared ÷ full copies that cells alone allow",
            value=shared["agents held"] / (shared["cells there"] // work.whole),
            at_least=4,
        ),
        Finding(
            name="tokens computed again by an agent that goes on", value=shared["goes on, computed again"], at_most=1
        ),
        Finding(name="agents for each GiB, program shared", value=shared["agents for each GiB"]),
        Finding(name="agents for each GiB, full copies", value=copies["agents for each GiB"]),
    ]
    notes = [f"{work}", "full copies: the same engine, and a program with words of its own for each agent"]
    publish(setup, title="Agents for each GiB", runs=runs, findings=findings, place=place, notes=notes)


if __name__ == "__main__":
    options = parser(__doc__ or "")
    options.add_argument("--kv-mib", type=int, default=256, help="memory for keys and values")
    given = options.parse_args()
    asyncio.run(measure(from_arguments(given), given.kv_mib))

"""A parked context goes on: how long until its first token, by where it was kept meanwhile?

Two contexts take turns, and the cells hold one of them: whichever goes on sends the other one away, and that is part of
what it waits for. Where a context goes is set (`PLACES`); where it came back from is not believed but read from the
answer's cached tokens, from the engine's counters and, for the disk, from what the kernel had to fetch. Before each
resumption from the disk the swap file is written out and dropped from the page cache.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from functools import partial

from bench import ours, page_cache
from bench.abba import Arm, Measures, interleave, medians
from bench.load import Client, Question, client_of
from bench.report import Finding, publish
from bench.server import Server, total
from bench.setup import Setup, from_arguments, parser, where

AGENT = {"x-nimbos-class": "agent"}
MIB = 1024 * 1024
KEPT = 0.95  # of a context: so much at least came back, or it did not come back at all
FETCHED_LEAST = 4  # what is stored, divided by this: ends of earlier turns stay there, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a context waits. `both`: the cells have room for the two."""

    name: str
    both: bool = False
    memory_mib: int = 0
    disk_mib: int = 0

    @property
    def written_out(self) -> bool:
        return self.memory_mib > 0 or self.disk_mib > 0


CELLS = Place(name="still in the cells", both=True)
MEMORY = Place(name="written to memory", memory_mib=4096)
DISK = Place(name="written to disk", disk_mib=4096)
GONE = Place(name="forgotten, computed again")
PLACES = (CELLS, MEMORY, DISK, GONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Each of two contexts of `tokens` goes on `rounds` times with one token more: what else may be new to it takes
    the same wherever it comes from."""

    tokens: int = 4096
    rounds: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """`put_back`: tokens that were copied into the cells. `stored_bytes`: outside of them, before. `fetched_bytes`:
    from disks."""

    first_token_s: float
    cached: int
    computed: int
    put_back: int
    stored_bytes: int
    fetched_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """Since the server began, and now."""

    put_back: int
    stored_bytes: int


async def run(setup: Setup, work: Work, place: Place) -> Measures:
    room = work.tokens + 256
    home = ours.make_home(
        setup,
        f"resume-{PLACES.index(place)}",
        cells=2 * room if place.both else room,
        context_tokens=room,
        swap_memory_mib=place.memory_mib,
        swap_disk_mib=place.disk_mib,
    )
    contexts = [setup.words.prompt(work.tokens, seed=(21, number)) for number in range(2)]
    async with ours.serving(setup, home=home) as server, client_of(server, limit_s=setup.limit_s) as client:
        await client.warm_up(setup.words.prompt(16, seed=(0,)))
        for context in contexts:
            (await client.ask(Question(prompt=context, out_tokens=1, headers=AGENT))).require()
        resumed = []
        for number in range(work.rounds * len(contexts)):
            prompt = contexts[number % 2] + setup.words.prompt(1, seed=(22, number))
            resumed.append(await _resume(server, client, prompt, place))
    for one in resumed:
        believe(one, place, work)
    return {
        "first token ms": 1e3 * statistics.median(one.first_token_s for one in resumed),
        "slowest ms": 1e3 * max(one.first_token_s for one in resumed),
        "cached tokens": statistics.median(one.cached for one in resumed),
        "put back tokens": statistics.median(one.put_back for one in resumed),
        "prompt tokens computed": statistics.median(one.computed for one in resumed),
        "from disk MiB": statistics.median(one.fetched_bytes for one in resumed) / MIB,
    }


async def _resume(server: Server, client: Client, prompt: tuple[int, ...], place: Place) -> Resumption:
    if place.disk_mib:
        page_cache.forget(server)
    before, fetched = await _swapped(server), page_cache.read_bytes(server) if place.disk_mib else 0
    answer = (await client.ask(Question(prompt=prompt, out_tokens=1, headers=AGENT))).require()
    return Resumption(
        first_token_s=answer.first_token_s or answer.latency_s or 0.0,  # it may be no text
        cached=answer.cached_tokens,
        computed=answer.computed_tokens,
        put_back=(await _swapped(server)).put_back - before.put_back,
        stored_bytes=before.stored_bytes,
        fetched_bytes=page_cache.read_bytes(server) - fetched if place.disk_mib else 0,
    )


async def _swapped(server: Server) -> Swapped:
    samples = await server.counters()
    put_back, stored_bytes = total(samples, "_swapped_in_tokens_total"), total(samples, "_swapped_bytes")
    if put_back is None or stored_bytes is None:
        raise RuntimeError("`/metrics` does not say what was written out.")
    return Swapped(put_back=round(put_back), stored_bytes=round(stored_bytes))


def believe(one: Resumption, place: Place, work: Work) -> None:
    """Raises: RuntimeError when it came back from somewhere else, so that no number is of the wrong thing."""
    most = KEPT * work.tokens
    kept, put_back = one.cached >= most, one.put_back >= most
    right = put_back and kept if place.written_out else kept != (place is GONE) and one.put_back == 0
    if place.disk_mib:
        right &= one.fetched_bytes > one.stored_bytes / FETCHED_LEAST > 0
    if not right:
        raise RuntimeError(f"A context that was to be {place.name} was not: {one}")


async def measure(setup: Setup) -> None:
    work = Work(tokens=1024, rounds=1) if setup.quick else Work()
    place = where(setup)
    arms = [Arm(name=one.name, run=partial(run, setup, work, one)) for one in PLACES]
    runs = await interleave(arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    middle = medians(runs)
    again = middle[GONE.name]["first token ms"]
    findings = [
        Finding(
            name=f"first token, computed again ÷ {one.name}",
            value=again / middle[one.name]["first token ms"],
            at_least=at_least,
        )
        for one, at_least in ((CELLS, None), (MEMORY, 50), (DISK, 20))
    ]
    notes = [
        f"{work}",
        "whichever context goes on sends the other one out, within the time that is measured",
        "disk: before each resumption the swap file was synced and dropped from the page cache",
    ]
    publish(setup, title="A parked context goes on", runs=runs, findings=findings, place=place, notes=notes)


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

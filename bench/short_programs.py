"""Short programs among long ones: how much sooner do they end, and what do the long ones pay for it?

Programs of 2, 8 and 30 calls begin at random times, as many a second as keep the engine busy for a given share of what
it can do. That is measured first: all programs at once, first come first served. Each call goes on with all that was
said before, and a tool takes its time between two calls.

The engine is asked directly, in its own process as always: by which run an ask is a part of, the scheduler knows how
much that run has had, and over HTTP only the kernel says so. Both arms are the same engine, with `fair` on and off.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import structlog

from bench import limits
from bench.abba import Arm, Measures, interleave, medians
from bench.load import percentile
from bench.report import Finding, publish
from bench.setup import Setup, from_arguments, parser, where
from nimbos.config import EngineSettings, Settings
from nimbos.engine import Engine
from nimbos.types import Ask, AskClass, Sampling, TokenChunk, Tokens, new_id

ACCOUNT = "bench"
CAPACITY_SHARE = 0.8  # of all calls: behind them only the longest programs are left, and the engine is not full
SHORT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """`kinds`: (share of the programs, calls of each). Lengths are log-normal with these medians; `waits`: (share,
    mean seconds) of exponential tool times. `load`: of the capacity."""

    programs: int = 100
    kinds: tuple[tuple[float, int], ...] = ((0.70, SHORT), (0.20, 8), (0.10, 30))
    shared: int = 256
    appended: int = 32
    generated: int = 24
    spread: float = 0.5
    waits: tuple[tuple[float, float], ...] = ((0.70, 0.1), (0.25, 1.0), (0.05, 10.0))
    load: float = 0.85
    cells: int = 16_384

    @property
    def context_tokens(self) -> int:
        """As long as a program gets, with room for the log-normal's tail."""
        return self.shared + 2 * max(calls for _, calls in self.kinds) * (self.appended + self.generated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    appended: int
    generated: int
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """`begins`: in units of the mean time between two."""

    number: int
    begins: float
    calls: tuple[Call, ...]


def programs_of(work: Work) -> list[Program]:
    """The same in each run; of each kind exactly its share."""
    random = np.random.default_rng(41)
    counts = [calls for share, calls in work.kinds for _ in range(round(share * work.programs))]
    random.shuffle(counts)
    begins = np.cumsum(random.exponential(1.0, len(counts)))
    return [
        Program(number=number, begins=float(begins[number]), calls=tuple(_call(work, random) for _ in range(count)))
        for number, count in enumerate(counts)
    ]


def _call(work: Work, random: np.random.Generator) -> Call:
    appended, generated = (
        int(np.clip(round(median * random.lognormal(0.0, work.spread)), 1, 2 * median))
        for median in (work.appended, work.generated)
    )
    mean_s = work.waits[int(random.choice(len(work.waits), p=[share for share, _ in work.waits]))][1]
    return Call(appended=appended, generated=generated, wait_s=float(random.exponential(mean_s)))


@asynccontextmanager
async def engine_of(setup: Setup, work: Work, *, fair: bool) -> AsyncIterator[Engine]:
    """What it learns of its step times, the next one knows."""
    settings = EngineSettings(
        library=str(setup.library or ""),
        threads=setup.threads,
        cells=work.cells,
        context_tokens=work.context_tokens,
        fair=fair,
    )
    home = setup.work / "engine"
    engine = Engine(model_path=setup.model, model_id="bench", settings=Settings(home=str(home), engine=settings))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def answered(engine: Engine, context: tuple[int, ...], *, tokens: int, process: str) -> tuple[int, ...]:
    """Raises: RuntimeError for an answer that is cut short."""
    ask = Ask(
        id=new_id("ask"),
        account=ACCOUNT,
        model="bench",
        parts=(Tokens(context),),
        ask_class=AskClass.AGENT,
        limit_tokens=tokens,
        ignore_eos=True,
        sampling=Sampling(temperature=0.0),
        process=process,
    )
    ids: list[int] = []
    async with aclosing(engine.generate(ask)) as chunks:
        async for chunk in chunks:
            if isinstance(chunk, TokenChunk):
                ids.extend(chunk.ids)
    if len(ids) != tokens:
        raise RuntimeError(f"An answer has {len(ids)} of {tokens} tokens.")
    return tuple(ids)


async def run_program(
    setup: Setup,
    engine: Engine,
    work: Work,
    program: Program,
    *,
    gap_s: float,
    count: Callable[[], None] | None = None,
) -> float:
    """Seconds from its beginning to its last answer. `count`: called for each answer."""
    await asyncio.sleep(program.begins * gap_s)
    began = time.monotonic()
    context = setup.words.prompt(work.shared, seed=(42,))
    for at, call in enumerate(program.calls):
        context += setup.words.prompt(call.appended, seed=(43, program.number, at))
        context += await answered(engine, context, tokens=call.generated, process=f"program {program.number}")
        if count is not None:
            count()
        if at + 1 < len(program.calls):
            await asyncio.sleep(call.wait_s)
    return time.monotonic() - began


async def capacity(setup: Setup, work: Work) -> float:
    """Programs a second that the engine can answer when all are there at once, first come first served."""
    programs = programs_of(work)
    calls = sum(len(program.calls) for program in programs)
    ended: list[float] = []
    enough = asyncio.Event()

    def count() -> None:
        ended.append(time.monotonic())
        if len(ended) >= CAPACITY_SHARE * calls:
            enough.set()

    async with (
        engine_of(setup, work, fair=False) as engine,
        asyncio.timeout(setup.limit_s),
        asyncio.TaskGroup() as group,
    ):
        began = time.monotonic()
        tasks = [
            group.create_task(run_program(setup, engine, work, program, gap_s=0.0, count=count)) for program in programs
        ]
        await enough.wait()
        for task in tasks:
            task.cancel()
    per_second = len(ended) / (ended[-1] - began)
    return per_second / (calls / len(programs))


async def run(setup: Setup, work: Work, *, fair: bool, gap_s: float) -> Measures:
    programs = programs_of(work)
    async with engine_of(setup, work, fair=fair) as engine:
        before, began = await engine.stats(), time.monotonic()
        took = await asyncio.gather(*(run_program(setup, engine, work, program, gap_s=gap_s) for program in programs))
        makespan, after = time.monotonic() - began, await engine.stats()
    by_kind = {
        f"{count} calls, mean s": statistics.fmean(
            s for s, program in zip(took, programs, strict=True) if len(program.calls) == count
        )
        for _, count in work.kinds
    }
    return {
        **by_kind,
        "mean s": statistics.fmean(took),
        "p99 s": percentile(list(took), 99),
        "makespan s": makespan,
        "output tokens/s": sum(call.generated for program in programs for call in program.calls) / makespan,
        "share of the time in steps": (after.step_seconds_sum - before.step_seconds_sum) / makespan,
        "rows in a step": (after.step_rows - before.step_rows) / (after.steps - before.steps),
    }


async def measure(setup: Setup) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    work = Work(programs=20) if setup.quick else Work()
    place = where(setup)
    times = await limits.measured(setup)
    most = await capacity(setup, work)
    gap_s = 1 / (work.load * most)
    arms = [
        Arm(name="least attained first", run=partial(run, setup, work, fair=True, gap_s=gap_s)),
        Arm(name="first come first served", run=partial(run, setup, work, fair=False, gap_s=gap_s)),
    ]
    runs = await interleave(arms, repeats=setup.repeats, limit_s=setup.limit_s, one_pass=setup.one_pass)
    ours, fifo = (medians(runs)[arm.name] for arm in arms)
    short = f"{SHORT} calls, mean s"
    findings = [
        Finding(name="short programs, FIFO ÷ ours", value=fifo[short] / ours[short], at_least=3),
        Finding(name="mean of all, FIFO ÷ ours", value=fifo["mean s"] / ours["mean s"], at_least=1.3),
        Finding(name="p99, ours ÷ FIFO", value=ours["p99 s"] / fifo["p99 s"], at_most=1.3),
        Finding(name="tokens/s, ours ÷ FIFO", value=ours["output tokens/s"] / fifo["output tokens/s"], at_least=0.97),
    ]
    notes = [f"{work}", f"capacity {most:.4f} programs/s, so one begins every {gap_s:.2f} s"]
    notes += [times.shown()] if times else []
    publish(setup, title="Short programs among long ones", runs=runs, findings=findings, place=place, notes=notes)


if __name__ == "__main__":
    asyncio.run(measure(from_arguments(parser(__doc__ or "").parse_args())))

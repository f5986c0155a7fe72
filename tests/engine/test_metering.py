"""The meter counts what is told, exactly: whatever is killed, cancelled, shared, preempted or computed again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nimbos.engine import Engine
from nimbos.engine.scripted import ScriptedSource
from nimbos.engine.tally import Tally
from nimbos.meterfile import Counts, MeterFile
from nimbos.types import Ask, AskClass, Grammar, Kind, Sampling, Text, Thinking, TokenSource, Usage, new_id
from tests.engine.asking import PROMPT, Told, answer, ask, started

THINKS = Thinking(open="<think>", close="</think>", budget_tokens=9, started=True, farewell="\n</think>\n\n")


@pytest.fixture
def meters(tmp_path: Path) -> MeterFile:
    return MeterFile.create(tmp_path / "run")


@pytest_asyncio.fixture
async def engine(tmp_path: Path, meters: MeterFile) -> AsyncIterator[Engine]:
    running = await started("qwen2", tmp_path, meters=meters)
    yield running
    await running.close()


def metered(meters: MeterFile, wanted: Ask) -> Ask:
    return msgspec.structs.replace(wanted, meter_row=meters.allot(wanted.id))


def counts_of(meters: MeterFile, wanted: Ask) -> Counts:
    assert wanted.meter_row is not None
    return meters.read(wanted.meter_row)


async def told_and_counted(source: TokenSource, meters: MeterFile, wanted: Ask) -> tuple[Told, Counts]:
    wanted = metered(meters, wanted)
    told = await answer(source, wanted)
    counts = counts_of(meters, wanted)
    assert counts.usage() == told.usage
    return told, counts


async def test_the_meter_counts_the_prompt_the_answer_and_what_was_cached(engine: Engine, meters: MeterFile) -> None:
    told, counts = await told_and_counted(engine, meters, ask())
    prompt = (await engine.prepare(ask())).prompt_tokens
    assert (counts.computed_input, counts.cached_input, counts.output) == (prompt, 0, len(told.ids[0]))
    assert counts.compute_us > 0
    _, again = await told_and_counted(engine, meters, ask())
    assert (again.computed_input, again.cached_input) == (1, prompt - 1)
    assert again.recomputed_input == again.recomputed_output == 0


@pytest.mark.parametrize("arch", ["qwen2", "qwen35"])
async def test_branches_pay_for_their_prompt_once(arch: str, tmp_path: Path, meters: MeterFile) -> None:
    """A family that cannot share computes it for each branch, which shows as computed again."""
    engine = await started(arch, tmp_path, meters=meters)
    try:
        told, counts = await told_and_counted(engine, meters, ask(n=3, sampling=Sampling(seed=3)))
        prompt = (await engine.prepare(ask())).prompt_tokens
        assert told.usage.input == prompt
        assert counts.output == told.tokens > 3
        assert counts.recomputed_input == (2 * prompt if arch == "qwen35" else 2)
    finally:
        await engine.close()


async def test_thinking_and_forced_tokens_are_counted(tmp_path: Path, meters: MeterFile) -> None:
    engine = await started("qwen3", tmp_path, meters=meters)
    try:
        told, counts = await told_and_counted(engine, meters, ask(thinking=THINKS, limit_tokens=40))
        assert 0 < counts.thinking <= 9
        assert counts.thinking == told.final.usage.thinking
        schema = '{"const": {"answer": "forty-two is the answer"}}'
        grammar = Grammar(kind="json_schema", source=schema)
        told, counts = await told_and_counted(engine, meters, ask(grammar=grammar, limit_tokens=60))
        assert counts.output == len(told.ids[0]) > 5
    finally:
        await engine.close()


async def test_an_ask_that_gave_way_pays_once(tmp_path: Path, meters: MeterFile) -> None:
    """The cells do for either; without sharing, what gives way is computed again."""
    engine = await started("llama", tmp_path, meters=meters, cells=512, share_prefixes=False)
    try:
        slow = metered(meters, ask(PROMPT * 8, limit_tokens=100, ignore_eos=True, ask_class=AskClass.BATCH))
        prompt = (await engine.prepare(slow)).prompt_tokens
        running = asyncio.create_task(answer(engine, slow))
        while counts_of(meters, slow).output == 0:
            await asyncio.sleep(0)
        _, urgent = await told_and_counted(engine, meters, ask(PROMPT * 8))
        assert urgent.recomputed_input == 0
        told = await running
        counts = counts_of(meters, slow)
        assert counts.usage() == told.usage
        assert (told.usage.input, told.usage.output) == (prompt, 100)
        assert counts.recomputed_input >= prompt
    finally:
        await engine.close()


async def test_an_ask_that_continues_another_does_not_pay_for_it_again(engine: Engine, meters: MeterFile) -> None:
    whole = await answer(engine, ask())
    told, counts = await told_and_counted(engine, meters, ask(emitted={0: tuple(whole.ids[0][:9])}, account="new"))
    assert counts.output == 15 == len(told.ids[0])
    assert counts.recomputed_input == 8, "what was emitted is read again, its last token for the first time"


async def test_embeddings_are_counted(tmp_path: Path, meters: MeterFile) -> None:
    engine = await started("qwen3-embedding", tmp_path, meters=meters)
    try:
        parts = tuple(Text(f"{n} {PROMPT}") for n in range(40))
        wanted = Ask(id=new_id("ask"), account="anna", model="tiny", kind=Kind.EMBED, parts=parts)
        _, counts = await told_and_counted(engine, meters, wanted)
        assert counts.computed_input == (await engine.prepare(wanted)).prompt_tokens
    finally:
        await engine.close()


async def test_the_scripted_model_is_counted_the_same_way(tmp_path: Path, meters: MeterFile) -> None:
    file = tmp_path / "demo.json"
    file.write_text('{"default": {"thinking": "let me see", "text": "one two three"}}')
    source = ScriptedSource.load(file)
    source.count_into(meters)
    thinking = Thinking(open="<think>", close="</think>", budget_tokens=100)
    told, counts = await told_and_counted(source, meters, ask("four words are here", n=2, thinking=thinking))
    assert (counts.computed_input, counts.output, counts.thinking) == (4, 12, 6)
    assert told.usage == Usage(input=4, output=12, thinking=6)


async def test_a_client_that_leaves_has_paid_for_all_it_was_told_and_at_most_a_step_more(
    engine: Engine, meters: MeterFile
) -> None:
    for stop_after in (1, 2, 7):
        wanted = metered(meters, ask(limit_tokens=500, ignore_eos=True, n=2, sampling=Sampling(seed=1)))
        told = Told()
        prepared = await engine.prepare(wanted)
        async with aclosing(engine.generate(prepared.ask)) as chunks:
            async for chunk in chunks:
                told.take(chunk)
                if told.tokens >= stop_after:
                    break
        await engine.stats()  # answered between steps, after the cancelling
        counts = counts_of(meters, wanted)
        assert told.tokens <= counts.output
        after = counts_of(meters, wanted)
        await answer(engine, ask("someone else"))
        assert counts_of(meters, wanted) == after, "counted on after it was cancelled"


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "qwen35"])
async def test_killed_at_random_moments_the_meter_is_what_was_told(
    arch: str, tmp_path: Path, meters: MeterFile
) -> None:
    engine = await started(arch, tmp_path, meters=meters)
    rng = random.Random(arch)
    prompts = {n: f"{n} {PROMPT * (1 + n % 3)}" for n in range(6)}
    lengths = {n: (await engine.prepare(ask(prompts[n]))).prompt_tokens for n in prompts}
    progress = asyncio.Event()
    left = len(prompts)

    async def client(number: int) -> None:
        nonlocal left
        thinking = THINKS if arch == "qwen3" and number % 2 else None
        wanted = metered(
            meters, ask(prompts[number], limit_tokens=90, ignore_eos=True, n=1 + number % 2, thinking=thinking)
        )
        told = Told()
        prepared = await engine.prepare(wanted)
        async with aclosing(engine.generate(prepared.ask)) as chunks:
            async for chunk in chunks:
                told.take(chunk)
                if told.tokens <= counts_of(meters, wanted).output:
                    progress.set()
                else:
                    pytest.fail("told before it was counted")
        left -= 1
        progress.set()
        counts = counts_of(meters, wanted)
        assert counts.usage() == told.usage
        assert told.usage.input == lengths[number]
        assert told.usage.output == told.tokens == 90 * wanted.n

    async def killer() -> None:
        """Between the step's counting and its posting, in the middle of computing, while it restarts: at any time."""
        while left:
            moment = rng.randrange(1, 40)
            while left and moment:
                progress.clear()
                await progress.wait()
                moment -= 1
            if left and engine.restarts < 5 and engine.pid is not None:
                os.kill(engine.pid, signal.SIGKILL)

    try:
        await asyncio.gather(killer(), *(client(n) for n in prompts))
        assert engine.restarts > 0
    finally:
        await engine.close()


def test_what_was_counted_and_never_received_is_not_billed_twice(meters: MeterFile) -> None:
    """The engine counts ten tokens, the server receives six of them, and the process dies."""
    wanted = metered(meters, ask())
    assert wanted.meter_row is not None
    row = meters.row(wanted.meter_row, wanted.id)
    first = Tally(20, row)
    first.found(5)
    first.computed(5, 15)
    first.answered(10, 4)
    first.write()
    second = Tally(20, row)
    second.resume(output=6, thinking=3, cached=5)
    assert counts_of(meters, wanted).usage() == Usage(input=20, cached=5, output=6, thinking=3, recomputed=4)
    assert second.computed(0, 20) == 20
    second.answered(4, 1)
    second.write()
    assert counts_of(meters, wanted) == Counts(
        computed_input=35, cached_input=5, output=14, thinking=5,
        recomputed_input=20, recomputed_output=4, recomputed_thinking=1,
    )  # fmt: skip
    assert second.usage(first=True, output=10, thinking=4) == counts_of(meters, wanted).usage()


def test_what_an_earlier_ask_has_paid_for_is_computed_again_and_not_billed(meters: MeterFile) -> None:
    """An ask that was killed paid for its prompt and 10 tokens, of which 7 were kept: the ask that goes on with it
    computes the prompt and the 7 again, samples the 3 again, and pays for what comes then."""
    wanted = metered(meters, ask())
    assert wanted.meter_row is not None
    tally = Tally(20, meters.row(wanted.meter_row, wanted.id), paid_prompt=20, paid_output=3)
    tally.resume(output=0, thinking=0, cached=None)
    tally.found(8)
    assert tally.computed(8, 19, known=27) == 19
    tally.answered(2, 1)
    tally.answered(4, 1)
    tally.write()
    assert counts_of(meters, wanted).usage() == Usage(output=3, recomputed=19 + 3)
    assert tally.usage(first=True, output=6, thinking=2) == Usage(output=3, recomputed=22)


def test_what_was_paid_for_stays_so_when_the_engine_dies_too(meters: MeterFile) -> None:
    wanted = metered(meters, ask())
    assert wanted.meter_row is not None
    row = meters.row(wanted.meter_row, wanted.id)
    first = Tally(20, row, paid_prompt=15, paid_output=3)
    first.computed(0, 20)
    first.answered(5, 0)
    first.write()
    second = Tally(20, row, paid_prompt=15, paid_output=3)
    second.resume(output=4, thinking=0, cached=0)  # of the five it received four: three that were paid for, and one
    second.computed(0, 20)
    second.answered(6, 0)
    second.write()
    assert counts_of(meters, wanted).usage() == Usage(input=5, output=7, recomputed=15 + 3 + 1 + 20)
    assert second.usage(first=True, output=10, thinking=0) == counts_of(meters, wanted).usage()


def test_thinking_that_was_paid_for_and_turns_out_to_be_none_is_not_less_than_nothing(meters: MeterFile) -> None:
    """Two of three tokens of thinking are the beginning of a close mark, whose last token comes behind what is paid."""
    wanted = metered(meters, ask())
    assert wanted.meter_row is not None
    tally = Tally(5, meters.row(wanted.meter_row, wanted.id), paid_prompt=5, paid_output=3)
    tally.answered(3, 3)
    tally.answered(1, -2)
    tally.write()
    assert counts_of(meters, wanted).usage() == Usage(output=1, recomputed=3)
    assert tally.usage(first=True, output=4, thinking=1) == Usage(output=1, recomputed=3)


@st.composite
def endings(draw: st.DrawFn) -> list[tuple[int, bool]]:
    """Tokens of several branches in the order they come: whose each is, and whether it is thinking."""
    branches = draw(st.integers(1, 4))
    of = st.tuples(st.integers(0, branches - 1), st.booleans())
    return [*draw(st.permutations([(branch, False) for branch in range(branches)])), *draw(st.lists(of, max_size=30))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=endings(), paid=st.integers(0, 40), dies_after=st.none() | st.integers(0, 30))
def test_branches_together_tell_what_is_billed_whoever_of_them_ends_first(
    meters: MeterFile, tokens: list[tuple[int, bool]], paid: int, dies_after: int | None
) -> None:
    """An earlier ask has paid for `paid` tokens of all branches; each ends with its last token. The engine may die."""
    wanted = metered(meters, ask())
    assert wanted.meter_row is not None
    row = meters.row(wanted.meter_row, wanted.id)
    left = Counter(branch for branch, _ in tokens)
    output, thinking = Counter[int](), Counter[int]()
    ended: list[int] = []
    told = Usage()
    tally = Tally(5, row, open_branches=len(left), paid_prompt=5, paid_output=paid)
    tally.computed(0, 5)
    for at, (branch, thought) in enumerate(tokens):
        if at == dies_after:
            tally = Tally(5, row, open_branches=len(left) - len(ended), paid_prompt=5, paid_output=paid)
            tally.resume(
                output=output.total(),
                thinking=thinking.total(),
                cached=0,
                ended_output=sum(output[one] for one in ended),
                ended_thinking=sum(thinking[one] for one in ended),
            )
        output[branch] += 1
        thinking[branch] += thought
        tally.answered(1, int(thought))
        tally.write()
        if output[branch] == left[branch]:
            ended.append(branch)
            told += tally.usage(first=branch == 0, output=output[branch], thinking=thinking[branch])
    billed = counts_of(meters, wanted).usage()
    meters.free(wanted.meter_row)
    assert (told.input, told.output, told.thinking) == (billed.input, billed.output, billed.thinking)
    assert billed.input == 0
    assert billed.output == max(0, len(tokens) - paid)

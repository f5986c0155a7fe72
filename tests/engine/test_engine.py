"""The engine as its users see it: a real process, a real libllama, tiny models; killed, flooded and cancelled."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import numpy as np
import pytest
import pytest_asyncio

from nimbos.engine import Engine, llama
from nimbos.engine.llama import Library
from nimbos.engine.model import Model, ModelOptions, Rows
from nimbos.errors import EngineFailed, InvalidRequest, ModelUnusable, Overloaded, PromptTooLong
from nimbos.types import (
    Ask,
    AskClass,
    Final,
    FinishReason,
    Grammar,
    Kind,
    Sampling,
    Text,
    Tokens,
    VectorChunk,
    new_id,
)
from tests.engine.asking import PROMPT, Told, answer, ask, settings_in, started


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    running = await started("qwen2", tmp_path)
    yield running
    await running.close()


async def test_an_answer_has_its_tokens_its_text_and_its_usage(engine: Engine) -> None:
    told = await answer(engine, ask())
    assert len(told.ids[0]) == 24 == told.final.usage.output
    assert told.final.reason is FinishReason.LENGTH
    prepared = await engine.prepare(ask())
    assert told.final.usage.input == prepared.prompt_tokens
    assert told.final.usage.cached == 0
    assert told.text[0]


async def test_a_second_ask_finds_the_prefix_and_says_the_same(engine: Engine) -> None:
    first, second = await answer(engine, ask()), await answer(engine, ask())
    assert second.ids[0][:3] == first.ids[0][:3]
    assert second.final.usage.cached == second.final.usage.input - 1
    other = await answer(engine, ask(account="bert"))
    assert other.final.usage.cached == 0, "another account's prefix was seen"


async def test_sixteen_branches_compute_their_shared_prefix_once(engine: Engine) -> None:
    shared = PROMPT * 4
    prompts = [f"{shared}{n} is the number" for n in range(16)]
    counts = [(await engine.prepare(ask(p))).prompt_tokens for p in prompts]
    only_shared = (await engine.prepare(ask(shared))).prompt_tokens
    tolds = await asyncio.gather(*(answer(engine, ask(p, ask_class=AskClass.AGENT, limit_tokens=4)) for p in prompts))
    stats = await engine.stats()
    generated = sum(len(told.ids[0]) for told in tolds)
    own = sum(count - only_shared + 4 for count in counts)  # tokens around the border may merge differently
    assert stats.computed_tokens <= only_shared + own + generated
    assert stats.cells_used <= only_shared + own + generated


async def test_choices_share_their_prompt_and_differ_by_branch(engine: Engine) -> None:
    told = await answer(engine, ask(n=4, sampling=Sampling(temperature=1.0, seed=7)))
    assert sorted(final.branch for final in told.finals) == [0, 1, 2, 3]
    assert len({tuple(ids) for ids in told.ids.values()}) == 4
    total = told.finals[0].usage
    for final in told.finals[1:]:
        total = total + final.usage
    assert total.output == 96
    assert total.input == (await engine.prepare(ask())).prompt_tokens, "the prompt counts once"
    again = await answer(engine, ask(n=4, sampling=Sampling(temperature=1.0, seed=7)))
    assert again.ids[2] == told.ids[2], "the same seed, branch and prefix give the same text"


async def test_emitted_tokens_are_continued_not_repeated(engine: Engine) -> None:
    whole = await answer(engine, ask())
    part = tuple(whole.ids[0][:9])
    rest = await answer(engine, ask(emitted={0: part}))
    assert [*part, *rest.ids[0]] == whole.ids[0]
    assert rest.final.usage.output == 15, "the ask that made the others has paid for them"


async def test_a_stop_string_ends_the_answer_and_is_not_told(engine: Engine) -> None:
    whole = (await answer(engine, ask(limit_tokens=40))).text[0]
    printable = [c for c in whole if c != "\ufffd"]
    stop = printable[len(printable) // 2]
    told = await answer(engine, ask(limit_tokens=40, stop=(stop,)))
    assert told.final.reason is FinishReason.STOP
    assert told.final.stopped_by == stop
    assert told.text[0] == whole[: whole.index(stop)]


async def test_a_token_that_stops_ends_the_answer_also_after_a_restart(engine: Engine) -> None:
    whole = (await answer(engine, ask(limit_tokens=40))).ids[0]
    stop = whole[20]
    told = await answer(engine, ask(limit_tokens=40, stop_ids=(stop,)))
    assert told.ids[0] == whole[: whole.index(stop) + 1]
    assert told.final.reason is FinishReason.STOP
    part = tuple(told.ids[0][: whole.index(stop) // 2])
    rest = await answer(engine, ask(limit_tokens=40, stop_ids=(stop,), emitted={0: part}))
    assert [*part, *rest.ids[0]] == told.ids[0]


async def test_a_schema_is_kept_at_any_temperature(engine: Engine) -> None:
    schema = '{"type":"object","properties":{"n":{"type":"integer","minimum":0,"maximum":99}},"required":["n"],'
    schema += '"additionalProperties":false}'
    for seed in range(3):
        told = await answer(
            engine, ask(sampling=Sampling(seed=seed), grammar=Grammar(kind="json_schema", source=schema))
        )
        assert 0 <= msgspec.json.decode(told.text[0])["n"] <= 99
        assert told.final.reason is FinishReason.STOP


async def test_a_wrong_grammar_is_refused_before_anything_is_computed(engine: Engine) -> None:
    with pytest.raises(InvalidRequest):
        await engine.prepare(ask(grammar=Grammar(kind="regex", source="(")))
    assert (await engine.stats()).computed_tokens == 0


async def test_a_prompt_that_is_too_long_is_told_with_both_counts(engine: Engine) -> None:
    with pytest.raises(PromptTooLong) as caught:
        await engine.prepare(ask("word " * 5000))
    assert caught.value.limit == 2047
    assert caught.value.have > 2047


@pytest.mark.parametrize("ids", [(-1,), (10**6,), ()])
async def test_token_ids_outside_of_the_vocabulary_are_refused(engine: Engine, ids: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest):
        await engine.prepare(msgspec.structs.replace(ask(), parts=(Tokens(ids),)))


async def test_a_closed_stream_frees_what_it_held(engine: Engine) -> None:
    prepared = await engine.prepare(ask(limit_tokens=1500))
    async with aclosing(engine.generate(prepared.ask)) as chunks:
        async for _ in chunks:
            break
    await answer(engine, ask("something else"))
    stats = await engine.stats()
    assert sum(stats.live.values()) == 0 == sum(stats.waiting.values())
    assert engine.active == 0


async def test_cancel_storm_leaks_nothing(engine: Engine) -> None:
    """200 asks, half of them cancelled at random tokens: every cell, sequence and task comes back."""
    rng = random.Random(5)

    async def one(number: int) -> None:
        wanted = ask(
            f"{PROMPT[: rng.randrange(5, 80)]}{number}", limit_tokens=rng.randrange(1, 24), n=rng.choice((1, 1, 2)),
            account=rng.choice("abc"), ask_class=rng.choice(list(AskClass)), sampling=Sampling(seed=number),
        )  # fmt: skip
        prepared = await engine.prepare(wanted)
        stop_after = rng.randrange(0, 12) if number % 2 else None
        seen = 0
        async with aclosing(engine.generate(prepared.ask)) as chunks:
            async for _ in chunks:
                seen += 1
                if stop_after is not None and seen > stop_after:
                    return

    await asyncio.gather(*(one(number) for number in range(200)))
    await answer(engine, ask(account="z"))
    stats = await engine.stats()
    assert engine.active == 0
    assert sum(stats.live.values()) == 0 == sum(stats.waiting.values())
    assert stats.cells_used <= stats.cells_total
    assert stats.sequences_used <= 64
    assert engine.pid == stats.pid
    assert engine.restarts == 0
    mine = {task for task in asyncio.all_tasks() if task.get_name().startswith("engine")}
    assert len(mine) == 1


async def test_more_contexts_than_cells_are_served_by_forgetting_and_giving_way(tmp_path: Path) -> None:
    engine = await started("llama", tmp_path, cells=512)
    try:
        wanted = [ask(f"{n} {PROMPT}" * 2, limit_tokens=60, ask_class=list(AskClass)[n % 3]) for n in range(12)]
        tolds = await asyncio.gather(*(answer(engine, each) for each in wanted))
        alone = await answer(engine, msgspec.structs.replace(wanted[2], id=new_id("ask"), account="other"))
        assert all(len(told.ids[0]) == 60 for told in tolds)
        assert len(alone.ids[0]) == 60
        assert (await engine.stats()).cells_used <= 512
    finally:
        await engine.close()


@pytest.mark.parametrize("arch", ["qwen2", "gemma3", "qwen35"])
async def test_killed_in_the_middle_every_stream_goes_on_from_its_last_token(arch: str, tmp_path: Path) -> None:
    engine = await started(arch, tmp_path)
    try:
        prompts = [f"{n} {PROMPT}" for n in range(5)]
        tolds = [Told() for _ in prompts]
        halfway = asyncio.Event()

        async def stream(told: Told, prompt: str) -> None:
            prepared = await engine.prepare(ask(prompt, limit_tokens=80))
            async with aclosing(engine.generate(prepared.ask)) as chunks:
                async for chunk in chunks:
                    told.take(chunk)
                    if len(tolds[-1].ids.get(0, ())) >= 20:
                        halfway.set()

        async def kill() -> None:
            await halfway.wait()
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)

        await asyncio.gather(kill(), *(stream(t, p) for t, p in zip(tolds, prompts, strict=True)))
        assert engine.restarts == 1
        for told, prompt in zip(tolds, prompts, strict=True):
            assert len(told.ids[0]) == 80, "a token was lost or repeated"
            assert told.final.usage.output == 80
            (part,) = (await engine.prepare(ask(prompt))).ask.parts
            assert isinstance(part, Tokens)
            assert greedy_up_to_ties(engine.model_path, part.ids, told.ids[0]), "not the greedy answer any more"
        assert sum(told.final.usage.recomputed for told in tolds) > 0
        later = await answer(engine, ask("afterwards"))
        assert len(later.ids[0]) == 24
    finally:
        await engine.close()


def greedy_up_to_ties(path: Path, prompt: tuple[int, ...], ids: list[int]) -> bool:
    """Whether each token was the likeliest after those before it, or as good as: batch shapes round differently, so
    of two logits that are nearly equal either may win. Computed apart from the engine, one token after another."""
    model = Model(Library(llama.wheel_library()), path, ModelOptions(cells=1024, sequences=4, threads=1))
    model.open_context()
    try:
        step, at = list(prompt), 0
        for token in ids:
            model.arm()
            model.decode([Rows(sequence=0, start=at, tokens=step, logits=True)])
            logits = model.logits(1)[0]
            if logits[token] < logits.max() - 0.05:
                return False
            at, step = at + len(step), [token]
        return True
    finally:
        model.close()


async def test_killed_at_random_moments_nothing_is_lost(engine: Engine) -> None:
    rng = random.Random(11)
    done = asyncio.Event()

    async def killer() -> None:
        for _ in range(3):
            target = engine.pid
            for _ in range(rng.randrange(5, 60)):
                await asyncio.sleep(0)
            while engine.pid is None or (engine.pid == target and done.is_set()):
                await asyncio.sleep(0)
            await answer(engine, ask("between", limit_tokens=rng.randrange(1, 5)))
            os.kill(engine.pid, signal.SIGKILL)
        done.set()

    async def client(number: int) -> None:
        for round_ in range(4):
            told = await answer(engine, ask(f"{number} {round_} {PROMPT}", limit_tokens=12, n=2))
            assert {len(ids) for ids in told.ids.values()} == {12}
            assert len(told.finals) == 2

    await asyncio.gather(killer(), *(client(n) for n in range(6)))
    assert engine.restarts >= 1
    assert engine.active == 0


async def test_an_engine_that_dies_over_and_over_fails_the_ask_and_not_the_server(tmp_path: Path) -> None:
    engine = await started("qwen2", tmp_path, restart_limit=2)
    try:
        prepared = await engine.prepare(ask(limit_tokens=1500))
        with pytest.raises(EngineFailed):
            async with aclosing(engine.generate(prepared.ask)) as chunks:
                async for _ in chunks:
                    while engine.pid is None:
                        await asyncio.sleep(0)
                    engine.model_path.unlink(missing_ok=True)  # it cannot come back
                    os.kill(engine.pid, signal.SIGKILL)
    finally:
        await engine.close()


async def test_a_full_inbox_refuses_the_newest_and_says_when_to_come_back(tmp_path: Path) -> None:
    engine = await started("qwen2", tmp_path, inbox=4)
    try:
        prepared = [(await engine.prepare(ask(f"{n}", account=f"{n}", limit_tokens=300))).ask for n in range(10)]
        streams = [engine.generate(each) for each in prepared]
        first = [asyncio.ensure_future(anext(stream)) for stream in streams]
        results = await asyncio.gather(*first, return_exceptions=True)
        refused = [r for r in results if isinstance(r, Overloaded)]
        assert refused
        assert all((r.retry_after_s or 0) > 0 and r.limit == "queue" for r in refused)
        for stream in streams:
            await stream.aclose()
    finally:
        await engine.close()


async def test_one_account_cannot_fill_the_inbox_of_others(tmp_path: Path) -> None:
    engine = await started("qwen2", tmp_path, inbox=8)
    try:
        flood = [(await engine.prepare(ask(f"{n}", account="flood", limit_tokens=300))).ask for n in range(8)]
        streams = [engine.generate(each) for each in flood]
        first = [asyncio.ensure_future(anext(stream)) for stream in streams]
        polite = await answer(engine, ask(account="polite", limit_tokens=2))
        assert len(polite.ids[0]) == 2
        results = await asyncio.gather(*first, return_exceptions=True)
        assert any(isinstance(r, Overloaded) and "account" in r.limit for r in results)
        for stream in streams:
            await stream.aclose()
    finally:
        await engine.close()


async def test_an_interactive_ask_overtakes_a_long_batch_prompt(engine: Engine) -> None:
    order: list[str] = []

    async def one(name: str, wanted: Ask) -> None:
        await answer(engine, wanted)
        order.append(name)

    batch = [ask(f"{n} {PROMPT}" * 8, ask_class=AskClass.BATCH, limit_tokens=40) for n in range(6)]
    tasks = [asyncio.create_task(one("batch", each)) for each in batch]
    await asyncio.sleep(0)
    await one("interactive", ask("hello", limit_tokens=3))
    await asyncio.gather(*tasks)
    assert order[0] == "interactive"


@pytest.mark.parametrize("arch", ["gemma3", "qwen35"])
async def test_a_family_that_cannot_share_safely_does_not(arch: str, tmp_path: Path) -> None:
    engine = await started(arch, tmp_path)
    try:
        first, second = await answer(engine, ask()), await answer(engine, ask())
        assert second.final.usage.cached == 0
        assert second.ids == first.ids  # alone, and in the same batch shapes
        assert not (await engine.describe()).shares_prefixes
        assert (await engine.stats()).cells_used == 0, "kept what nobody can use"
    finally:
        await engine.close()


async def test_embeddings_are_unit_vectors_in_the_order_of_their_inputs(tmp_path: Path) -> None:
    engine = await started("qwen3-embedding", tmp_path)
    try:
        wanted = Ask(
            id=new_id("ask"), account="anna", model="tiny", kind=Kind.EMBED,
            parts=(Text("the man"), Text("the world and the man"), Text("the man")),
        )  # fmt: skip
        prepared = await engine.prepare(wanted)
        vectors: dict[int, np.ndarray] = {}
        async for chunk in engine.generate(prepared.ask):
            if isinstance(chunk, VectorChunk):
                vectors[chunk.index] = np.frombuffer(chunk.values, "<f4")
            elif isinstance(chunk, Final):
                assert chunk.usage.input == prepared.prompt_tokens
        assert sorted(vectors) == [0, 1, 2]
        assert all(abs(np.linalg.norm(v) - 1) < 1e-4 for v in vectors.values())
        assert float(vectors[0] @ vectors[2]) > 0.999 > float(vectors[0] @ vectors[1])
        with pytest.raises(InvalidRequest):
            await engine.prepare(ask())
    finally:
        await engine.close()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 50])
async def test_a_broken_file_is_an_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelUnusable, match=r"broken\.gguf"):
        await Engine(model_path=path, model_id="broken", settings=settings_in(tmp_path)).start()


async def test_the_engine_ends_when_its_server_lets_go(engine: Engine) -> None:
    process = engine._process
    assert process is not None
    assert engine._writer is not None
    engine._closing = True
    engine._writer.close()
    assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_the_engine_process_is_confined(engine: Engine) -> None:
    assert engine.ready is not None
    if engine.ready.tier.startswith("none"):
        pytest.skip(f"no confinement here: {engine.ready.tier}")
    status = Path(f"/proc/{engine.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status


async def test_a_final_that_was_not_taken_yet_is_not_repeated_after_a_death(engine: Engine) -> None:
    """Branch 0 is almost done when the ask comes; it ends, nobody has read that, and the engine dies."""
    first = (await answer(engine, ask(n=2))).ids
    prepared = await engine.prepare(ask(n=2, limit_tokens=24, emitted={0: tuple(first[0][:22])}))
    stream = engine.generate(prepared.ask)
    told = Told()
    told.take(await anext(stream))
    active = engine._asks[prepared.ask.id]
    while active.finished != [0]:
        await asyncio.sleep(0)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    async with aclosing(stream):
        async for chunk in stream:
            told.take(chunk)
    assert sorted(final.branch for final in told.finals) == [0, 1]
    assert len(told.ids[1]) == 24
    assert len(told.ids[0]) == 2


async def test_emitted_tokens_that_break_the_grammar_fail_their_ask_alone(engine: Engine) -> None:
    grammar = Grammar(kind="regex", source="[0-9]{3}")
    prepared = await engine.prepare(ask(n=2, grammar=grammar, emitted={0: (97,), 1: (97,)}))
    pid = engine.pid
    with pytest.raises(EngineFailed):
        async for _ in engine.generate(prepared.ask):
            pass
    assert len((await answer(engine, ask())).ids[0]) == 24
    assert engine.pid == pid


async def test_closing_fails_what_waits(engine: Engine) -> None:
    prepared = await engine.prepare(ask(limit_tokens=1500))
    stream = engine.generate(prepared.ask)
    await anext(stream)
    await engine.close()
    with pytest.raises(EngineFailed):
        async for _ in stream:
            pass
    with pytest.raises(EngineFailed):
        await engine.prepare(ask())


async def test_prompts_that_wait_to_be_read_are_bounded_too(tmp_path: Path) -> None:
    engine = await started("qwen2", tmp_path, inbox=8)
    try:
        flood = [engine.prepare(ask(f"{n} {PROMPT}" * 50, account="flood")) for n in range(20)]
        polite = engine.prepare(ask(account="polite"))
        *results, other = await asyncio.gather(*flood, polite, return_exceptions=True)
        refused = [r for r in results if isinstance(r, Overloaded)]
        assert len(refused) == 16, "half of the inbox is one account's"
        assert not isinstance(other, BaseException)
        assert not engine._unanswered
    finally:
        await engine.close()

"""An interactive ask of one model stops a long step of another that computes for lower classes; and what is stopped
goes on where it was, and comes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nimbos.engine import llama
from nimbos.engine.calibrate import StepTime
from nimbos.engine.embedder import Embedder
from nimbos.engine.lease import Lease
from nimbos.engine.llama import Library
from nimbos.engine.loop import Loop
from nimbos.engine.model import Floats, Model, ModelOptions
from nimbos.engine.protocol import FromEngine, Produced, Submit
from nimbos.engine.scheduler import Rules
from nimbos.types import Ask, AskClass, Kind, Sampling, TokenChunk, VectorChunk, new_id
from tests import tiny_gguf
from tests.engine.asking import answer, ask, settings_in, started

LOWER = (AskClass.AGENT, AskClass.BATCH)


class Pair:
    """Two engines' leases, of one home."""

    def __init__(self, folder: Path) -> None:
        self.holder, self.other = Lease(folder / "lease"), Lease(folder / "lease")

    def interrupts(self, ask_class: AskClass, *, interruptible: bool = True) -> bool:
        """Whether an ask that comes to the other one, while this one computes, raises this one's flag."""
        with self.holder.hold(ask_class, interruptible=interruptible):
            self.other.interrupt_others()
            raised = self.holder.flag[0] != b"\0"
        self.holder.flag[0] = b"\0"
        return raised


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.holder.close()
    made.other.close()


@pytest.mark.parametrize("ask_class", LOWER)
def test_a_step_of_a_lower_class_is_stopped_and_the_next_one_is_not(pair: Pair, ask_class: AskClass) -> None:
    assert [pair.interrupts(ask_class) for _ in range(5)] == [True, False, True, False, True]


def test_steps_of_the_same_class_and_those_that_cannot_be_taken_back_are_not(pair: Pair) -> None:
    assert not pair.interrupts(AskClass.INTERACTIVE)
    assert not pair.interrupts(AskClass.BATCH, interruptible=False)


def test_nobody_stops_itself_or_whom_it_would_not_come_before(pair: Pair) -> None:
    with pair.holder.hold(AskClass.BATCH, interruptible=True):
        pair.holder.interrupt_others()
        assert pair.holder.flag[0] == b"\0"
    pair.other._virtual = pair.holder._virtual + 1e6  # it has had far more
    assert not pair.interrupts(AskClass.BATCH)


def test_who_stopped_another_is_next(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own thread that computes announces itself a moment later; until then its place is kept."""
    monkeypatch.setattr("nimbos.engine.lease._ARRIVING_S", 60.0)
    with pair.holder.hold(AskClass.BATCH, interruptible=True):
        pair.other.interrupt_others()
    pair.holder._announce()
    assert pair.holder._somebody_before()
    with pair.other.hold(AskClass.INTERACTIVE):
        pass
    monkeypatch.setattr("nimbos.engine.lease._AWAY_S", 0.0)
    assert not pair.holder._somebody_before()


@contextlib.contextmanager
def model_of(arch: str, folder: Path, lease: Lease, *, step_tokens: int) -> Iterator[Model]:
    options = ModelOptions(cells=2048, sequences=16, threads=1, step_tokens=step_tokens)
    model = Model(Library(llama.wheel_library()), tiny_gguf.write(arch, folder), options)
    model.open_context(lease.flag)
    try:
        yield model
    finally:
        model.close()


class Interrupted:
    """A lease under which the other engine is asked something at the begin of the steps of these numbers."""

    def __init__(self, pair: Pair, *steps: int) -> None:
        self.pair, self.steps, self.number = pair, steps, 0

    @contextlib.contextmanager
    def hold(self, ask_class: AskClass, *, interruptible: bool) -> Iterator[None]:
        with self.pair.holder.hold(ask_class, interruptible=interruptible):
            if self.number in self.steps:
                self.pair.other.interrupt_others()
            self.number += 1
            yield


def generated(model: Model, hold: Interrupted) -> tuple[list[int], int]:
    """Tokens of a greedy answer, and how many steps were stopped."""
    model.clear()
    posted: list[FromEngine] = []
    costs = StepTime.prior(weight_bytes=model.weight_bytes, kv_bytes_per_token=model.kv_bytes_per_token)
    loop = Loop(model, costs, Rules(), post=posted.append, hold=hold.hold, share=True, context_limit=512)
    greedy = Sampling(temperature=0.0)
    wanted = Ask(id=new_id("ask"), account="a", model="m", ask_class=AskClass.BATCH, limit_tokens=12, sampling=greedy)
    loop.submit(Submit(ask=wanted), tuple(range(7, 207)), None)
    while loop.step(lambda: None):
        loop.check()
    assert loop.idle
    chunks = [chunk for message in posted if isinstance(message, Produced) for _, chunk in message.chunks]
    return [
        token for chunk in chunks if isinstance(chunk, TokenChunk) for token in chunk.ids
    ], loop.counters.preemptions


def test_what_is_stopped_says_the_same(pair: Pair, tmp_path: Path) -> None:
    with model_of("qwen2", tmp_path, pair.holder, step_tokens=128) as model:
        want, stopped = generated(model, Interrupted(pair))
        assert (len(want), stopped) == (12, 0)
        assert generated(model, Interrupted(pair, 0, 1, 2, 5)) == (want, 3)  # the second runs to its end


@pytest.mark.parametrize("arch", ["qwen3-embedding", "bert-embedding"])
def test_an_embedding_that_is_stopped_is_computed_again(arch: str, pair: Pair, tmp_path: Path) -> None:
    with model_of(arch, tmp_path, pair.holder, step_tokens=512) as model:
        want, steps = embedded(model, Interrupted(pair))
        again, more = embedded(model, Interrupted(pair, 0))
        assert (steps, more) == (1, 2)
        assert np.allclose(again, want, atol=0.02)


def embedded(model: Model, hold: Interrupted) -> tuple[list[Floats], int]:
    """Vectors, and how many steps were tried."""
    posted: list[FromEngine] = []
    embedder = Embedder(model, Rules(max_rows=512), post=posted.append, hold=hold.hold)
    wanted = Ask(id=new_id("ask"), account="a", model="m", parts=(), kind=Kind.EMBED, ask_class=AskClass.BATCH)
    embedder.submit(Submit(ask=wanted), (tuple(range(7, 47)), tuple(range(20, 90))))
    while embedder.step(lambda: None):
        pass
    chunks = [chunk for message in posted if isinstance(message, Produced) for _, chunk in message.chunks]
    return [np.frombuffer(c.values, "<f4") for c in chunks if isinstance(c, VectorChunk)], hold.number


async def test_an_engine_to_which_somebody_speaks_stops_another_one(tmp_path: Path) -> None:
    """A real engine, and beside it a lease of ours that computes a long batch."""
    engine = await started("qwen2", tmp_path)
    ours = Lease(settings_in(tmp_path).run_dir / "lease")
    try:
        with ours.hold(AskClass.BATCH, interruptible=True):
            agent = asyncio.create_task(answer(engine, ask(ask_class=AskClass.AGENT)))
            await until_waiting(ours)
            assert ours.flag[0] == b"\0", "an agent's ask is not urgent"
            person = asyncio.create_task(answer(engine, ask(ask_class=AskClass.INTERACTIVE)))
            while ours.flag[0] == b"\0":
                await asyncio.to_thread(os.sched_yield)
        assert len((await person).ids[0]) == 24 == len((await agent).ids[0])
    finally:
        await engine.close()
        ours.close()


async def until_waiting(ours: Lease) -> None:
    """Another process cannot set our events."""
    while not any(row.state == 1 for row in ours._rows() if row.slot != ours._slot):
        await asyncio.to_thread(os.sched_yield)

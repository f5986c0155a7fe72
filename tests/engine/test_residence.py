"""Contexts that are written out and put back: nothing is lost, mixed up or counted twice, and no logit changes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nimbos.engine import llama, residence, store
from nimbos.engine import loop as loop_module
from nimbos.engine.calibrate import StepTime
from nimbos.engine.context import ContextTree, Copy, NoRoom, Operation
from nimbos.engine.llama import Library
from nimbos.engine.loop import Loop
from nimbos.engine.model import Model, ModelOptions, Rows
from nimbos.engine.protocol import FromEngine, Produced, Submit
from nimbos.engine.residence import Residence
from nimbos.engine.scheduler import Rules
from nimbos.engine.store import Piece, Store
from nimbos.engine.swapfile import Extent, SwapFile
from nimbos.meterfile import MeterFile
from nimbos.types import AskClass, Final, Tokens, Usage
from tests import tiny_gguf
from tests.engine.asking import PROMPT, answer, ask, started
from tests.engine.test_engine import greedy_up_to_ties
from tests.engine.test_metering import told_and_counted

CELLS, SEQUENCES = 60, 6
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14)
ACCOUNTS = st.sampled_from(("anna", "bert"))


def swap_file(size_bytes: int) -> SwapFile:
    made = SwapFile.make(Path(tempfile.gettempdir()), size_bytes)
    assert made is not None
    return made


class Memory:
    """What a model holds, said naively: for each sequence its tokens by position. Cells are counted once however many
    sequences hold them, as (number of the computing, position)."""

    kv_bytes_per_token = 1

    def __init__(self) -> None:
        self.held: dict[int, dict[int, tuple[int, int]]] = {}  # sequence → position → (token, cell)
        self.cells = 0

    def compute(self, sequence: int, start: int, tokens: Sequence[int]) -> None:
        own = self.held.setdefault(sequence, {})
        for offset, token in enumerate(tokens):
            assert start + offset not in own, "computed over what is there"
            self.cells += 1
            own[start + offset] = token, self.cells

    def copy(self, source: int, target: int, end: int, *, start: int = 0) -> None:
        taken = {p: self.held[source][p] for p in range(start, end)}
        assert not taken.keys() & self.held.get(target, {}).keys(), "copied over what is there"
        self.held.setdefault(target, {}).update(taken)

    def save(self, sequence: int) -> np.ndarray:
        rows = [(position, token) for position, (token, _) in sorted(self.held[sequence].items())]
        return np.array(rows, np.uint8).reshape(-1)

    def load(self, sequence: int, state: np.ndarray) -> bool:
        assert not self.held.get(sequence), "the scratch sequence was in use"
        for position, token in state.reshape(-1, 2).tolist():
            self.compute(sequence, position, [token])
        assert self.used <= CELLS, "more cells than there are"
        return True

    def drop(self, sequence: int, start: int = 0) -> None:
        self.held[sequence] = {p: t for p, t in self.held.get(sequence, {}).items() if p < start}
        if not self.held[sequence]:
            del self.held[sequence]

    @property
    def used(self) -> int:
        return len({cell for own in self.held.values() for _, cell in own.values()})

    def tokens(self, sequence: int) -> list[int]:
        own = self.held.get(sequence, {})
        assert sorted(own) == list(range(len(own))), "a hole"
        return [own[p][0] for p in range(len(own))]


class Swapping(RuleBasedStateMachine):
    """Opening, computing, ending, pinning, writing out and making room in any order."""

    disk_bytes = 0

    def __init__(self) -> None:
        super().__init__()
        self.swap = swap_file(self.disk_bytes) if self.disk_bytes else None
        self.before = residence.PIECE_TOKENS_MIN, store.WORTH_RESTORING
        residence.PIECE_TOKENS_MIN, store.WORTH_RESTORING = 2, 1
        self.memory = Memory()
        self.tree = ContextTree(cells=CELLS, sequences=SEQUENCES)
        self.residence = Residence(
            self.memory,  # type: ignore[arg-type]
            self.tree,
            scratch=SEQUENCES,
            budget_bytes=60,
            perform=self.perform,
            swap=self.swap,
        )
        self.residence._piece_tokens = 4
        self.live: dict[int, list[int]] = {}
        self.now = 0

    def teardown(self) -> None:
        residence.PIECE_TOKENS_MIN, store.WORTH_RESTORING = self.before

    def perform(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            if isinstance(operation, Copy):
                self.memory.copy(operation.source, operation.target, operation.end)
            else:
                self.memory.drop(operation.branch, operation.start)

    @rule(account=ACCOUNTS, tokens=TOKENS)
    def open(self, account: str, tokens: list[int]) -> None:
        match = self.tree.match(account, tokens[:-1])
        kept = self.residence.piece_cells(account, tokens[:-1], match.length)
        self.perform(self.tree.make_room(max(len(tokens) - match.length, kept), keep=match))
        try:
            branch, operations = self.tree.open(account, match, self.now)
        except NoRoom:
            return
        self.perform(operations)
        known = self.residence.put_back(branch, account, tokens[:-1], match.length)
        assert match.length <= known <= len(tokens) - 1
        assert self.memory.tokens(branch) == tokens[:known], "what was put back belongs elsewhere"
        rest = tokens[known:]
        if len(rest) <= self.tree.free_cells:
            self.tree.extend(branch, rest)
            self.memory.compute(branch, known, rest)
        self.live[branch] = self.memory.tokens(branch)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        branch = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[branch]
        self.perform(self.tree.retire(branch))

    @precondition(lambda self: any(self.live.values()))
    @rule(data=st.data(), duration=st.integers(1, 20))
    def pin(self, data: st.DataObject, duration: int) -> None:
        branch = data.draw(st.sampled_from([b for b, tokens in sorted(self.live.items()) if tokens]))
        self.tree.pin(branch, data.draw(st.integers(1, len(self.live[branch]))), self.now, duration)

    @rule(ticks=st.integers(1, 10))
    def pass_time(self, ticks: int) -> None:
        self.now += ticks
        self.tree.expire(self.now)

    @rule(pieces=st.integers(1, 6))
    def write_out(self, pieces: int) -> None:
        pinned = self.tree.pinned_cells
        for _ in range(pieces):
            used = self.tree.used_cells
            if not self.residence.write_out_one():
                assert self.tree.used_cells == used
                break
            assert self.tree.used_cells < used, "wrote something out and freed nothing"
        assert self.tree.pinned_cells == pinned, "a pin was written out"

    @rule(cells=st.integers(1, CELLS))
    def make_room(self, cells: int) -> None:
        self.perform(self.tree.make_room(cells))

    @invariant()
    def agrees(self) -> None:
        self.tree.check()
        assert self.memory.used == self.tree.used_cells <= CELLS
        assert SEQUENCES not in self.memory.held, "the scratch sequence was left full"
        for branch in set(self.memory.held) | set(self.live):
            assert self.tree.tokens(branch) == self.memory.tokens(branch)
        for branch, tokens in self.live.items():
            assert self.memory.tokens(branch) == tokens
        assert self.residence._store.used_bytes <= 60
        assert self.residence._store.disk_bytes <= self.disk_bytes
        if self.swap is not None:
            self.swap.check()
        assert (self.residence.stored_bytes == 0) == (len(self.residence._store) == 0)


class SwappingToDisk(Swapping):
    disk_bytes = 90


TestSwapping = Swapping.TestCase
TestSwapping.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSwappingToDisk = SwappingToDisk.TestCase
TestSwappingToDisk.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_all_of_a_context_comes_back_in_pieces() -> None:
    machine = Swapping()
    try:
        tokens = list(range(40))
        machine.open("anna", tokens)
        (branch,) = machine.live
        del machine.live[branch]
        machine.perform(machine.tree.retire(branch))
        while machine.residence.write_out_one():
            machine.agrees()
        assert machine.tree.used_cells == 0
        assert machine.residence.written_tokens > 40
        pieces = machine.residence._store._pieces.values()
        assert len(pieces) > 2
        assert len({id(piece.tokens) for piece in pieces}) == 1, "a list of all its tokens for each piece"
        machine.open("bert", tokens)
        assert machine.residence.restored_tokens == 0, "another account's"
        machine.open("anna", [*tokens[:30], 99])
        assert machine.residence.restored_tokens <= 30
    finally:
        machine.teardown()


def test_the_store_keeps_to_its_budget_and_lets_the_oldest_go() -> None:
    kept = Store(100)
    pieces = [Piece("a", list(range(40)), n, n + 20, np.zeros(40, np.uint8)) for n in range(0, 20, 4)]
    for piece in pieces:
        kept.put(piece)
    assert len(kept) == 2
    assert kept.used_bytes == 80
    assert kept.find("a", list(range(40)), 2) is None
    found = kept.find("a", list(range(40)), 16)
    assert found is not None
    assert found.piece is pieces[-1]
    kept.put(Piece("a", list(range(40)), 0, 20, np.zeros(101, np.uint8)))
    assert len(kept) == 0


@pytest.mark.parametrize(
    ("arch", "flash"), [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3moe", True), ("llama", True)]
)
def test_the_logits_of_a_context_that_was_away_are_the_same(arch: str, flash: bool, tmp_path: Path) -> None:
    """Two contexts share a beginning; one of them is written out in pieces, others come and go, and it is put back. In
    other cells than before, so sums are rounded otherwise; one spoiled layer of one piece shows much more. Without
    flash attention the values lie the other way round in memory."""
    path = tiny_gguf.write(arch, tmp_path)
    options = ModelOptions(cells=1024, sequences=8, threads=1, step_tokens=512, flash_attention=flash)

    def run(*, away: bool, spoiled: bool = False, disk: bool = False) -> np.ndarray:
        model = Model(Library(llama.wheel_library()), path, options)
        model.open_context()
        tree = ContextTree(cells=model.cells, sequences=7)
        shared = model.tokenize((PROMPT * 4).encode(), False)
        own = model.tokenize((PROMPT[::-1] * 6).encode(), False)

        def perform(operations: Sequence[Operation]) -> None:
            for operation in operations:
                if isinstance(operation, Copy):
                    model.copy(operation.source, operation.target, operation.end)
                else:
                    model.drop(operation.branch, operation.start)

        def compute(tokens: list[int]) -> int:
            match = tree.match("a", tokens[:-1])
            branch, operations = tree.open("a", match)
            perform(operations)
            at = keeper.put_back(branch, "a", tokens[:-1], match.length)
            model.arm()
            model.decode([Rows(sequence=branch, start=at, tokens=tokens[at:], logits=True)])
            tree.extend(branch, tokens[at:])
            return branch

        swap = SwapFile.make(tmp_path, 1 << 28) if disk else None
        memory_bytes = 0 if disk else 1 << 28
        keeper = Residence(model, tree, scratch=7, budget_bytes=memory_bytes, perform=perform, swap=swap)
        keeper._piece_tokens = 100
        other = compute([*shared, 5, 6, 7])
        perform(tree.retire(compute([*shared, *own])))
        before = tree.used_cells
        if away:
            while len(own) > 0 and tree.used_cells > tree.length(other):
                assert keeper.write_out_one()
            perform(tree.retire(compute([9, 8, 7] * 30)))
        if spoiled:
            piece = max(keeper._store._pieces.values(), key=lambda piece: piece.end)
            piece.state[-piece.state.nbytes // 8 :] = 0
        last = compute([*shared, *own, 11])
        assert keeper.restored_tokens == (len(own) if away else 0)
        assert tree.length(last) == len(shared) + len(own) + 1
        assert before > len(shared) + len(own)
        logits: np.ndarray = model.logits(1)[0].copy()
        tree.check()
        model.close()
        return logits

    undisturbed, returned = run(away=False), run(away=True)
    assert np.abs(undisturbed).max() > 1
    assert np.abs(undisturbed - returned).max() < 0.02
    assert np.abs(undisturbed - run(away=True, disk=True)).max() < 0.02
    assert np.abs(undisturbed - run(away=True, spoiled=True)).max() > 0.15


async def test_contexts_that_do_not_fit_come_back_instead_of_being_computed_again(tmp_path: Path) -> None:
    meters = MeterFile.create(tmp_path / "run")
    engine = await started("qwen2", tmp_path, meters=meters, cells=512)
    try:
        prompts = [f"{n} {PROMPT * 3}" for n in range(12)]
        first = [await told_and_counted(engine, meters, ask(prompt, ignore_eos=True)) for prompt in prompts]
        computed = (await engine.stats()).computed_tokens
        assert all(told.usage.cached <= 1 for told, _ in first)
        again = [await told_and_counted(engine, meters, ask(prompt, ignore_eos=True)) for prompt in prompts]
        stats = await engine.stats()
        assert stats.swapped_out_tokens > 512
        assert stats.swapped_in_tokens > 512
        assert stats.computed_tokens - computed < computed / 2
        for (told, _), prompt in zip(again, prompts, strict=True):
            assert told.usage.cached > told.usage.input - 40
            (part,) = (await engine.prepare(ask(prompt))).ask.parts
            assert greedy_up_to_ties(engine.model_path, part.ids, told.ids[0])  # type: ignore[union-attr]
        assert stats.cells_used <= 512
    finally:
        await engine.close()


async def test_many_at_once_in_few_cells_are_answered_with_and_without_a_store(tmp_path: Path) -> None:
    for megabytes in (0, 1, 64):
        engine = await started("llama", tmp_path, cells=512, swap_memory_mib=megabytes, sequences=16)
        try:
            asks = [
                ask(f"{n % 9} {PROMPT * 2}", limit_tokens=30, ignore_eos=True, account=f"{n % 2}") for n in range(40)
            ]
            tolds = await asyncio.gather(*(answer(engine, each) for each in asks))
            assert all(told.final.usage.output == 30 for told in tolds)
            stats = await engine.stats()
            assert stats.swapped_bytes <= megabytes * 1024 * 1024
            assert (stats.swapped_out_tokens > 0) == (megabytes > 0)
            assert stats.cells_used <= 512
        finally:
            await engine.close()


def test_used_cells_make_a_step_longer_and_the_engine_learns_by_how_much() -> None:
    costs = StepTime.prior(weight_bytes=100_000_000, kv_bytes_per_token=46_000, heads=270, threads=2)
    alone = costs.predict(1, 100)
    costs.used_cells = 8192
    assert costs.predict(1, 100) > alone + 1
    assert costs.predict(16, 1600) - costs.predict(1, 100) > 15 * (costs.predict(1, 100) - alone) * 0.9
    truth = StepTime.prior(weight_bytes=100_000_000, kv_bytes_per_token=46_000, heads=540, threads=2)
    for number in range(400):
        for model in (costs, truth):
            model.used_cells = 8192 if number % 2 else 200
        rows = (1, 4, 16)[number % 3]
        costs.observe(rows, 100 * rows, truth.predict(rows, 100 * rows))
    for used in (200, 8192):
        costs.used_cells = truth.used_cells = used
        for rows in (1, 4, 16):
            assert costs.predict(rows, 100 * rows) == pytest.approx(truth.predict(rows, 100 * rows), rel=0.15)
    assert 0 < costs.idle_cells(0.1) < costs.idle_cells(0.5)


def test_what_is_too_much_for_the_memory_goes_to_the_disk_and_the_oldest_there_is_lost() -> None:
    kept = Store(100, swap_file(90))
    pieces = [Piece("a", list(range(60)), n, n + 20, np.full(40, n, np.uint8)) for n in range(0, 24, 4)]
    for piece in pieces:
        kept.put(piece)
    assert (len(kept), kept.used_bytes, kept.disk_bytes) == (4, 80, 80)
    assert kept.find("a", list(range(60)), 2) is None, "the first two are gone"
    for piece in pieces[2:]:
        state = kept.state(piece)
        assert state is not None
        assert state.tolist() == [piece.start] * 40
    for piece in pieces[2:]:
        kept.remove(piece)
    assert (len(kept), kept.used_bytes, kept.disk_bytes) == (0, 0, 0)
    assert not kept._of_account, "what an account that has nothing here leaves behind"
    kept.put(Piece("a", list(range(60)), 0, 20, np.zeros(101, np.uint8)))
    assert len(kept) == 0, "larger than both"


def test_a_disk_that_fails_costs_the_piece_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Store(40, swap_file(1000))
    pieces = [Piece("a", list(range(60)), n, n + 20, np.full(40, n, np.uint8)) for n in range(3)]
    kept.put(pieces[0])
    kept.put(pieces[1])
    assert kept.disk_bytes == 40

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", full)
        kept.put(pieces[2])
    assert (len(kept), kept.disk_bytes) == (2, 40), "the one on disk stays"
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", full)
        assert kept.state(pieces[0]) is None
    again = kept.state(pieces[0])
    assert again is not None
    assert again.tolist() == [0] * 40


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), max_size=40), order=st.randoms(use_true_random=False))
def test_room_on_the_disk_is_never_given_twice_and_never_lost(sizes: list[int], order: random.Random) -> None:
    file, held = swap_file(200), list[tuple[Extent, bytes]]()
    for number, size in enumerate(sizes):
        content = bytes([number % 256]) * size
        while (extent := file.write(np.frombuffer(content, np.uint8))) is None:
            gone, _ = held.pop(order.randrange(len(held)))
            file.free(gone)
        held.append((extent, content))
        file.check()
        for kept, said in held:
            state = file.read(kept)
            assert state is not None
            assert state.tobytes() == said
    for kept, _ in held:
        file.free(kept)
    file.check()
    assert file.used_bytes == 0
    whole = file.write(np.zeros(200, np.uint8))
    assert whole == Extent(0, 200), "in one piece again"
    os.close(file._descriptor)


@pytest.mark.parametrize("where", ["memory", "disk"])
async def test_a_run_that_waited_for_its_tool_goes_on_without_a_prefill(where: str, tmp_path: Path) -> None:
    """What an agent's asks look like: each begins with all that was said before. While it waits, others fill the cells,
    and its context is written out; then it goes on, and only what is new to it is computed."""
    memory, disk = (64, 0) if where == "memory" else (0, 64)
    engine = await started("qwen2", tmp_path, cells=768, swap_memory_mib=memory, swap_disk_mib=disk)
    try:
        stable = PROMPT * 6

        async def ids_of(text: str) -> tuple[int, ...]:
            (part,) = (await engine.prepare(ask(text))).ask.parts
            assert isinstance(part, Tokens)
            return part.ids

        async def turn(ids: tuple[int, ...], process: str) -> tuple[tuple[int, ...], Usage]:
            wanted = ask(ignore_eos=True, process=process, ask_class=AskClass.AGENT)
            told = await answer(engine, msgspec.structs.replace(wanted, parts=(Tokens(ids),)))
            return (*ids, *told.ids[0]), told.usage

        said, first = await turn(await ids_of(f"{stable} its own past: {PROMPT * 8}"), "parked")
        assert first.cached <= 1
        for number in range(8):
            await turn(await ids_of(f"{stable} {number} {PROMPT[number:] * 8}"), f"other {number}")
        before = await engine.stats()
        assert before.swapped_out_tokens > 0, "the cells hold one of them at a time"
        result = await ids_of(" the tool says yes")
        _, usage = await turn((*said, *result), "parked")
        after = await engine.stats()
        assert after.swapped_in_tokens > before.swapped_in_tokens
        assert usage.recomputed == 0
        new = usage.input - usage.cached
        assert new <= len(result) + 2, "and the last token it had said, which was not computed then"
        assert after.computed_tokens - before.computed_tokens <= new + usage.output
        if where == "disk":
            assert not list((tmp_path / "run").glob("swap-*")), "its file has no name"
    finally:
        await engine.close()


@pytest.mark.parametrize("busy", [False, True])
def test_a_long_context_leaves_whole_and_comes_back_whatever_one_step_may_wait_for(
    busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pieces are more than are written out between two steps; the first of them, which is the last to be written,
    is what the others are put back behind. `busy`: others' steps go on meanwhile."""
    monkeypatch.setattr(loop_module, "PIECES_AT_ONCE", 2)
    options = ModelOptions(cells=768 if busy else 512, sequences=9, threads=1, step_tokens=128)
    model = Model(Library(llama.wheel_library()), tiny_gguf.write("qwen2", tmp_path), options)
    model.open_context()
    costs = StepTime.prior(weight_bytes=model.weight_bytes, kv_bytes_per_token=model.kv_bytes_per_token)
    posted: list[FromEngine] = []
    loop = Loop(
        model, costs, Rules(), post=posted.append, hold=lambda _, interruptible: contextlib.nullcontext(), share=True,
        context_limit=512, swap_bytes=1 << 24,
    )  # fmt: skip
    loop.residence._piece_tokens = 40
    put_back, load = [0], model.load  # pieces, in each step

    def counting(sequence: int, state: np.ndarray) -> bool:
        put_back[-1] += 1
        return load(sequence, state)

    monkeypatch.setattr(model, "load", counting)

    def submit(first: int, tokens: int, *, limit: int = 1, account: str = "a") -> str:
        prompt = tuple(7 + (first * 37 + n * (n + first)) % 40 for n in range(tokens))
        one = ask(limit_tokens=limit, ignore_eos=True, account=account, ask_class=AskClass.AGENT)
        loop.submit(Submit(ask=one), prompt, None)
        return one.id

    def until(ask_id: str) -> Final:
        while loop.step(lambda: None):
            loop.check()
            put_back.append(0)
            told = [c for m in posted if isinstance(m, Produced) for i, c in m.chunks if i == ask_id]
            if told and isinstance(told[-1], Final):
                return told[-1]
        raise AssertionError("it was never answered")

    try:
        until(submit(1, 450))
        if busy:
            submit(3, 20, limit=400, account="b")
            for _ in range(3):
                loop.step(lambda: None)
        until(submit(2, 500))
        assert loop.residence.written_tokens > 4 * 40, "more than the two pieces of one step"
        computed = loop.counters.computed_tokens
        final = until(submit(1, 450))
        assert loop.residence.restored_tokens > 4 * 40
        assert max(put_back) == 2, "others wait for as much of it as for what is written out"
        assert final.usage.cached > 450 - 32
        if not busy:
            assert loop.counters.computed_tokens - computed < 32
    finally:
        model.close()

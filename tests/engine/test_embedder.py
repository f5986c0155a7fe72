"""Who is embedded first, and how long a step is: a real tiny model, on a clock that its steps turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from nimbos.engine import embedder, llama
from nimbos.engine.embedder import Embedder
from nimbos.engine.llama import Library
from nimbos.engine.model import Model, ModelOptions, Rows
from nimbos.engine.protocol import Failed, FromEngine, Produced, Submit
from nimbos.engine.scheduler import Rules
from nimbos.types import Ask, AskClass, Final, Kind, VectorChunk, new_id
from tests import tiny_gguf

RULES = Rules(max_rows=2048)


class Clock:
    """What `embedder.py` takes for the module `time`."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    perf_counter = monotonic


class Timed(Model):
    """Computes; and says that it took `token_ms` for each token."""

    token_ms = 1.0
    clock = Clock()

    def decode(self, rows: Sequence[Rows], *, every: bool = False) -> int:
        self.clock.now_s += self.token_ms * sum(len(row.tokens) for row in rows) / 1e3
        return super().decode(rows, every=every)


class Bench:
    def __init__(self, model: Timed, rules: Rules = RULES) -> None:
        self.model = model
        self.told: dict[str, list[int]] = {}
        self.finished: list[str] = []
        self.failed: list[str] = []
        self.rows: list[int] = []  # of each step
        self.embedder = Embedder(model, rules, post=self._post, hold=self._hold)

    def submit(self, account: str, ask_class: AskClass, *lengths: int) -> str:
        ask = Ask(id=new_id("ask"), account=account, model="tiny", parts=(), kind=Kind.EMBED, ask_class=ask_class)
        self.embedder.submit(Submit(ask=ask), tuple(tuple([7] * length) for length in lengths))
        self.told[ask.id] = []
        return ask.id

    def step(self) -> bool:
        before = self.embedder.counters.step_rows
        going = self.embedder.step(lambda: None)
        self.rows.append(self.embedder.counters.step_rows - before)
        return going

    def _post(self, message: FromEngine) -> None:
        if isinstance(message, Failed):
            assert message.refusal.server_fault
            self.failed.append(message.ask_id)
            return
        assert isinstance(message, Produced)
        for ask_id, chunk in message.chunks:
            if isinstance(chunk, VectorChunk):
                self.told[ask_id].append(chunk.index)
            elif isinstance(chunk, Final):
                self.finished.append(ask_id)

    @contextmanager
    def _hold(self, ask_class: AskClass, *, interruptible: bool) -> Iterator[None]:
        yield


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Timed]:
    monkeypatch.setattr(Timed, "clock", Clock())
    monkeypatch.setattr(embedder, "time", Timed.clock)
    options = ModelOptions(cells=2048, sequences=64, threads=1, step_tokens=2048)
    made = Timed(Library(llama.wheel_library()), tiny_gguf.write("qwen3-embedding", tmp_path), options)
    made.open_context()
    yield made
    made.close()


def test_people_go_first_and_batches_are_not_starved_by_them(model: Timed) -> None:
    model.token_ms = 5.0
    bench = Bench(model)
    waiting = bench.submit("batch", AskClass.BATCH, 100)
    begun = model.clock.now_s
    while not bench.told[waiting]:
        bench.submit("people", AskClass.INTERACTIVE, 150, 150)
        assert bench.step()
    waited_ms = (model.clock.now_s - begun) * 1e3
    assert 2 * RULES.age_ms <= waited_ms <= 2 * RULES.age_ms + 1500


def test_a_flood_that_grows_old_overtakes_nobody(model: Timed) -> None:
    """Its first asks were served lately, so its class has not aged, however long the last of it waits."""
    model.token_ms = 5.0
    bench = Bench(model)
    for _ in range(80):
        bench.submit("flood", AskClass.BATCH, 150)
    for _ in range(40):
        assert bench.step()
    assert model.clock.now_s - 1000 >= 2 * RULES.age_ms / 1e3
    person = bench.submit("person", AskClass.INTERACTIVE, 10)
    bench.step()
    assert person in bench.finished


def test_accounts_of_one_class_share(model: Timed) -> None:
    bench = Bench(model)
    flood = [bench.submit("flood", AskClass.BATCH, 150) for _ in range(40)]
    polite = [bench.submit("polite", AskClass.BATCH, 150) for _ in range(4)]
    for _ in range(10):
        bench.step()
    assert all(ask in bench.finished for ask in polite)
    assert sum(ask in bench.finished for ask in flood) >= 4


def test_a_step_is_as_long_as_nobody_minds(model: Timed) -> None:
    model.token_ms = 0.25
    bench = Bench(model)
    bench.submit("a", AskClass.BATCH, *[20] * 200)
    while bench.step():
        pass
    fitting = int(RULES.stall_target_ms / model.token_ms)
    first, *rest, _, _ = bench.rows
    assert RULES.quiet_rows - 20 < first <= RULES.quiet_rows, "its speed was not known yet"
    assert all(fitting - 40 < rows <= fitting for rows in rest)


def test_a_slow_model_still_fills_its_steps_and_takes_long_inputs_alone(model: Timed) -> None:
    model.token_ms = 40.0
    bench = Bench(model)
    bench.submit("a", AskClass.BATCH, *[20] * 30, 1500, *[20] * 30)
    while bench.step():
        pass
    assert max(rows for rows in bench.rows if rows != 1500) <= RULES.quiet_rows
    assert bench.rows.count(1500) == 1
    assert bench.rows[1] > RULES.quiet_rows - 20


def test_first_come_first_served_where_it_is_not_to_be_fair(model: Timed) -> None:
    bench = Bench(model, Rules(max_rows=2048, fair=False))
    first = bench.submit("a", AskClass.BATCH, 120)
    model.clock.now_s += 0.001
    second = bench.submit("b", AskClass.INTERACTIVE, 120)
    while bench.step():
        pass
    assert bench.finished == [first, second]


def test_what_earlier_steps_left_does_not_fill_the_cells(model: Timed) -> None:
    """Many short inputs, then fewer and longer ones: each kind would leave its last sequences behind."""
    bench = Bench(model, Rules(max_rows=2048, stall_target_ms=1e9))
    model.token_ms = 0.25
    for count, length in ((60, 30), (30, 60), (15, 120), (7, 250), (1, 2048)):
        asked = bench.submit("a", AskClass.BATCH, *[length] * count)
        while bench.step():
            pass
        assert bench.told[asked] == list(range(count))


def test_numbers_that_are_none_fail_their_ask_alone(model: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = model.embedding
    monkeypatch.setattr(model, "embedding", lambda sequence: embedding(sequence) * (np.nan if sequence == 1 else 1))
    bench = Bench(model)
    whole, failing = bench.submit("a", AskClass.BATCH, 20), bench.submit("b", AskClass.BATCH, 20, 20)
    later = bench.submit("c", AskClass.BATCH, 20)
    while bench.step():
        pass
    assert bench.failed == [failing]
    assert bench.finished == [whole, later]
    assert bench.embedder.idle

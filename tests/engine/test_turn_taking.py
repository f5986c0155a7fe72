"""Who computes next, of several engines on the same cores: real leases on a simulated machine whose clock is turned by
hand. Everybody is asked in the worst order: whoever is entitled least tries first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from nimbos.engine import lease
from nimbos.engine.lease import Lease
from nimbos.types import AskClass

TICK_MS = 0.5
CHAT, EMBEDDING = AskClass.INTERACTIVE, AskClass.BATCH


@dataclass(slots=True)
class Clock:
    """What `lease.py` takes for the module `time`."""

    now_ms: float = 0.0

    def monotonic(self) -> float:
        return self.now_ms / 1e3


@dataclass(slots=True, eq=False)
class Simulated:
    """An engine with work from `begin_ms` to `end_ms`: steps of `step_ms`, and `away_ms` between two of them."""

    ask_class: AskClass
    step_ms: float
    away_ms: float = 2.0
    begin_ms: float = 0.0
    end_ms: float = float("inf")
    served_ms: float = 0.0
    begun: list[float] = field(default_factory=list)
    back_ms: float = 0.0
    waiting: bool = False

    def __post_init__(self) -> None:
        self.back_ms = self.begin_ms

    def longest_wait_ms(self, until_ms: float) -> float:
        """From the time when it has work to a step's begin, or from one begin to the next."""
        times = [self.begin_ms, *self.begun, min(until_ms, self.end_ms)]
        return max(later - earlier for earlier, later in pairwise(times))


class Machine:
    def __init__(self, folder: Path, clock: Clock) -> None:
        self._path, self._clock = folder / "lease", clock
        self._leases: dict[Simulated, Lease] = {}

    def close(self) -> None:
        for held in self._leases.values():
            held.close()

    def run(self, *engines: Simulated, until_ms: float) -> None:
        """`engines` come to those that are there."""
        self._leases |= {engine: Lease(self._path) for engine in engines}
        while self._clock.now_ms < until_ms:
            self._announce()
            holder = next(self._entering(), None)
            if holder is None:
                self._clock.now_ms += TICK_MS
            else:
                self._compute(holder)

    def _announce(self) -> None:
        """Of those that came back, also while another one computed."""
        for engine, held in self._leases.items():
            if not engine.waiting and engine.back_ms <= self._clock.now_ms < engine.end_ms:
                engine.waiting = True
                held._announce()

    def _entering(self) -> Iterator[Simulated]:
        waiting = [engine for engine in self._leases if engine.waiting]
        for engine in sorted(waiting, key=lambda e: -self._leases[e]._virtual):
            if self._leases[engine]._enter():
                yield engine

    def _compute(self, engine: Simulated) -> None:
        engine.waiting = False
        engine.begun.append(self._clock.now_ms)
        ends_ms = self._clock.now_ms + engine.step_ms
        while self._clock.now_ms < ends_ms:
            self._announce_but(engine)
            self._clock.now_ms = min(ends_ms, self._clock.now_ms + 1.0)
        engine.served_ms += engine.step_ms
        engine.back_ms = ends_ms + engine.away_ms
        self._leases[engine]._leave(engine.step_ms, engine.ask_class)

    def _announce_but(self, holder: Simulated) -> None:
        back, holder.back_ms = holder.back_ms, float("inf")
        self._announce()
        holder.back_ms = back


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    made = Machine(tmp_path, clock)
    yield made
    made.close()


def test_a_flood_of_chats_leaves_an_embedding_its_share(machine: Machine) -> None:
    chats, embedding = Simulated(CHAT, 100.0), Simulated(EMBEDDING, 400.0)
    machine.run(chats, embedding, until_ms=200_000)
    share = embedding.served_ms / (chats.served_ms + embedding.served_ms)
    assert share == pytest.approx(1 / 17, rel=0.15)
    assert embedding.longest_wait_ms(200_000) < 17 * 400 + 200 + 17 * 4 * 2.0


def test_a_flood_of_embeddings_lets_a_chat_in_at_once_and_leaves_it_its_share(machine: Machine) -> None:
    embeddings = Simulated(EMBEDDING, 400.0)
    chat = Simulated(CHAT, 100.0, begin_ms=30_050)
    machine.run(embeddings, chat, until_ms=230_000)
    assert chat.begun[0] - chat.begin_ms <= 400
    both = chat.served_ms + sum(begun > chat.begin_ms for begun in embeddings.begun) * 400
    assert chat.served_ms / both == pytest.approx(16 / 17, rel=0.05)
    assert chat.longest_wait_ms(230_000) < 400 + 100 + 10, "two steps of the others in a row"


def test_three_classes_share_by_their_weights(machine: Machine) -> None:
    engines = [Simulated(ask_class, 100.0) for ask_class in AskClass]
    machine.run(*engines, until_ms=300_000)
    total = sum(engine.served_ms for engine in engines)
    shares = [engine.served_ms / total for engine in engines]
    assert shares == [pytest.approx(weight / 21, rel=0.1) for weight in (16, 4, 1)]


def test_embeddings_of_people_and_chats_of_people_share_evenly(machine: Machine) -> None:
    chats, embeddings = Simulated(CHAT, 50.0), Simulated(CHAT, 300.0)
    machine.run(chats, embeddings, until_ms=60_000)
    assert chats.served_ms == pytest.approx(embeddings.served_ms, rel=0.05)
    assert chats.longest_wait_ms(60_000) < 400


def test_idle_time_is_no_credit(machine: Machine) -> None:
    chats, late = Simulated(CHAT, 100.0), Simulated(CHAT, 100.0, begin_ms=100_000)
    machine.run(chats, late, until_ms=101_000)
    since = sum(begun >= 100_000 for begun in chats.begun)
    assert abs(since - len(late.begun)) <= 2


def test_time_that_nobody_else_wanted_is_no_debt(machine: Machine) -> None:
    """It computed alone for long, for batches; another one works when a chat comes to it."""
    early = Simulated(EMBEDDING, 400.0, end_ms=100_000)
    chats = Simulated(CHAT, 100.0, begin_ms=100_500)
    machine.run(early, chats, until_ms=110_000)
    early.ask_class, early.step_ms, early.end_ms = CHAT, 100.0, float("inf")
    before = len(early.begun)
    machine.run(until_ms=112_000)
    assert early.begun[before] - 110_000 <= 200
    assert abs(2 * (len(early.begun) - before) - 20) <= 4, "half of the time, and not more"


def test_who_has_no_more_work_holds_nobody_up(machine: Machine) -> None:
    """The entitled one is away for good; its place is kept for a moment and no longer."""
    chat, embeddings = Simulated(CHAT, 20.0, end_ms=1_000), Simulated(EMBEDDING, 100.0)
    machine.run(chat, embeddings, until_ms=11_000)
    assert embeddings.served_ms >= 9_700

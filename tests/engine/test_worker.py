"""The engine process's own threads, hand by hand: what a cancel meets on its way. Nothing here is started, so that it
is the test which says what happens in between."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from nimbos.engine import protocol
from nimbos.engine.worker import Pipe, Worker
from nimbos.types import Ask, Grammar, Tokens
from tests import tiny_gguf
from tests.engine.asking import ask, settings_in

MANY = 5_000


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr("nimbos.engine.confine.confine", lambda _: "none")  # it would hold for all tests
    ours, theirs = socket.socketpair()
    start = protocol.Start(
        model_path=str(tiny_gguf.write("qwen2", tmp_path)),
        model_id="tiny",
        model_hash="0",
        settings=settings_in(tmp_path),
        lease_path="",
    )
    with ours, theirs:
        made = Worker(Pipe(theirs), start)
        yield made
        made._model.close()


def constrained(source: str = "[0-9]{20}", *, allowance_tokens: int | None = None) -> Ask:
    wanted = ask(grammar=Grammar(kind="regex", source=source), allowance_tokens=allowance_tokens)
    return msgspec.structs.replace(wanted, parts=(Tokens((7, 8, 9)),))


def live(worker: Worker) -> int:
    waiting, computing = worker._loop.counts()
    return sum(waiting.values()) + sum(computing.values())


def test_an_ask_that_left_while_its_grammar_was_compiled_is_not_computed(worker: Worker) -> None:
    """However many others left before it, and meanwhile."""
    wanted = constrained()
    worker._sort(protocol.Submit(ask=wanted))
    compiling = worker._preparing.get()
    for number in range(MANY):
        worker._sort(protocol.Cancel(ask_id=f"before {number}"))
    worker._sort(protocol.Cancel(ask_id=wanted.id))
    for number in range(MANY):
        worker._sort(protocol.Cancel(ask_id=f"after {number}"))
    worker._look()
    worker._prepare_one(compiling)
    worker._look()
    assert live(worker) == 0
    assert not worker._compiling


@pytest.mark.parametrize("moment", ["it waits", "it is compiled", "it is in the inbox", "it is computed"])
def test_a_cancel_ends_an_ask_wherever_it_is_and_nothing_is_kept_of_it(worker: Worker, moment: str) -> None:
    wanted = constrained()
    worker._sort(protocol.Submit(ask=wanted))
    worker._sort(protocol.Extend(ask_id=wanted.id, allowance_tokens=64, last=False))
    worker._look()
    if moment == "it waits":
        worker._sort(protocol.Cancel(ask_id=wanted.id))
        assert not worker._preparing.drop(wanted.id), "its grammar would still be compiled"
    else:
        compiling = worker._preparing.get()
        if moment == "it is compiled":
            worker._sort(protocol.Cancel(ask_id=wanted.id))
        worker._prepare_one(compiling)
        if moment == "it is computed":
            worker._look()
            assert live(worker) == 1
        if moment != "it is compiled":
            worker._sort(protocol.Cancel(ask_id=wanted.id))
    worker._look()
    assert live(worker) == 0
    assert not worker._compiling and not worker._extended


def test_what_came_while_the_grammar_was_compiled_is_taken_with_it(worker: Worker) -> None:
    wanted = constrained(allowance_tokens=0)
    worker._sort(protocol.Submit(ask=wanted))
    compiling = worker._preparing.get()
    worker._sort(protocol.Extend(ask_id=wanted.id, allowance_tokens=3, last=True))
    worker._look()
    worker._prepare_one(compiling)
    while worker._loop.step(worker._look):
        pass
    assert worker._loop.counters.output_tokens[wanted.ask_class] == 3
    assert not worker._compiling and not worker._extended


def test_a_grammar_that_is_refused_leaves_nothing(worker: Worker) -> None:
    wanted = constrained("[0-9")
    worker._sort(protocol.Submit(ask=wanted))
    compiling = worker._preparing.get()
    worker._sort(protocol.Extend(ask_id=wanted.id, allowance_tokens=64, last=False))
    worker._look()
    worker._prepare_one(compiling)
    worker._sort(protocol.Cancel(ask_id=wanted.id))  # as the server does when an ask has failed
    worker._look()
    assert live(worker) == 0
    assert not worker._compiling and not worker._extended

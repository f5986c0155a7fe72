"""The compute lease between processes: one at a time, by weight, and never lost with its holder."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from nimbos.engine.lease import Lease
from nimbos.types import AskClass

PROCESSES = multiprocessing.get_context("spawn")


def take_turns(path: Path, log: Path, name: str, turns: int, ask_class: AskClass, go: Event) -> None:
    with Lease(path) as lease:
        go.wait()
        for _ in range(turns):
            with lease.hold(ask_class):
                with log.open("a") as file:
                    file.write(f"{name} in\n")
                for _ in range(20_000):
                    pass
                with log.open("a") as file:
                    file.write(f"{name} out\n")


def hold_for_ever(path: Path, held: Event) -> None:
    lease = Lease(path)
    with lease.hold(AskClass.INTERACTIVE):
        held.set()
        signal.pause()


def test_only_one_engine_computes_at_a_time(tmp_path: Path) -> None:
    path, log, go = tmp_path / "lease", tmp_path / "log", PROCESSES.Event()
    names = ("one", "two", "three")
    started = [
        PROCESSES.Process(target=take_turns, args=(path, log, name, 40, AskClass.AGENT, go), daemon=True)
        for name in names
    ]
    for process in started:
        process.start()
    go.set()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    lines = log.read_text().split("\n")[:-1]
    assert len(lines) == 240
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert entered.split()[0] == left.split()[0], "two were in at once"


def test_a_killed_holder_gives_the_lease_back(tmp_path: Path) -> None:
    path, held = tmp_path / "lease", PROCESSES.Event()
    holder = PROCESSES.Process(target=hold_for_ever, args=(path, held), daemon=True)
    holder.start()
    assert held.wait(60)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    with Lease(path) as lease, lease.hold(AskClass.BATCH):
        pass
    holder.join(60)


def test_a_dead_engine_that_was_waiting_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    with Lease(path) as lease:
        gone = PROCESSES.Process(target=os.getpid)
        gone.start()
        gone.join()
        assert gone.pid is not None
        lease._write(7, gone.pid, True, -1.0)  # it would be first for ever
        with lease.hold(AskClass.INTERACTIVE):
            assert not [row for row in lease._rows() if row.slot == 7]


def test_time_costs_batch_more_than_interactive(tmp_path: Path) -> None:
    with Lease(tmp_path / "one") as batch, Lease(tmp_path / "two") as interactive:
        for _ in range(20):
            with batch.hold(AskClass.BATCH), interactive.hold(AskClass.INTERACTIVE):
                for _ in range(1000):
                    pass
        assert batch._virtual > 4 * interactive._virtual


def test_engines_of_one_home_share_the_table(tmp_path: Path) -> None:
    with Lease(tmp_path / "lease") as one, Lease(tmp_path / "lease") as other:
        assert one._slot != other._slot
        assert len(one._rows()) == 2


@pytest.mark.parametrize("size", [7, 1024, 1 << 16])
def test_a_table_of_another_release_is_begun_anew(tmp_path: Path, size: int) -> None:
    (tmp_path / "lease").write_bytes(b"\xff" * size)
    with Lease(tmp_path / "lease") as lease:
        assert [row.pid for row in lease._rows()] == [os.getpid()]
        with lease.hold(AskClass.INTERACTIVE):
            pass

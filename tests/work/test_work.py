"""Claims: one holder at a time, leases that lapse, and epochs that keep a late holder from writing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import select

from nimbos.config import Settings
from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.work import work as work_table
from nimbos.work import Claim, ClaimLost, Crew, Work

PATIENCE_S = 60
_LEASE_END = Statement(select(work_table.c.free_at_ms))
T = TypeVar("T")


async def test_work_is_claimed_once_and_in_order(database: Database) -> None:
    work = Work(database)
    await database.run(lambda: work.add_many("lines", ["c", "a", "b"]))
    await database.run(lambda: work.add("lines", "d", b"payload"))
    first = await database.run(lambda: work.claim("lines", "one", 3))
    second = await database.run(lambda: work.claim("lines", "two", 3))
    assert [claim.ref for claim in first] == ["a", "b", "c"]
    assert [(claim.ref, claim.payload, claim.epoch) for claim in second] == [("d", b"payload", 1)]
    assert await database.run(lambda: work.claim("others", "one", 3)) == []


async def test_adding_what_is_there_changes_nothing(database: Database) -> None:
    work = Work(database)
    await database.run(lambda: work.add("lines", "a", b"first"))
    (held,) = await database.run(lambda: work.claim("lines", "one", 1))
    await database.run(lambda: work.add("lines", "a", b"second"))
    await database.run(lambda: work.add_many("lines", ["a"]))
    assert await database.run(lambda: work.claim("lines", "two", 1)) == []
    await database.run(lambda: work.finish(held))


async def test_a_lapsed_lease_is_claimed_by_another_and_the_first_cannot_finish(database: Database) -> None:
    work = Work(database, lease_s=0)  # lapsed as soon as it is claimed
    await database.run(lambda: work.add("lines", "a"))
    (first,) = await database.run(lambda: work.claim("lines", "one", 1))
    (second,) = await database.run(lambda: work.claim("lines", "two", 1))
    assert (second.epoch, second.lapses) == (2, 1)
    for late in (work.finish, work.check):
        with pytest.raises(ClaimLost):
            await database.run(lambda late=late: late(first))
    assert not await database.run(lambda: work.release(first))
    await database.run(lambda: work.finish(second))
    assert await database.run(lambda: work.claim("lines", "two", 1)) == []


async def test_what_a_lost_claim_brought_about_is_not_written(database: Database) -> None:
    work = Work(database, lease_s=0)
    await database.run(lambda: work.add("lines", "a"))
    (late,) = await database.run(lambda: work.claim("lines", "one", 1))
    await database.run(lambda: work.claim("lines", "two", 1))

    def settle() -> Transaction[None]:
        yield from work.add("effects", "of a late holder")
        yield from work.finish(late)

    with pytest.raises(ClaimLost):
        await database.run(settle)
    assert await database.run(lambda: work.claim("effects", "one", 1)) == []


async def test_renewed_claims_are_told_and_dropped_ones_are_not_among_them(database: Database) -> None:
    work = Work(database)
    await database.run(lambda: work.add_many("lines", ["a", "b", "c"]))
    held = await database.run(lambda: work.claim("lines", "one", 3))
    assert await database.run(lambda: work.held("lines")) == 3
    await database.run(lambda: work.drop("lines", "b"))
    assert await database.run(lambda: work.renew("one")) == {("lines", "a", 1), ("lines", "c", 1)}
    assert await database.run(lambda: work.renew("two")) == frozenset()
    with pytest.raises(ClaimLost):
        await database.run(lambda: work.finish(held[1]))


async def test_released_work_is_free_at_once_or_after_its_delay(database: Database) -> None:
    work = Work(database)
    await database.run(lambda: work.add_many("lines", ["a", "b"]))
    a, b = await database.run(lambda: work.claim("lines", "one", 2))
    await database.run(lambda: work.release(a))
    await database.run(lambda: work.release(b, delay_s=3600))
    (again,) = await database.run(lambda: work.claim("lines", "two", 2))
    assert (again.ref, again.epoch, again.lapses) == ("a", 2, 0)


async def test_what_a_dead_owner_held_is_free_and_counted(database: Database) -> None:
    work = Work(database)
    await database.run(lambda: work.add_many("lines", ["a", "b"]))
    (held,) = await database.run(lambda: work.claim("lines", "one", 1))
    await database.run(lambda: work.lapse_all("one"))
    with pytest.raises(ClaimLost):
        await database.run(lambda: work.finish(held))
    claims = await database.run(lambda: work.claim("lines", "two", 2))
    assert [(claim.ref, claim.lapses) for claim in claims] == [("a", 1), ("b", 0)]


async def test_delays_of_an_earlier_boot_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = await Database.open(Settings(home=str(tmp_path)))
    try:
        work = Work(opened)
        await opened.run(lambda: work.add("lines", "a", delay_s=3600))
        await opened.run(lambda: work.adopt())
        assert await opened.run(lambda: work.claim("lines", "one", 1)) == []
        monkeypatch.setattr("nimbos.work.claims.boot", lambda: "another boot")
        rebooted = Work(opened)
        await opened.run(lambda: rebooted.adopt())
        (delayed,) = await opened.run(lambda: rebooted.claim("lines", "one", 1))
        monkeypatch.setattr("nimbos.work.claims.boot", lambda: "a third boot")
        again = Work(opened)
        await opened.run(lambda: again.adopt())
        (held,) = await opened.run(lambda: again.claim("lines", "one", 1))
        assert (delayed.lapses, held.lapses) == (0, 1), "whoever held it died with the machine"
    finally:
        await opened.close()


class Claims(RuleBasedStateMachine):
    """Two workers that claim, renew, stall, finish and release in any order, against what each may believe."""

    run: Callable[[Callable[[], Transaction[object]]], object]
    database: Database

    def __init__(self) -> None:
        super().__init__()
        self.round = os.urandom(6).hex()
        self.live = Work(self.database, lease_s=3600)
        self.stalled = Work(self.database, lease_s=0)
        self.added: set[str] = set()
        self.finished: list[str] = []
        self.believed: list[Claim] = []  # everything anybody ever claimed
        self.newest: dict[str, int] = {}
        self.over: set[tuple[str, int]] = set()  # released

    @rule(ref=st.sampled_from("abcdef"))
    def add(self, ref: str) -> None:
        if ref not in self.added:
            self.added.add(ref)
            type(self).run(lambda: self.live.add(self.round, ref))

    @rule(owner=st.sampled_from(["one", "two"]), n=st.integers(0, 3), stalls=st.booleans())
    def claim(self, owner: str, n: int, stalls: bool) -> None:
        work = self.stalled if stalls else self.live
        claims = type(self).run(lambda: work.claim(self.round, owner, n))
        assert isinstance(claims, list) and len(claims) <= n
        for claim in claims:
            assert claim.ref in self.added - set(self.finished)
            assert claim.epoch == self.newest.get(claim.ref, 0) + 1
            self.newest[claim.ref] = claim.epoch
            self.believed.append(claim)

    @rule(at=st.integers(0, 30))
    def finish(self, at: int) -> None:
        if not self.believed:
            return
        claim = self.believed[at % len(self.believed)]
        current = self.newest[claim.ref] == claim.epoch and claim.ref not in self.finished
        current = current and (claim.ref, claim.epoch) not in self.over
        try:
            type(self).run(lambda: self.live.finish(claim))
        except ClaimLost:
            assert not current
        else:
            assert current
            self.finished.append(claim.ref)

    @rule(at=st.integers(0, 30))
    def release(self, at: int) -> None:
        if self.believed:
            claim = self.believed[at % len(self.believed)]
            if type(self).run(lambda: self.live.release(claim)):
                self.over.add((claim.ref, claim.epoch))

    @invariant()
    def each_is_finished_at_most_once(self) -> None:
        assert len(self.finished) == len(set(self.finished))


async def test_two_workers_never_both_finish(database: Database) -> None:
    loop = asyncio.get_running_loop()

    def run(begin: Callable[[], Transaction[T]]) -> T:
        return asyncio.run_coroutine_threadsafe(database.run(begin), loop).result(PATIENCE_S)

    machine = type("Bound", (Claims,), {"run": staticmethod(run), "database": database})
    quick = settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))
    await asyncio.to_thread(run_state_machine_as_test, machine, settings=quick)


async def test_two_workers_at_once_share_the_work_without_overlap(database: Database) -> None:
    work = Work(database)
    await database.run(lambda: work.add_many("lines", [f"{number:03}" for number in range(200)]))
    done: list[str] = []

    async def worker(owner: str) -> None:
        while claims := await database.run(lambda: work.claim("lines", owner, 7)):
            for claim in claims:
                await database.run(lambda claim=claim: work.finish(claim))
                done.append(claim.ref)

    await asyncio.gather(*(worker(f"worker {number}") for number in range(4)))
    assert sorted(done) == [f"{number:03}" for number in range(200)]


# --- a crew


def crew_of(
    database: Database, work: Work, run: Callable[[Claim], object], *, owner: str = "crew", places: int = 4
) -> Crew:
    return Crew(
        database,
        work,
        places=places,
        claim=lambda n: work.claim("lines", owner, n),
        run=run,  # type: ignore[arg-type]
        owner=owner,
        poll_s=0.05,
    )


async def test_a_crew_does_everything_and_never_more_than_its_places_at_once(database: Database) -> None:
    work = Work(database)
    await database.run(lambda: work.add_many("lines", [f"{number:02}" for number in range(30)]))
    busy, most, done = 0, 0, []
    all_done = asyncio.Event()

    async def run(claim: Claim) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0)
        await database.run(lambda: work.finish(claim))
        busy -= 1
        done.append(claim.ref)
        if len(done) == 30:
            all_done.set()

    crew = crew_of(database, work, run)
    crew.start()
    await asyncio.wait_for(all_done.wait(), PATIENCE_S)
    await crew.close()
    assert sorted(done) == [f"{number:02}" for number in range(30)]
    assert most <= 4


async def test_a_crew_that_closes_hands_back_what_it_holds(database: Database) -> None:
    work = Work(database)
    await database.run(lambda: work.add_many("lines", ["a", "b"]))
    begun = asyncio.Semaphore(0)

    async def run(_: Claim) -> None:
        begun.release()
        await asyncio.Event().wait()

    crew = crew_of(database, work, run)
    crew.start()
    for _ in range(2):
        await asyncio.wait_for(begun.acquire(), PATIENCE_S)
    assert await database.run(lambda: work.claim("lines", "other", 2)) == []
    await crew.close()
    claims = await database.run(lambda: work.claim("lines", "other", 2))
    assert [(claim.ref, claim.lapses) for claim in claims] == [("a", 0), ("b", 0)]


async def test_a_run_that_fails_is_tried_again_later_and_the_crew_goes_on(database: Database) -> None:
    work = Work(database)
    await database.run(lambda: work.add_many("lines", ["a", "b"]))
    good = asyncio.Event()

    async def run(claim: Claim) -> None:
        if claim.ref == "a":
            raise RuntimeError
        await database.run(lambda: work.finish(claim))
        good.set()

    crew = crew_of(database, work, run, places=1)
    crew.start()
    await asyncio.wait_for(good.wait(), PATIENCE_S)
    assert await database.run(lambda: work.claim("lines", "other", 2)) == []  # "a" waits for its delay
    await crew.close()


async def test_a_run_whose_claim_was_taken_away_is_cancelled(database: Database) -> None:
    work = Work(database, lease_s=0.3)
    await database.run(lambda: work.add("lines", "a"))
    begun, ended = asyncio.Event(), asyncio.Event()

    async def run(_: Claim) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    crew = crew_of(database, work, run)
    crew.start()
    await asyncio.wait_for(begun.wait(), PATIENCE_S)
    await database.run(lambda: work.drop("lines", "a"))
    await asyncio.wait_for(ended.wait(), PATIENCE_S)
    await crew.close()


async def test_a_run_that_lives_has_its_lease_renewed_again_and_again(database: Database) -> None:
    work = Work(database, lease_s=0.2)
    await database.run(lambda: work.add("lines", "a"))
    ended = asyncio.Event()
    ends: set[int] = set()

    async def run(claim: Claim) -> None:
        while len(ends) < 4:
            (row,) = await database.read(_LEASE_END())
            ends.add(row["free_at_ms"])
        await database.run(lambda: work.finish(claim))
        ended.set()

    crew = crew_of(database, work, run)
    crew.start()
    await asyncio.wait_for(ended.wait(), PATIENCE_S)
    await crew.close()


# --- a holder that is stopped

_HOLDER = """
import asyncio, sys
from nimbos.config import Settings, StorageSettings
from nimbos.db import Database
from nimbos.work import ClaimLost, Work

async def main():
    database = await Database.open(Settings(home=sys.argv[1]))
    work = Work(database, lease_s=0.2)
    (claim,) = await database.run(lambda: work.claim("lines", "holder", 1))
    print("claimed", flush=True)
    sys.stdin.readline()  # stopped here, and told to go on later
    try:
        await database.run(lambda: work.finish(claim))
        print("finished", flush=True)
    except ClaimLost:
        print("lost", flush=True)
    await database.close()

asyncio.run(main())
"""


async def test_a_holder_that_was_stopped_cannot_finish_when_it_wakes(tmp_path: Path) -> None:
    database = await Database.open(Settings(home=str(tmp_path)))
    work = Work(database)
    await database.run(lambda: work.add("lines", "a"))
    holder = subprocess.Popen(  # noqa: ASYNC220 it is a moment
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert await asyncio.to_thread(holder.stdout.readline) == "claimed\n"
        holder.send_signal(signal.SIGSTOP)
        claims: list[Claim] = []
        while not claims:  # until the lease has run out
            claims = await database.run(lambda: work.claim("lines", "other", 1))
        holder.send_signal(signal.SIGCONT)
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert await asyncio.to_thread(holder.stdout.readline) == "lost\n"
        assert (claims[0].epoch, claims[0].lapses) == (2, 1)
        await database.run(lambda: work.finish(claims[0]))
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
        await database.close()

"""The log on both databases: one chain, one writer, forks that read through, tampering that is found."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import pytest
from sqlalchemy import text

from nimbos.db import Database, Statement, Transaction
from nimbos.errors import Conflict, NotFound
from nimbos.kernel.events import (
    CallStarted,
    CallUnknown,
    Event,
    ModelDone,
    Note,
    ProcExited,
    ProcForked,
    ProcState,
)
from nimbos.kernel.faults import FromNewerVersion, Illegal
from nimbos.kernel.fold import View, fold
from nimbos.kernel.log import Draft, Fenced, Holder, Log
from nimbos.kernel.processes import NewHead, locked_head, raise_epoch
from nimbos.kernel.words import Effect, Label, Origin, Reason, Secrecy, State
from nimbos.types import Account, AskClass, Usage
from nimbos.work import ClaimLost, Work
from tests.kernel.histories import created, intent, logged

ACCOUNT = Account(id="proj_1", name="one")
RUNNING = Draft(body=ProcState(to=State.RUNNING))
READY = Draft(body=ProcState(to=State.READY))
SAID = Draft(body=Note(about="said", text="words"))


def new_head(**changes: object) -> NewHead:
    given = {"account": ACCOUNT, "program": "p", "name": "trip", "model": "demo", "ask_class": AskClass.AGENT}
    return NewHead(**{**given, **changes})  # type: ignore[arg-type]


class Place:
    """A database with one log, and a server's hands on it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.work = Work(database)
        self.log = Log(database, self.work)

    async def create(self, pid: str, *, more: tuple[Draft, ...] = ()) -> list[Event]:
        def begin() -> Transaction[list[Event]]:
            events = yield from self.log.create(pid, [Draft(body=created()), *more], head=new_head())
            yield from self.work.add("process", pid)
            return events

        return await self.database.run(begin)

    async def fork(self, pid: str, of: str, at: Event) -> list[Event]:
        head = new_head(forked_from=of, forked_seq=at.seq, forked_hash=at.hash, withheld=True)
        draft = Draft(body=ProcForked(of=of, at_seq=at.seq, at_hash=at.hash))
        return await self.database.run(lambda: self.log.create(pid, [draft], head=head))

    async def seize(self, pid: str, *, owner: str = "one") -> Holder:
        def begin() -> Transaction[Holder]:
            (claim,) = yield from self.work.claim("process", owner, 1)
            head = yield from locked_head(pid)
            holder = Holder(pid=pid, claim=claim, epoch=(yield from raise_epoch(pid)))
            first = [READY, RUNNING] if head.state is State.RUNNING else [RUNNING]
            yield from self.log.append(pid, first, holder=holder)
            return holder

        return await self.database.run(begin)

    async def append(self, pid: str, *drafts: Draft, holder: Holder | None = None) -> list[Event]:
        return await self.database.run(lambda: self.log.append(pid, drafts, holder=holder))

    async def everything(self, pid: str) -> list[Event]:
        return [event async for event in self.log.all(pid)]

    async def execute(self, words: str) -> None:
        def begin() -> Transaction[None]:
            yield Statement(text(words))()

        await self.database.run(begin)


@pytest.fixture
def place(database: Database) -> Place:
    return Place(database)


async def test_what_was_written_is_read_back_whole(place: Place) -> None:
    await place.create("proc_1")
    holder = await place.seize("proc_1")
    full = Draft(
        body=intent("c", Effect.PURE),
        cause=2,
        call_id="c",
        actor="user:1",
        label=Label(Origin.EXTERNAL, Secrecy.CREDENTIAL),
        blob="b" * 64,
        usage=Usage(input=3, cached=1, output=2),
    )
    written = await place.append(
        "proc_1", full, Draft(body=Note(about="said", text="null \x00, é, 世界")), holder=holder
    )
    events = await place.everything("proc_1")
    assert events[2:] == written
    assert (events[2].cause, events[2].actor, events[2].label, events[2].blob, events[2].usage) == (
        full.cause,
        full.actor,
        full.label,
        full.blob,
        full.usage,
    )
    assert [event.seq for event in events] == [1, 2, 3, 4]
    assert [event.epoch for event in events] == [0, 1, 1, 1]
    assert await place.log.read("proc_1", after=1, limit=2) == events[1:3]
    assert fold(events).calls["c"].intent.call_id == "c"


async def test_many_events_of_one_transition_are_one_chain(place: Place) -> None:
    await place.create("proc_1", more=(SAID,) * 20)
    events = await place.everything("proc_1")
    assert [event.seq for event in events] == list(range(1, 22))
    assert [event.prev_hash for event in events] == ["", *(event.hash for event in events[:-1])]
    verified = await place.log.verify("proc_1")
    assert (verified.events, verified.broken_at, verified.hash) == (21, None, events[-1].hash)


async def test_writers_at_once_leave_one_dense_chain(place: Place) -> None:
    await place.create("proc_1")
    await asyncio.gather(*(place.append("proc_1", SAID, SAID) for _ in range(20)))
    assert (await place.log.verify("proc_1")).events == 41


async def test_an_older_holder_is_fenced_and_nothing_of_its_transaction_stays(place: Place) -> None:
    await place.create("proc_1")
    old = await place.seize("proc_1")
    await place.database.run(lambda: place.work.release(old.claim))
    new = await place.seize("proc_1", owner="two")

    def late() -> Transaction[None]:
        yield from place.work.add("other", "of the same transaction")
        yield from place.log.append("proc_1", [SAID], holder=old)

    with pytest.raises(Fenced) as fenced:
        await place.database.run(late)
    assert isinstance(fenced.value, ClaimLost)
    assert await place.database.run(lambda: place.work.claim("other", "one", 1)) == []
    await place.append("proc_1", SAID, holder=new)
    events = await place.everything("proc_1")
    assert [event.epoch for event in events] == [0, 1, 2, 2, 2]


async def test_a_holder_of_the_claim_with_an_older_epoch_is_fenced(place: Place) -> None:
    await place.create("proc_1")
    holder = await place.seize("proc_1")
    stale = Holder(pid="proc_1", claim=holder.claim, epoch=holder.epoch - 1)
    with pytest.raises(Fenced):
        await place.append("proc_1", SAID, holder=stale)


async def test_only_its_holder_writes_to_a_running_process(place: Place) -> None:
    await place.create("proc_1")
    await place.append("proc_1", SAID)
    holder = await place.seize("proc_1")
    with pytest.raises(Conflict, match="running"):
        await place.append("proc_1", SAID)
    waiting = Draft(body=ProcState(to=State.WAITING, reason=Reason.TIMER))
    await place.append("proc_1", waiting, holder=holder)
    await place.append("proc_1", READY)
    assert (await place.log.verify("proc_1")).broken_at is None


@pytest.mark.parametrize(
    "body",
    [
        ProcState(to=State.WAITING, reason=Reason.NONE),
        ProcState(to=State.ASKING, reason=Reason.TIMER),
        ProcState(to=State.RUNNING),
        ProcExited(reason=Reason.USER),
    ],
)
async def test_an_illegal_state_is_not_written(place: Place, body: ProcState | ProcExited) -> None:
    await place.create("proc_1")
    holder = await place.seize("proc_1")
    with pytest.raises(Illegal):
        await place.append("proc_1", SAID, Draft(body=body), holder=holder)
    assert len(await place.everything("proc_1")) == 2


async def test_nothing_follows_the_end_but_notes(place: Place) -> None:
    await place.create("proc_1")
    holder = await place.seize("proc_1")
    await place.append("proc_1", Draft(body=ProcExited(reason=Reason.OK, result="r")), SAID, holder=holder)
    with pytest.raises(Illegal):
        await place.append("proc_1", READY)
    await place.append("proc_1", SAID)


async def test_what_the_fold_would_refuse_is_not_written(place: Place) -> None:
    """Also when the view is behind: what was appended since counts."""
    await place.create("proc_1")
    holder = await place.seize("proc_1")
    view = fold(await place.everything("proc_1"))
    await place.append(
        "proc_1", Draft(body=intent("c")), Draft(body=CallStarted(call_id="c", attempt=1)), holder=holder
    )
    before = view.copy()

    def append(draft: Draft) -> Callable[[], Transaction[list[Event]]]:
        return lambda: place.log.append("proc_1", [draft], holder=holder, view=view.copy)

    for wrong in (intent("c"), CallStarted(call_id="c", attempt=2)):
        with pytest.raises(Illegal):
            await place.database.run(append(Draft(body=wrong)))
    await place.database.run(append(Draft(body=CallUnknown(call_id="c"))))
    assert view == before
    assert (await place.log.verify("proc_1")).events == 5


async def test_a_holder_whose_log_was_exchanged_writes_nothing(place: Place) -> None:
    """A database that was restored under a running server is not gone on with."""
    await place.create("proc_1")
    holder = await place.seize("proc_1")
    await place.append("proc_1", SAID, holder=holder)
    ahead = fold(await place.everything("proc_1"))
    await place.execute("DELETE FROM process_events WHERE seq = 3")
    await place.execute(
        "UPDATE processes SET seq = 2, hash = (SELECT hash FROM process_events WHERE seq = 2) WHERE id = 'proc_1'"
    )
    with pytest.raises(Illegal, match="ends at 2"):
        await place.database.run(lambda: place.log.append("proc_1", [SAID], holder=holder, view=ahead.copy))
    assert len(await place.everything("proc_1")) == 2


async def test_a_spawn_key_makes_one_process(place: Place) -> None:
    async def create(pid: str) -> None:
        await place.database.run(lambda: place.log.create(pid, [Draft(body=created())], head=new_head(key="once")))

    await create("proc_1")
    with pytest.raises(Conflict):
        await create("proc_2")
    with pytest.raises(NotFound):
        await place.log.read("proc_2")


async def test_a_log_begins_with_a_birth(place: Place) -> None:
    for drafts in ([], [SAID], [READY]):
        with pytest.raises(Illegal):
            await place.database.run(partial(place.log.create, "proc_1", drafts, head=new_head()))


async def test_a_forks_past_is_read_through_its_parents(place: Place) -> None:
    await place.create("proc_1", more=(SAID,) * 5)
    first = await place.everything("proc_1")
    await place.fork("proc_2", "proc_1", first[3])
    await place.append("proc_1", SAID)  # of no concern to the fork
    await place.append("proc_2", SAID, SAID)
    second = await place.everything("proc_2")
    await place.fork("proc_3", "proc_2", second[5])
    await place.fork("proc_4", "proc_2", second[1])  # from what was its parent's
    third, fourth = await place.everything("proc_3"), await place.everything("proc_4")
    assert [(event.pid, event.seq) for event in third] == [
        *(("proc_1", seq) for seq in range(1, 5)),
        *(("proc_2", seq) for seq in range(5, 7)),
        ("proc_3", 7),
    ]
    assert [(event.pid, event.seq) for event in fourth] == [("proc_1", 1), ("proc_1", 2), ("proc_4", 3)]
    for pid, events in (("proc_2", second), ("proc_3", third), ("proc_4", fourth)):
        assert [event.prev_hash for event in events] == ["", *(event.hash for event in events[:-1])]
        view = fold(events)
        assert (view.pid, view.withheld, view.state) == (pid, True, State.READY)
        verified = await place.log.verify(pid)
        assert (verified.events, verified.broken_at) == (len(events), None)
    for at in range(8):
        for limit in (1, 2, 9):
            assert await place.log.read("proc_3", after=at, limit=limit) == third[at : at + limit]


async def test_a_fork_of_what_never_was_is_refused(place: Place) -> None:
    await place.create("proc_1", more=(SAID,) * 3)
    await place.create("proc_2", more=(SAID,) * 3)
    ours, others = await place.everything("proc_1"), await place.everything("proc_2")
    await place.fork("proc_3", "proc_1", ours[1])
    (unheard,) = logged([Note(about="said", text="x")], past=ours)
    for of, at in (("proc_1", others[2]), ("proc_1", unheard), ("proc_3", ours[3]), ("proc_3", others[0])):
        with pytest.raises(Illegal):
            await place.fork("proc_4", of, at)
    with pytest.raises(NotFound):
        await place.fork("proc_4", "proc_5", ours[0])


TAMPERING = {
    "a word changed": ("UPDATE process_events SET kind = 'mem.changed' WHERE pid = 'proc_1' AND seq = 4", 4),
    "a body changed": (
        "UPDATE process_events SET body = (SELECT body FROM process_events WHERE pid = 'proc_1' AND seq = 1)"
        " WHERE pid = 'proc_1' AND seq = 4",
        4,
    ),
    "a time changed": ("UPDATE process_events SET ts_ms = ts_ms + 1 WHERE pid = 'proc_1' AND seq = 5", 5),
    "another actor": ("UPDATE process_events SET actor = 'user:9' WHERE pid = 'proc_1' AND seq = 1", 1),
    "another label": ("UPDATE process_events SET label = '[0,0]' WHERE pid = 'proc_1' AND seq = 2", 2),
    "another use": ("""UPDATE process_events SET usage = '{"input"\\:1}' WHERE pid = 'proc_1' AND seq = 2""", 2),
    "a hash changed": ("UPDATE process_events SET hash = 'x' WHERE pid = 'proc_1' AND seq = 3", 3),
    "an event removed": ("DELETE FROM process_events WHERE pid = 'proc_1' AND seq = 3", 3),
    "the end removed": ("DELETE FROM process_events WHERE pid = 'proc_1' AND seq > 4", 5),
    "all removed": ("DELETE FROM process_events WHERE pid = 'proc_1'", 1),
    "another end": ("UPDATE processes SET hash = 'x' WHERE id = 'proc_1'", 7),
    "an earlier end": (
        "UPDATE processes SET hash = (SELECT hash FROM process_events WHERE pid = 'proc_1' AND seq = 3)"
        " WHERE id = 'proc_1'",
        7,
    ),
}


@pytest.mark.parametrize("what", TAMPERING)
async def test_tampering_is_found_where_it_was_done(place: Place, what: str) -> None:
    statement, at = TAMPERING[what]
    await place.create("proc_1", more=(SAID,) * 6)
    assert (await place.log.verify("proc_1")).broken_at is None
    await place.execute(statement)
    verified = await place.log.verify("proc_1")
    assert verified.broken_at == at
    assert verified.events == at - 1
    assert verified.why


async def test_tampering_with_a_parents_past_is_found_in_the_fork(place: Place) -> None:
    events = await place.create("proc_1", more=(SAID,) * 3)
    await place.fork("proc_2", "proc_1", events[2])
    await place.execute("UPDATE process_events SET ts_ms = ts_ms + 1 WHERE pid = 'proc_1' AND seq = 2")
    assert (await place.log.verify("proc_2")).broken_at == 2
    await place.execute("UPDATE process_events SET ts_ms = ts_ms - 1 WHERE pid = 'proc_1' AND seq = 2")
    assert (await place.log.verify("proc_2")).broken_at is None


async def test_an_event_that_may_not_be_there_is_found_however_well_it_is_chained(place: Place) -> None:
    await place.create("proc_1")
    await place.append("proc_1", Draft(body=ModelDone(ask_id="a", model_hash="h", finish="stop", message="m")))
    verified = await place.log.verify("proc_1")
    assert (verified.broken_at, verified.events) == (2, 1)
    assert "model.done" in verified.why


async def test_a_log_from_a_newer_version_is_refused_and_left_alone(place: Place) -> None:
    await place.create("proc_1", more=(SAID,))
    before = await place.everything("proc_1")

    def write_newer(columns: str) -> str:
        return f"UPDATE process_events SET {columns} WHERE pid = 'proc_1' AND seq = 2"

    for columns in ("version = 7", "version = 1, kind = 'proc.dreamt'"):
        await place.execute(write_newer(columns))
        with pytest.raises(FromNewerVersion, match="newer version of Nimbos"):
            fold(await place.everything("proc_1"))
    await place.execute(write_newer("kind = 'note'"))
    assert await place.everything("proc_1") == before


async def test_the_head_says_what_the_fold_says(place: Place) -> None:
    await place.create("proc_1")
    holder = await place.seize("proc_1")
    asking = Draft(body=ProcState(to=State.ASKING, reason=Reason.INPUT, due_ms=7, about=("c",)))
    await place.append("proc_1", asking, holder=holder)
    for drafts in ((), (Draft(body=ProcState(to=State.PAUSED, reason=Reason.USER)),), (READY,)):
        if drafts:
            await place.append("proc_1", *drafts)
        view: View = fold(await place.everything("proc_1"))
        head = await place.database.run(lambda: place.log.locked_head("proc_1"))
        assert (head.state, head.reason, head.due_ms, head.about) == (view.state, view.reason, view.due_ms, view.about)
        assert (head.seq, head.hash, head.epoch) == (view.seq, view.hash, view.epoch)

"""What a process is: spawned once, driven by a claim, parked at no cost, ended once, followed to its end."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from sqlalchemy import update

from nimbos.config import Settings
from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.kernel import process_events
from nimbos.errors import Conflict, Forbidden, InvalidRequest, ModelNotFound, NotFound, Unauthorized
from nimbos.kernel import Delta, Event, Reason, SignalKind, State
from nimbos.kernel.events import CallDone, ModelDone, ModelIntent, Note
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.runner import FAILURES_MAX
from nimbos.kernel.words import Effect
from nimbos.types import Account, AskClass
from nimbos.work import Claim, crew
from tests.kernel.running import ACCOUNT, OTHER, PATIENCE_S, begin_call, running, told

SAID = Draft(body=Note(about="said", text="a word"))


async def say_and_end(holding: Holding) -> None:
    await holding.append(SAID)
    await holding.exit(Reason.OK, result=await holding.put({"answer": 42}))


async def test_a_process_runs_to_its_end_and_its_head_says_what_the_log_does(
    database: Database, database_settings: Settings
) -> None:
    async with running(database, database_settings, {"plain": say_and_end}) as place:
        pid = await place.spawn(input={"question": "why"})
        head = await place.over(pid)
        assert (head.reason, head.error, head.epoch) == (Reason.OK, "", 1)
        assert head.result is not None
        assert await place.kernel.segments.get(ACCOUNT.id, head.result) == {"answer": 42}
        assert await place.kinds(pid) == ["proc.created", "proc.state", "note", "proc.exited"]
        events = await place.kernel.events(ACCOUNT, pid)
        assert (head.seq, head.hash) == (events[-1].seq, events[-1].hash)
        assert (await place.kernel.log.verify(pid)).broken_at is None


async def test_the_same_key_spawns_one_process(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, start=False) as place:
        pids = await asyncio.gather(*(place.spawn(key="once") for _ in range(5)))
        assert len(set(pids)) == 1
        assert await place.spawn(key="twice") not in pids
        assert len(await place.kernel.list(ACCOUNT)) == 2


async def test_what_cannot_be_spawned_is_said_and_leaves_nothing(
    database: Database, database_settings: Settings
) -> None:
    async with running(database, database_settings, start=False) as place:
        with pytest.raises(NotFound):
            await place.kernel.spawn(ACCOUNT, "nobody", "")
        with pytest.raises(NotFound):
            await place.kernel.spawn(OTHER, "plain", "")
        with pytest.raises(ModelNotFound):
            await place.spawn(model="none")
        with pytest.raises(InvalidRequest):
            await place.spawn(name="a\x00b")
        narrow = Account(id=ACCOUNT.id, name="one", scopes=frozenset({"class:batch"}))
        with pytest.raises(Forbidden):
            await place.kernel.spawn(narrow, "plain", "", ask_class=AskClass.INTERACTIVE)
        assert await place.kernel.list(ACCOUNT) == []


async def test_another_account_finds_no_such_process(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, start=False) as place:
        pid = await place.spawn()
        kernel = place.kernel
        for missing in (kernel.find(OTHER, pid), kernel.events(OTHER, pid), kernel.tree(OTHER, pid)):
            with pytest.raises(NotFound):
                await missing
        with pytest.raises(NotFound):
            await kernel.signal(OTHER, pid, SignalKind.KILL, source="user:x", external_id="1")
        assert await kernel.list(OTHER) == []


async def test_a_list_is_newest_first_in_pages_and_by_state(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, {"plain": say_and_end}) as place:
        pids = [await place.spawn() for _ in range(5)]
        for pid in pids:
            await place.over(pid)
        first = await place.kernel.list(ACCOUNT, limit=3)
        rest = await place.kernel.list(ACCOUNT, limit=3, after=first[-1].pid)
        assert sorted((head.pid for head in [*first, *rest]), reverse=True) == [head.pid for head in [*first, *rest]]
        assert {head.pid for head in [*first, *rest]} == set(pids)
        assert await place.kernel.list(ACCOUNT, states=[State.READY, State.RUNNING]) == []
        assert len(await place.kernel.list(ACCOUNT, states=[State.DONE])) == 5


async def test_a_follower_is_told_everything_to_the_end_and_deltas_on_the_way(
    database: Database, database_settings: Settings
) -> None:
    go = asyncio.Event()

    async def speak(holding: Holding) -> None:
        await go.wait()
        holding.tell(Delta(pid=holding.pid, ask_id="ask_1", text="so"))
        await say_and_end(holding)

    async with running(database, database_settings, {"plain": speak}) as place:
        pid = await place.spawn()
        following = asyncio.create_task(told(place, pid))
        await place.until(pid, State.RUNNING)
        while not place.kernel.bells.followed(pid):
            await asyncio.sleep(0)
        go.set()
        heard = await following
        events = [one for one in heard if isinstance(one, Event)]
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert events[-1].kind == "proc.exited"
        assert [one.text for one in heard if isinstance(one, Delta)] == ["so"]
        assert [one.seq for one in await told(place, pid, after=2) if isinstance(one, Event)] == [3, 4]
        with pytest.raises(NotFound):
            async with aclosing(place.kernel.follow(OTHER, pid)) as foreign:
                await anext(foreign)


async def test_words_stand_between_the_events_of_their_answer(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever of the log is seen when, and with an answer of another ask that goes on."""

    async def say(holding: Holding) -> None:
        for ask_id in ("one", "two"):
            await holding.append(Draft(body=ModelIntent(ask_id=ask_id, model="m", purpose="step", step=ask_id)))
        message = await holding.put({})
        for ask_id in ("one", "two"):
            done = ModelDone(ask_id=ask_id, model_hash="h", finish="stop", message=message)
            await holding.append(Draft(body=done))
        await say_and_end(holding)

    async with running(database, database_settings, {"plain": say}) as place:
        pid = await place.spawn()
        await place.over(pid)
        read, bells, calls = place.kernel.log.read, place.kernel.bells, 0

        async def late(pid: str, *, after: int = 0, limit: int = 100) -> list[Event]:
            """First what was there before an answer began, then nothing more, then all; and words come meanwhile."""
            nonlocal calls
            calls += 1
            found = await read(pid, after=after)
            if calls > 2:
                return found
            bells.appended(pid)
            for ask_id in ("one", "two"):
                bells.tell(Delta(pid=pid, ask_id=ask_id, text=f"{ask_id} {calls}"))
            begun = next(at for at, event in enumerate(found) if event.kind == "model.intent")
            return found[:begun] if calls == 1 else []

        monkeypatch.setattr(place.kernel.log, "read", late)
        heard = [one.text if isinstance(one, Delta) else one.kind for one in await told(place, pid)]
    words = [one for one in heard if not one.startswith(("proc.", "ctx.", "note"))]
    assert words == [
        *("model.intent", "model.intent"),
        *("one 1", "one 2", "model.done"),
        *("two 1", "two 2", "model.done"),
    ]


async def test_a_program_that_ends_without_an_exit_has_failed(database: Database, database_settings: Settings) -> None:
    async def leave(holding: Holding) -> None:
        await holding.append(SAID)

    async with running(database, database_settings, {"plain": leave}) as place:
        head = await place.over(await place.spawn())
        assert head.reason is Reason.FAILED
        assert "without saying" in head.error


async def test_a_process_that_fails_by_our_fault_again_and_again_fails_in_the_end(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "RETRY_S", 0.0)

    async def stumble(holding: Holding) -> None:
        await holding.append(SAID)
        raise ZeroDivisionError

    async with running(database, database_settings, {"plain": stumble}) as place:
        pid = await place.spawn()
        head = await place.over(pid)
        assert (head.reason, head.epoch) == (Reason.FAILED, FAILURES_MAX + 1)
        assert "fault of the server" in head.error
        assert (await place.kinds(pid)).count("note") == FAILURES_MAX


async def test_a_log_from_a_newer_version_is_left_as_it_is(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = Statement(update(process_events).values(version=99))

    def write() -> Transaction[None]:
        yield newer()

    async with running(database, database_settings, {"plain": say_and_end}, start=False) as place:
        pid = await place.spawn()
        before = await place.head(pid)
        await database.run(write)
        released = asyncio.Event()
        release = place.kernel.work.release

        def told(claim: Claim, *, delay_s: float = 0.0) -> Transaction[bool]:
            released.set()
            return release(claim, delay_s=delay_s)

        monkeypatch.setattr(place.kernel.work, "release", told)
        await place.kernel.start(place.drive)
        async with asyncio.timeout(PATIENCE_S):
            await released.wait()
        other = await place.spawn()
        assert (await place.over(other)).reason is Reason.OK
        assert await place.head(pid) == before


async def test_a_server_that_stops_lets_a_call_end_whose_outcome_would_be_unknown(
    database: Database, database_settings: Settings
) -> None:
    sent, closing = asyncio.Event(), asyncio.Event()

    async def send_mail(holding: Holding) -> None:
        if holding.view.calls_made:
            await holding.exit(Reason.OK)
        await begin_call(holding, "one", Effect.OPAQUE)
        sent.set()
        await closing.wait()
        done = CallDone(call_id="one", result=await holding.put("sent"), size_bytes=4)
        await holding.append(Draft(body=done, call_id="one"))
        await asyncio.Event().wait()

    async with running(database, database_settings, {"plain": send_mail}) as place:
        pid = await place.spawn()
        await sent.wait()
        stopping = asyncio.create_task(place.kernel.close())
        await asyncio.wait({stopping}, timeout=0)
        closing.set()
        await stopping
        assert (await place.kinds(pid))[-2:] == ["call.done", "proc.state"]
        assert (await place.head(pid)).state is State.READY


async def test_a_key_that_is_good_no_more_parks_the_process_and_a_resume_asks_again(
    database: Database, database_settings: Settings
) -> None:
    good = False

    async def resolve(account: Account) -> Account:
        if not good:
            raise Unauthorized("The key was revoked.")
        return account

    async with running(database, database_settings, {"plain": say_and_end}, resolve=resolve) as place:
        pid = await place.spawn()
        await place.until(pid, State.ASKING, reason="auth")
        good = True
        await place.send(pid, SignalKind.RESUME)
        assert (await place.over(pid)).reason is Reason.OK


async def test_an_end_is_an_end(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, {"plain": say_and_end}) as place:
        pid = await place.spawn()
        head = await place.over(pid)
        for kind in (SignalKind.MESSAGE, SignalKind.KILL, SignalKind.CANCEL, SignalKind.RESUME, SignalKind.ANSWER):
            with pytest.raises(Conflict, match="over"):
                await place.send(pid, kind)
        assert await place.head(pid) == head

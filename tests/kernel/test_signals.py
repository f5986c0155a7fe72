"""Signals: received once, obeyed in the middle of work, never slept through, refused when they come too late."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from nimbos.config import Settings
from nimbos.db import Database, Transaction
from nimbos.errors import Conflict, InvalidRequest, Overloaded, PayloadTooLarge
from nimbos.kernel import Reason, SignalKind, State, mailbox
from nimbos.kernel.events import CallDone, Note, SignalConsumed
from nimbos.kernel.holding import Holding
from nimbos.kernel.log import Draft
from nimbos.kernel.words import Effect
from tests.kernel.running import ACCOUNT, Place, begin_call, running

PATIENCE_S = 60


async def read_and_wait(holding: Holding) -> None:
    """Ends with the messages it was sent, once one of them is `enough`."""
    await holding.take_mail()
    told = [signal.body for signal in holding.view.signals if signal.signal is SignalKind.MESSAGE]
    said = [await holding._shared.segments.get(holding.account.id, body) for body in told if body is not None]
    if "enough" not in said:
        await holding.park(State.WAITING, Reason.SIGNAL)
    await holding.exit(Reason.OK, result=await holding.put(said))


async def forever(holding: Holding) -> None:
    await holding.append(Draft(body=Note(about="said", text="begun")))
    await asyncio.Event().wait()


async def ask_and_end(holding: Holding) -> None:
    answers = [signal for signal in holding.view.signals if signal.signal is SignalKind.ANSWER]
    if not answers:
        await holding.park(State.ASKING, Reason.INPUT, about=("question",))
    await holding.append(Draft(body=SignalConsumed(received=answers[0].seq)))
    await asyncio.Event().wait()


async def result_of(place: Place, pid: str) -> object:
    head = await place.over(pid)
    assert head.result is not None, head
    return await place.kernel.segments.get(head.account, head.result)


async def begun(place: Place, pid: str) -> None:
    async def has_noted() -> bool:
        return "note" in await place.kinds(pid)

    await place.when(pid, has_noted)


async def test_a_signal_sent_twice_is_received_once(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, {"plain": read_and_wait}) as place:
        pid = await place.spawn()
        parked = await place.until(pid, State.WAITING)
        assert await place.send(pid, SignalKind.MESSAGE, body="one", id="1")
        assert not await place.send(pid, SignalKind.MESSAGE, body="one", id="1")
        await place.until(pid, State.WAITING, after=parked.seq)
        assert not await place.send(pid, SignalKind.MESSAGE, body="one", id="1")  # also once it was taken
        await place.send(pid, SignalKind.MESSAGE, body="enough", id="2")
        assert await result_of(place, pid) == ["one", "enough"]


async def test_mail_that_comes_while_a_process_parks_is_not_slept_through(
    database: Database, database_settings: Settings
) -> None:
    async with running(database, database_settings) as place:
        sent = False

        async def late(holding: Holding) -> None:
            nonlocal sent
            await holding.take_mail()
            if not sent:  # after it looked, before it parks
                sent = True
                await place.send(holding.pid, SignalKind.MESSAGE, body="enough")
            await read_without_looking(holding)

        async def read_without_looking(holding: Holding) -> None:
            if not any(signal.signal is SignalKind.MESSAGE for signal in holding.view.signals):
                await holding.park(State.WAITING, Reason.SIGNAL)
            await holding.exit(Reason.OK)

        place.bodies["plain"] = late
        pid = await place.spawn()
        head = await place.over(pid)
        assert (head.reason, head.epoch) == (Reason.OK, 2)


async def test_words_that_come_while_a_process_ends_well_are_heard_first(
    database: Database, database_settings: Settings
) -> None:
    async with running(database, database_settings) as place:

        async def end(holding: Holding) -> None:
            if holding.holder.epoch == 1:
                await place.send(holding.pid, SignalKind.MESSAGE, body="one more thing")
            await holding.exit(Reason.OK, result=await holding.put(len(holding.view.signals)))

        place.bodies["plain"] = end
        pid = await place.spawn()
        assert await result_of(place, pid) == 1
        assert (await place.head(pid)).epoch == 2


async def test_words_that_no_step_of_a_function_asked_for_do_not_keep_it_from_its_end(
    database: Database, database_settings: Settings
) -> None:
    """From its top it would come to the same end, each time that there are more of them."""
    files = {"nimbos.toml": b'name = "function"\nentry = "main.py:main"\n', "main.py": b"async def main(input): ...\n"}
    async with running(database, database_settings) as place:

        async def end(holding: Holding) -> None:
            await place.send(holding.pid, SignalKind.MESSAGE, body="one more thing")
            await holding.exit(Reason.OK)

        place.bodies["function"] = end
        await place.kernel.programs.put(msgspec.structs.replace(ACCOUNT, scopes=frozenset({"programs:code"})), files)
        pid = await place.kernel.spawn(ACCOUNT, "function", None)
        assert (await place.over(pid)).epoch == 1


async def test_signals_of_many_at_once_are_all_received(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, {"plain": read_and_wait}) as place:
        pid = await place.spawn()
        words = [f"word {number}" for number in range(40)]
        await asyncio.gather(*(place.send(pid, SignalKind.MESSAGE, body=word) for word in words))
        await place.send(pid, SignalKind.MESSAGE, body="enough")
        said = await result_of(place, pid)
        assert isinstance(said, list)
        assert sorted(said) == sorted([*words, "enough"])


@pytest.mark.parametrize(("kind", "reason"), [(SignalKind.KILL, Reason.KILLED), (SignalKind.CANCEL, Reason.CANCELLED)])
async def test_an_end_from_outside_comes_in_the_middle_of_work(
    database: Database, database_settings: Settings, kind: SignalKind, reason: Reason
) -> None:
    async with running(database, database_settings, {"plain": forever}) as place:
        pid = await place.spawn()
        await begun(place, pid)
        await place.send(pid, kind)
        assert (await place.over(pid)).reason is reason


async def test_a_pause_holds_until_it_is_resumed_and_signals_still_arrive(
    database: Database, database_settings: Settings
) -> None:
    async with running(database, database_settings, {"plain": forever}) as place:
        pid = await place.spawn()
        await begun(place, pid)
        await place.send(pid, SignalKind.PAUSE)
        paused = await place.until(pid, State.PAUSED, reason="user")
        place.bodies["plain"] = read_and_wait
        await place.send(pid, SignalKind.MESSAGE, body="enough")
        assert (await place.head(pid)).state is State.PAUSED
        assert (await place.head(pid)).seq == paused.seq
        await place.send(pid, SignalKind.RESUME)
        assert await result_of(place, pid) == ["enough"]


async def test_what_was_resumed_before_it_paused_goes_on(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, {"plain": read_and_wait}, start=False) as place:
        pid = await place.spawn()
        await place.send(pid, SignalKind.PAUSE)
        await place.send(pid, SignalKind.RESUME)
        await place.send(pid, SignalKind.MESSAGE, body="enough")
        await place.kernel.start(place.drive)
        assert await result_of(place, pid) == ["enough"]


async def test_a_resume_that_lies_far_behind_its_pause_is_heard(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox, "_TAKEN_AT_ONCE", 2)
    async with running(database, database_settings, {"plain": read_and_wait}, start=False) as place:
        pid = await place.spawn()
        for body in ("one", "two", "three"):
            await place.send(pid, SignalKind.MESSAGE, body=body)
        await place.send(pid, SignalKind.PAUSE)
        await place.send(pid, SignalKind.RESUME)
        await place.send(pid, SignalKind.MESSAGE, body="enough")
        await place.kernel.start(place.drive)
        assert await result_of(place, pid) == ["one", "two", "three", "enough"]


async def many_words(place: Place, pid: str, count: int) -> None:
    """As many that nobody has read."""

    def begin() -> Transaction[None]:
        for number in range(count):
            mail = mailbox.Mail(signal=SignalKind.MESSAGE, source="user:test", external_id=f"word {number}")
            yield from place.kernel.posting(pid, mail)

    await place.database.run(begin)


@pytest.mark.parametrize("first", [SignalKind.PAUSE, SignalKind.MESSAGE])
async def test_a_kill_is_obeyed_however_much_mail_lies_before_it(
    database: Database, database_settings: Settings, first: SignalKind
) -> None:
    async with running(database, database_settings, {"plain": forever}, start=False) as place:
        pid = await place.spawn()
        await place.send(pid, first)
        await many_words(place, pid, 250)
        await place.send(pid, SignalKind.KILL)
        await place.kernel.start(place.drive)
        assert (await place.over(pid)).reason is Reason.KILLED


async def test_what_was_adopted_is_adopted_also_when_the_order_to_pause_came_before(
    database: Database, database_settings: Settings
) -> None:
    async with running(database, database_settings, {"plain": forever}, start=False) as place:
        pid = await place.spawn()
        await place.send(pid, SignalKind.PAUSE)
        await many_words(place, pid, 250)
        await place.send(pid, SignalKind.ADOPT)
        await place.kernel.start(place.drive)
        paused = await place.until(pid, State.PAUSED)
        assert (paused.mail, paused.taken) == (252, 252), "nothing that changes it lies there unread"
        assert (await place.kinds(pid)).count("note") == 1


async def test_a_kill_behind_a_full_mailbox_reaches_a_process_in_the_middle_of_work(
    database: Database, database_settings: Settings
) -> None:
    async with running(database, database_settings, {"plain": forever}) as place:
        pid = await place.spawn()
        await begun(place, pid)
        await many_words(place, pid, mailbox.UNREAD_MAX)
        await place.send(pid, SignalKind.KILL)
        assert (await place.over(pid)).reason is Reason.KILLED


async def test_a_pause_waits_for_a_call_whose_outcome_would_be_unknown(
    database: Database, database_settings: Settings
) -> None:
    sent, end = asyncio.Event(), asyncio.Event()

    async def send_mail(holding: Holding) -> None:
        if holding.view.calls_made:
            await holding.exit(Reason.OK)
        await begin_call(holding, "one", Effect.OPAQUE)
        sent.set()
        await end.wait()
        done = CallDone(call_id="one", result=await holding.put("sent"), size_bytes=4)
        await holding.append(Draft(body=done, call_id="one"))
        await holding.take_mail()

    async with running(database, database_settings, {"plain": send_mail}) as place:
        pid = await place.spawn()
        async with asyncio.timeout(PATIENCE_S):
            await sent.wait()
        await place.send(pid, SignalKind.PAUSE)
        end.set()
        await place.until(pid, State.PAUSED)
        kinds = await place.kinds(pid)
        assert kinds.index("call.done") < kinds.index("signal.received")
        await place.send(pid, SignalKind.RESUME)
        assert (await place.over(pid)).reason is Reason.OK


async def test_a_question_has_one_answer(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, {"plain": ask_and_end}) as place:
        pid = await place.spawn()
        await place.until(pid, State.ASKING, reason="input")
        with pytest.raises(Conflict, match="does not ask"):
            await place.send(pid, SignalKind.ANSWER, about="something else", body="no")
        outcomes = await asyncio.gather(
            *(place.send(pid, SignalKind.ANSWER, body=f"answer {number}") for number in range(4)),
            return_exceptions=True,
        )
        assert sum(outcome is True for outcome in outcomes) == 1
        assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 3
        with pytest.raises(Conflict, match="answer already"):
            await place.send(pid, SignalKind.ANSWER, about="question", body="late")


async def test_an_answer_to_nothing_is_refused(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, {"plain": read_and_wait}) as place:
        pid = await place.spawn()
        await place.until(pid, State.WAITING)
        with pytest.raises(Conflict, match="asks nothing"):
            await place.send(pid, SignalKind.ANSWER, body="yes")


async def test_what_is_no_question_has_no_answer(database: Database, database_settings: Settings) -> None:
    async def spend(holding: Holding) -> None:
        await holding.take_mail()
        if any(signal.signal is SignalKind.MESSAGE for signal in holding.view.signals):
            await forever(holding)
        await holding.park(State.ASKING, Reason.BUDGET)

    async with running(database, database_settings, {"plain": spend}) as place:
        pid = await place.spawn()
        await place.until(pid, State.ASKING, reason="budget")
        with pytest.raises(Conflict, match="asks nothing"):
            await place.send(pid, SignalKind.ANSWER, body="yes")
        await place.send(pid, SignalKind.MESSAGE, body="go on")
        await begun(place, pid)
        with pytest.raises(Conflict, match="asks nothing"):
            await place.send(pid, SignalKind.ANSWER, body="yes")


async def test_a_paused_question_can_be_answered_once(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, {"plain": ask_and_end}) as place:
        pid = await place.spawn()
        await place.until(pid, State.ASKING)
        await place.send(pid, SignalKind.PAUSE)
        await place.until(pid, State.PAUSED)
        await place.send(pid, SignalKind.ANSWER, body="yes")
        with pytest.raises(Conflict, match="answer already"):
            await place.send(pid, SignalKind.ANSWER, body="no")
        await place.send(pid, SignalKind.RESUME)

        async def are_heard() -> bool:
            return (await place.kinds(pid)).count("signal.consumed") == 3  # pause, resume, answer

        await place.when(pid, are_heard)


async def test_a_full_mailbox_says_so_and_takes_what_ends_the_process(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox, "UNREAD_MAX", 3)
    async with running(database, database_settings, start=False) as place:
        pid = await place.spawn()
        for number in range(3):
            await place.send(pid, SignalKind.MESSAGE, body=number)
        with pytest.raises(Overloaded, match="mailbox"):
            await place.send(pid, SignalKind.MESSAGE, body="one more")
        assert await place.send(pid, SignalKind.KILL)


async def test_messages_that_nobody_hears_fill_a_mailbox_until_they_are_heard(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were taken into the log, and are still the process's to keep."""
    monkeypatch.setattr(mailbox, "UNREAD_MAX", 3)
    hear = asyncio.Event()

    async def hears_one(holding: Holding) -> None:
        await holding.take_mail()
        waiting = [signal.seq for signal in holding.view.signals if signal.signal is SignalKind.MESSAGE]
        if hear.is_set():
            hear.clear()
            await holding.append(Draft(body=SignalConsumed(received=waiting[0])))
        await holding.park(State.WAITING, Reason.SIGNAL)

    async with running(database, database_settings, {"plain": hears_one}) as place:
        pid = await place.spawn()
        parked = await place.until(pid, State.WAITING)
        for number in range(3):
            await place.send(pid, SignalKind.MESSAGE, body=number)
            parked = await place.until(pid, State.WAITING, after=parked.seq)
        assert parked.taken == parked.mail == 3
        with pytest.raises(Overloaded, match=r"'signals in the mailbox' of 3 .*\(3 in use\)"):
            await place.send(pid, SignalKind.MESSAGE, body="one more")
        hear.set()
        assert await place.send(pid, SignalKind.TOP_UP), "what is no message has the mailbox's own room"
        await place.until(pid, State.WAITING, after=parked.seq)
        assert await place.send(pid, SignalKind.MESSAGE, body="one more")
        with pytest.raises(Overloaded):
            await place.send(pid, SignalKind.MESSAGE, body="and one more")
        assert await place.send(pid, SignalKind.KILL)


async def test_a_message_that_is_too_large_is_refused_and_an_answer_is_not(
    database: Database, database_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox, "MESSAGE_BYTES_MAX", 100)
    async with running(database, database_settings, {"plain": ask_and_end}) as place:
        pid = await place.spawn()
        await place.until(pid, State.ASKING)
        assert await place.send(pid, SignalKind.MESSAGE, body="x" * 98)
        with pytest.raises(PayloadTooLarge, match="message"):
            await place.send(pid, SignalKind.MESSAGE, body="x" * 99)
        await place.until(pid, State.ASKING)
        assert await place.send(pid, SignalKind.ANSWER, body="x" * 200)


async def test_words_that_cannot_be_kept_are_refused(database: Database, database_settings: Settings) -> None:
    async with running(database, database_settings, start=False) as place:
        pid = await place.spawn()
        for id in ("a\x00b", "x" * 1_000):
            with pytest.raises(InvalidRequest):
                await place.send(pid, SignalKind.MESSAGE, body="x", id=id)
        assert (await place.head(pid)).mail == 0

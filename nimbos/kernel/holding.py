"""One process that this server runs: its view, and the only hand that appends to its log.

Every method that writes does so in one durable transaction that checks the holder first; what was written is folded
into the view afterwards. When a write fails, or its outcome is not known, the view is worthless: let the exception
pass, and whoever claims the process next folds its log anew.

A run ends by `park` or `exit`, or because `take_mail` found that it has to: they raise `Parked` or `Exited`, which only
`runner.py` catches.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from nimbos.db import Database, Transaction
from nimbos.kernel import mailbox
from nimbos.kernel.bells import Bells, Delta
from nimbos.kernel.children import dismiss, tell_parent
from nimbos.kernel.effects import HARMLESS
from nimbos.kernel.events import Event, Note, ProcExited, ProcState, SignalConsumed
from nimbos.kernel.fold import View
from nimbos.kernel.log import Draft, Holder, Log
from nimbos.kernel.mailbox import CONTROL, WAKE_PAUSED, Mail
from nimbos.kernel.processes import locked_head
from nimbos.kernel.releasing import to_release
from nimbos.kernel.segments import Segments
from nimbos.kernel.timers import SteadyClock
from nimbos.kernel.view import CallStatus, Received
from nimbos.kernel.words import Reason, SignalKind, State
from nimbos.types import Account
from nimbos.work import Work

if TYPE_CHECKING:
    from nimbos.kernel.programs import Program


class Parked(Exception):
    """The run is over; a signal makes the process ready again."""


class Exited(Exception):
    """The run is over, and so is the process."""


class Stop(StrEnum):
    """Whether what is in the mailbox ends the run before it ends by itself."""

    NO = "no"
    AFTER_CALLS = "after calls"  # a call goes on whose outcome would be unknown if it were cut off
    NOW = "now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all holdings of a server have in common. `on_exit`: transactions that are part of every exit."""

    database: Database
    log: Log
    work: Work
    segments: Segments
    bells: Bells
    clock: SteadyClock
    on_exit: tuple[Callable[[str], Transaction[None]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ended:
    """What became of a run, once its transaction is committed. `woken`: there is work to claim. `posted`: whose
    mailboxes were written, and whether that woke them."""

    events: list[Event]
    by: type[Parked | Exited] | None = None
    woken: bool = False
    posted: tuple[tuple[str, bool], ...] = ()


class Holding:
    """`mail` is set when something was put into its mailbox. `account`: what whoever spawned it may do now.
    `closing`: what was started for this run, like its tools' worker; the runner closes it."""

    program: Program  # set by the runner before anything drives

    def __init__(
        self, shared: Shared, *, account: Account, view: View, holder: Holder, closing: AsyncExitStack
    ) -> None:
        self.pid = holder.pid
        self.account = account
        self.view = view
        self.holder = holder
        self.mail = asyncio.Event()
        self.rung = asyncio.Event()  # the runner's own, who alone clears it
        self.closing = closing
        self._shared = shared
        self._folding = threading.Lock()

    def ring(self) -> None:
        self.mail.set()
        self.rung.set()

    @property
    def watched(self) -> bool:
        """Whether a person is looking."""
        return self._shared.bells.watched(self.pid)

    @property
    def followed(self) -> bool:
        return self._shared.bells.followed(self.pid)

    def now_ms(self) -> int:
        """The wall clock, as it goes on from this server's start: setting it moves no timer. For `due_ms`."""
        return self._shared.clock.now_ms()

    def tell(self, delta: Delta) -> None:
        """To whoever follows, and nobody else."""
        self._shared.bells.tell(delta)

    async def put(self, value: Any) -> str:
        """A segment of this process. Raises: InvalidRequest, PayloadTooLarge, StorageUnavailable."""
        return await self._shared.segments.put(self.account.id, value)

    async def append(self, *drafts: Draft, also: Callable[[], Transaction[None]] | None = None) -> list[Event]:
        """`also`: part of the same transaction, after the events.

        Raises: Fenced when another has the process now; StorageUnavailable.
        """

        def begin() -> Transaction[list[Event]]:
            events = yield from self.appending(*drafts)
            if also is not None:
                yield from also()
            return events

        return await self.write(begin, others=also is not None)

    async def write(self, begin: Callable[[], Transaction[list[Event]]], *, others: bool = False) -> list[Event]:
        """A transaction of which `appending` is a part, and which returns its events. `others`: it writes for other
        processes, too. Raises: as `append`."""
        events = await self._shared.database.run(begin, durable=True, quick=True)
        await self._fold(events)
        if others:  # a child may be born, or another process be sent something
            self._shared.bells.work()
            self._shared.bells.look.set()
        return events

    def appending(self, *drafts: Draft) -> Transaction[list[Event]]:
        """For a larger transaction; `refresh` when it is committed. Raises: Illegal for what the fold would refuse."""
        return (yield from self._shared.log.append(self.pid, drafts, holder=self.holder, view=self._copied))

    async def refresh(self) -> None:
        """Folds what was appended since, by a transaction of somebody else that this process was part of."""
        while True:
            events = await self._shared.log.read(self.pid, after=self.view.seq)
            self._apply(events)
            if not events:
                return

    async def take_mail(self) -> list[Received]:
        """Takes what is in the mailbox into the log, and obeys what the kernel obeys: pause, resume, cancel, kill.
        What was received and asks for nothing of that kind.

        Raises: Parked, Exited; what `append` raises.
        """
        self.mail.clear()
        begun = self.view.seq
        while await self._unread():
            ended = await self._shared.database.run(self._taking, durable=True)
            await self._settle(ended)
        return [signal for signal in self.view.signals if signal.seq > begun]

    async def must_stop(self) -> Stop:
        """For what waits in the mailbox; nothing is taken."""
        rows = await self._shared.database.read(mailbox.PEEK(process=self.pid, most=mailbox.UNREAD_MAX))
        signals = {SignalKind(row["signal"]) for row in rows}
        if signals & {SignalKind.KILL, SignalKind.CANCEL}:
            return Stop.NOW
        if SignalKind.PAUSE not in signals:
            return Stop.NO
        return Stop.AFTER_CALLS if self.in_the_world() else Stop.NOW

    async def park(
        self,
        state: State,
        reason: Reason,
        *,
        due_ms: int | None = None,
        about: Sequence[str] = (),
        drafts: Sequence[Draft] = (),
        tell: Callable[[Log, Work], Transaction[tuple[tuple[str, bool], ...]]] | None = None,
    ) -> None:
        """Ends the run until a signal comes; `drafts` are appended before, in the same transaction. Mail that came
        meanwhile makes the process ready at once: nothing is slept through. `tell`: part of the transaction, before
        this process's head is locked: signals to those above it, whom that woke.

        Raises: Parked, always, if nothing else.
        """
        body = ProcState(to=state, reason=reason, due_ms=due_ms, about=tuple(about))
        await self._settle(
            await self._shared.database.run(
                lambda: self._parking(body, [*drafts, Draft(body=body)], tell), durable=True
            )
        )

    async def exit(
        self, reason: Reason, *, result: str | None = None, error: str = "", drafts: Sequence[Draft] = ()
    ) -> None:
        """Ends the process: children that are not detached are cancelled, its parent is told, all in one transaction.
        `result`: a segment. A process that would end well while words for it are on their way hears them first: then
        nothing of this is written, and another run goes on.

        Raises: Exited or Parked, always, if nothing else.
        """
        told = result
        if told is None and error and self.view.parent is not None:
            told = await self.put(error)
        body = ProcExited(reason=reason, result=result, error=error)

        def begin() -> Transaction[_Ended]:
            if reason is Reason.OK and (yield from self._is_spoken_to()):
                return (yield from self._yielding([]))
            return (yield from self._exiting(body, told, drafts))

        await self._settle(await self._shared.database.run(begin, durable=True))

    def in_the_world(self) -> bool:
        """Whether a call is going on whose outcome would be unknown if it were cut off."""
        calls = self.view.calls.values()
        return any(call.status is CallStatus.STARTED and call.intent.effect not in HARMLESS for call in calls)

    async def _unread(self) -> bool:
        (row,) = await self._shared.database.read(mailbox.COUNTS(id=self.pid))
        return bool(row["mail"] > row["taken"])

    def _taking(self) -> Transaction[_Ended]:
        head = yield from locked_head(self.pid)
        mails = yield from mailbox.unread(head)
        if not mails:
            return _Ended(events=[])
        drafts: list[Draft] = []
        for mail in mails:
            drafts.append(mailbox.received(mail))
            if mail.signal in CONTROL or mail.signal in (SignalKind.ADOPT, SignalKind.TOP_UP):
                received = head.seq + len(drafts)
                drafts.append(Draft(body=SignalConsumed(received=received), cause=received))
            if mail.signal is SignalKind.ADOPT:
                drafts.append(Draft(body=adopted(), cause=received, actor=mail.source))
        order = _order(mails)
        if order in (SignalKind.KILL, SignalKind.CANCEL):
            yield from mailbox.took(self.pid, len(mails))
            reason = Reason.KILLED if order is SignalKind.KILL else Reason.CANCELLED
            return (yield from self._exiting(ProcExited(reason=reason), None, drafts))
        if order is SignalKind.PAUSE:
            yield from mailbox.took(self.pid, len(mails))
            paused = ProcState(to=State.PAUSED, reason=Reason.USER)
            return (yield from self._parking(paused, [*drafts, Draft(body=paused)]))
        events = yield from self.appending(*drafts)
        yield from mailbox.took(self.pid, len(mails))
        return _Ended(events=events)

    def _parking(
        self,
        body: ProcState,
        drafts: Sequence[Draft],
        tell: Callable[[Log, Work], Transaction[tuple[tuple[str, bool], ...]]] | None = None,
    ) -> Transaction[_Ended]:
        posted = (yield from tell(self._shared.log, self._shared.work)) if tell is not None else ()
        events = yield from self.appending(*drafts)
        head = yield from locked_head(self.pid)
        unread = yield from mailbox.unread(head)
        if any(body.to is not State.PAUSED or mail.signal in WAKE_PAUSED for mail in unread):
            return (yield from self._yielding(events, posted))
        yield from self._shared.work.finish(self.holder.claim)
        return _Ended(events=events, by=Parked, posted=posted)

    def _yielding(self, events: list[Event], posted: tuple[tuple[str, bool], ...] = ()) -> Transaction[_Ended]:
        """The run ends and the process is ready at once."""
        events += yield from self.appending(Draft(body=ProcState(to=State.READY)))
        yield from self._shared.work.release(self.holder.claim)
        return _Ended(events=events, by=Parked, woken=True, posted=posted)

    def _is_spoken_to(self) -> Transaction[bool]:
        """Or adopted, with calls that were withheld and are to be made now."""
        head = yield from locked_head(self.pid)
        unread = {mail.signal for mail in (yield from mailbox.unread(head))}
        return bool(unread & {SignalKind.MESSAGE, SignalKind.ADOPT}) or any(to_release(self.view))

    def _exiting(self, body: ProcExited, told: str | None, drafts: Sequence[Draft]) -> Transaction[_Ended]:
        shared = self._shared
        for ending in shared.on_exit:  # budgets are locked before heads
            yield from ending(self.pid)
        if self.view.parent is not None:
            yield from locked_head(self.view.parent)  # parents are locked before their children
        events = yield from self.appending(*drafts, Draft(body=body))
        yield from shared.work.finish(self.holder.claim)
        posted = yield from dismiss(shared.log, shared.work, self.pid)
        if self.view.parent is not None:
            done = yield from tell_parent(
                shared.log, shared.work, self.view.parent, self.pid, reason=body.reason, told=told
            )
            posted.append((self.view.parent, done.woken))
        return _Ended(events=events, by=Exited, posted=tuple(posted))

    async def _settle(self, ended: _Ended) -> None:
        """After the commit. Raises: Parked, Exited."""
        await self._fold(ended.events)
        bells = self._shared.bells
        for pid, woken in ended.posted:
            bells.posted(pid, woken=woken)
        if ended.woken:
            bells.work()
        if self.view.due_ms is not None:
            bells.timer(self.pid, self.view.due_ms)
        if ended.by is not None:
            raise ended.by(self.pid)

    async def _fold(self, events: list[Event]) -> None:
        """Transactions may be told of in another order than they were committed in: a gap is read from the log."""
        if events and events[0].seq > self.view.seq + 1:
            await self.refresh()
        else:
            self._apply(events)
        self._shared.bells.appended(self.pid)

    def _apply(self, events: Sequence[Event]) -> None:
        with self._folding:
            for event in events:
                if event.seq == self.view.seq + 1:
                    self.view.apply(event)

    def _copied(self) -> View:
        """Also in the database's own thread."""
        with self._folding:
            return self.view.copy()


def adopted() -> Note:
    """The event from which on a fork withholds nothing."""
    return Note(about="adopted", text="What it does is done from now on.")


def _order(mails: Sequence[Mail]) -> SignalKind | None:
    """What the process is to do of what it was told: the last word, unless it is to end."""
    told = [mail.signal for mail in mails if mail.signal in CONTROL]
    for ending in (SignalKind.KILL, SignalKind.CANCEL):
        if ending in told:
            return ending
    return told[-1] if told else None

"""One process that this server runs: its view, and the only hand that appends to its log.

Every method that writes does so in one durable transaction that checks the holder first; what was written is folded
into the view afterwards. When a write fails, or its outcome is not known, the view is worthless: let the exception
pass, and whoever claims the process next folds its log anew.

A run ends by `park` or `exit`, or because `take_mail` found that it has to: they raise `Parked` or `Exited`, which only
`runner.py` catches. Their transactions are in `ending.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from nimbos.db import Transaction
from nimbos.kernel import mailbox
from nimbos.kernel.bells import Delta
from nimbos.kernel.effects import HARMLESS
from nimbos.kernel.ending import Ended, Endings, Exited, Parked, Shared, Tell, adopted
from nimbos.kernel.events import Event, ProcExited, ProcState
from nimbos.kernel.fold import View
from nimbos.kernel.log import Draft, Holder
from nimbos.kernel.releasing import to_release
from nimbos.kernel.view import CallStatus, Received
from nimbos.kernel.words import Reason, SignalKind, State
from nimbos.types import Account

if TYPE_CHECKING:
    from nimbos.kernel.programs import Program

__all__ = ["Exited", "Holding", "Parked", "Shared", "Stop", "adopted"]


class Stop(StrEnum):
    """Whether what is in the mailbox ends the run before it ends by itself."""

    NO = "no"
    AFTER_CALLS = "after calls"  # a call goes on whose outcome would be unknown if it were cut off
    NOW = "now"


class Holding:
    """`mail` is set when something was put into its mailbox. `account`: what whoever spawned it may do now.
    `closing`: what was started for this run, like its tools' worker; the runner closes it. `alone`: awaited before it
    parks, where several things are under way. `answering`: held from a look at the mail to the outcome that consumes
    some of it, so that nothing is consumed twice. `may_begin`: not set while the run is about to end, and only waits
    for calls that are under way outside: no other is to begin then."""

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
        self.alone: Callable[[], Awaitable[None]] | None = None
        self.answering = asyncio.Lock()
        self.may_begin = asyncio.Event()
        self.may_begin.set()
        self._shared = shared
        self._folding = threading.Lock()
        self._owed = frozenset(call_id for call_id, _ in to_release(view))
        self._endings = Endings(shared, holder, self.appending, self._copied)

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
        view = self._copied()
        before = view.unheard
        events = yield from self._shared.log.append(self.pid, drafts, holder=self.holder, view=lambda: view)
        if view.unheard != before:
            yield from mailbox.keep_unheard(self.pid, view.unheard)
        return events

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
            ended = await self._shared.database.run(lambda: self._endings.taking(self.view), durable=True)
            await self._settle(ended)
        return [signal for signal in self.view.signals if signal.seq > begun]

    async def must_stop(self) -> Stop:
        """For what waits in the mailbox; nothing is taken."""
        signals = mailbox.kinds_of(await self._shared.database.read(mailbox.KINDS(process=self.pid)))
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
        tell: Tell | None = None,
    ) -> None:
        """Ends the run until a signal comes; `drafts` are appended before, in the same transaction. Mail that came
        meanwhile makes the process ready at once: nothing is slept through. `tell`: part of the transaction, before
        this process's head is locked: signals to those above it, whom that woke.

        Raises: Parked, always, if nothing else.
        """
        if self.alone is not None:
            await self.alone()
        body = ProcState(to=state, reason=reason, due_ms=due_ms, about=tuple(about))
        await self._settle(
            await self._shared.database.run(
                lambda: self._endings.parking(body, [*drafts, Draft(body=body)], tell), durable=True
            )
        )

    async def exit(
        self,
        reason: Reason,
        *,
        result: str | None = None,
        error: str = "",
        drafts: Sequence[Draft] = (),
        driven: bool = True,
    ) -> None:
        """Ends the process: children that are not detached are cancelled, its parent is told, all in one transaction.
        `result`: a segment. An agent that would end well while words for it are on their way hears them first, and a
        process that was adopted makes the calls that it withheld first: then nothing of this is written, and another
        run goes on. `driven` False: none could.

        Raises: Exited or Parked, always, if nothing else.
        """
        told = result
        if told is None and error and self.view.parent is not None:
            told = await self.put(error)
        body = ProcExited(reason=reason, result=result, error=error.replace("\0", "\N{REPLACEMENT CHARACTER}"))

        def begin() -> Transaction[Ended]:
            if driven and (yield from self._endings.goes_on(reason, self._owed, hears=not self.program.entry)):
                return (yield from self._endings.yielding([]))
            return (yield from self._endings.exiting(self.view, body, told, drafts))

        await self._settle(await self._shared.database.run(begin, durable=True))

    def in_the_world(self) -> bool:
        """Whether a call is going on whose outcome would be unknown if it were cut off."""
        calls = self.view.calls.values()
        return any(call.status is CallStatus.STARTED and call.intent.effect not in HARMLESS for call in calls)

    async def _unread(self) -> bool:
        (row,) = await self._shared.database.read(mailbox.COUNTS(id=self.pid))
        return bool(row["mail"] > row["taken"])

    async def _settle(self, ended: Ended) -> None:
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

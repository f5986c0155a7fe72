"""How a run ends: taking orders out of the mailbox, parking, exiting, each one transaction that also ends the claim.

Part of `holding.py`, which runs these and tells the server what came of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nimbos.db import Database, Transaction
from nimbos.kernel import mailbox
from nimbos.kernel.bells import Bells
from nimbos.kernel.children import dismiss, tell_forks, tell_parent
from nimbos.kernel.events import Event, Note, ProcExited, ProcState, SignalConsumed
from nimbos.kernel.log import Draft, Holder, Log, caught_up
from nimbos.kernel.mailbox import CONTROL, WAKE_PAUSED, Mail
from nimbos.kernel.processes import locked_head
from nimbos.kernel.releasing import dropped, to_release
from nimbos.kernel.segments import Segments
from nimbos.kernel.timers import SteadyClock
from nimbos.kernel.view import View
from nimbos.kernel.words import Reason, SignalKind, State
from nimbos.work import Work

Posted: TypeAlias = tuple[tuple[str, bool], ...]  # whose mailboxes were written, and whether that woke them
Tell: TypeAlias = Callable[[Log, Work], Transaction[Posted]]
Appending: TypeAlias = Callable[..., Transaction[list[Event]]]


class Parked(Exception):
    """The run is over; a signal makes the process ready again."""


class Exited(Exception):
    """The run is over, and so is the process."""


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
class Ended:
    """What became of a run, once its transaction is committed. `woken`: there is work to claim. `posted`: whose
    mailboxes were written, and whether that woke them."""

    events: list[Event]
    by: type[Parked | Exited] | None = None
    woken: bool = False
    posted: Posted = ()


class Endings:
    """For one holding. `appending`: to its log, as it is allowed to. `copied`: its view, which the log may be ahead of:
    what was cut off while it was written is written all the same."""

    def __init__(self, shared: Shared, holder: Holder, appending: Appending, copied: Callable[[], View]) -> None:
        self._shared = shared
        self._holder = holder
        self._appending = appending
        self._copied = copied

    def taking(self, view: View) -> Transaction[Ended]:
        head = yield from locked_head(self._holder.pid)
        mails = yield from mailbox.unread(head)
        if not mails:
            return Ended(events=[])
        if _order(mails) is SignalKind.PAUSE:  # what lies behind it must not lie there unread: it may be a kill
            mails = yield from mailbox.unread(head, whole=True)
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
            yield from mailbox.took(self._holder.pid, len(mails))
            reason = Reason.KILLED if order is SignalKind.KILL else Reason.CANCELLED
            return (yield from self.exiting(view, ProcExited(reason=reason), None, drafts))
        if order is SignalKind.PAUSE:
            yield from mailbox.took(self._holder.pid, len(mails))
            paused = ProcState(to=State.PAUSED, reason=Reason.USER)
            return (yield from self.parking(paused, [*drafts, Draft(body=paused)]))
        events = yield from self._appending(*drafts)
        yield from mailbox.took(self._holder.pid, len(mails))
        return Ended(events=events)

    def parking(
        self,
        body: ProcState,
        drafts: Sequence[Draft],
        tell: Tell | None = None,
    ) -> Transaction[Ended]:
        """What waits for nothing but its adoption, and was adopted, is ready at once."""
        posted = (yield from tell(self._shared.log, self._shared.work)) if tell is not None else ()
        events = yield from self._appending(*drafts)
        head = yield from locked_head(self._holder.pid)
        unread = yield from mailbox.unread_kinds(head)
        waits = body.to is State.WAITING and body.reason is Reason.SIGNAL
        if waits and (yield from self._released()):
            return (yield from self.yielding(events, posted))
        if unread & WAKE_PAUSED or (unread and body.to is not State.PAUSED):
            return (yield from self.yielding(events, posted))
        yield from self._shared.work.finish(self._holder.claim)
        return Ended(events=events, by=Parked, posted=posted)

    def yielding(self, events: list[Event], posted: Posted = ()) -> Transaction[Ended]:
        """The run ends and the process is ready at once."""
        events += yield from self._appending(Draft(body=ProcState(to=State.READY)))
        yield from self._shared.work.release(self._holder.claim)
        return Ended(events=events, by=Parked, woken=True, posted=posted)

    def goes_on(self, reason: Reason, owed: frozenset[str], *, hears: bool) -> Transaction[bool]:
        """Whether a process that would exit by itself runs once more: it was adopted, with calls that were withheld
        and are to be made now; or it would end well, and words for it are on their way, which it `hears`: a function
        would run from its top to the same end. `owed`: what was to be made when this run began; who fails although it
        had its turn does not get another one."""
        head = yield from locked_head(self._holder.pid)
        unread = yield from mailbox.unread_kinds(head)
        if reason is Reason.OK:
            heard = {SignalKind.ADOPT, SignalKind.MESSAGE} if hears else {SignalKind.ADOPT}
            return bool(unread & heard) or bool((yield from self._released()))
        return SignalKind.ADOPT in unread or bool((yield from self._released()) - owed)

    def exiting(self, view: View, body: ProcExited, told: str | None, drafts: Sequence[Draft]) -> Transaction[Ended]:
        shared = self._shared
        for ending in shared.on_exit:  # budgets are locked before heads
            yield from ending(self._holder.pid)
        if view.parent is not None:
            yield from locked_head(view.parent)  # parents are locked before their children
        notes = yield from self._dropping(drafts)
        events = yield from self._appending(*drafts, *notes, Draft(body=body))
        yield from shared.work.finish(self._holder.claim)
        posted = yield from dismiss(shared.log, shared.work, self._holder.pid)
        if view.parent is not None:
            done = yield from tell_parent(
                shared.log, shared.work, view.parent, self._holder.pid, reason=body.reason, told=told
            )
            posted.append((view.parent, done.woken))
            posted += yield from tell_forks(
                shared.log,
                shared.work,
                view.parent,
                self._holder.pid,
                reason=body.reason,
                told=told,
                born_seq=view.born_seq,
            )
        return Ended(events=events, by=Exited, posted=tuple(posted))

    def _dropping(self, drafts: Sequence[Draft]) -> Transaction[list[Draft]]:
        """What a fork that was adopted, and perhaps has not read that yet, will not do any more."""
        view = yield from self._withholding()
        if view is None:
            return []
        unread = yield from mailbox.unread_kinds((yield from locked_head(self._holder.pid)))
        more = [Draft(body=adopted())] if SignalKind.ADOPT in unread else []
        view.go_on([draft.body for draft in (*drafts, *more)])
        note = dropped(view)
        return [*more, Draft(body=note)] if note is not None else more

    def _released(self) -> Transaction[frozenset[str]]:
        """The ids of the calls that a fork is to make, now that it is adopted."""
        view = yield from self._withholding()
        return frozenset() if view is None else frozenset(call_id for call_id, _ in to_release(view))

    def _withholding(self) -> Transaction[View | None]:
        """As it is now, to be changed freely; None for what withholds nothing, and never will."""
        head, view = (yield from locked_head(self._holder.pid)), self._copied()
        if not view.withheld and not view.syscalls.withheld:
            return None
        return (yield from caught_up(head, view))


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

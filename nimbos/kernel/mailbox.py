"""Mailboxes: what anyone outside a process may write for it. Whoever runs the process takes it into the log.

    post ─▶ row, and when the process is parked: ready, and work to claim ─▶ take ─▶ signal.received ─▶ signal.consumed

A signal is known by its source and the id it has there: posted again it changes nothing, also long after it was taken.
A message that was taken and that nobody has heard still has its place: row 0 says how many do (`keep_unheard`).
All functions are transactions, to be part of larger ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Integer, Text, bindparam, select

from nimbos.db import Row, Statement, Transaction, insert, upsert
from nimbos.db.tables.processes import process_mailbox, processes
from nimbos.errors import Conflict, Overloaded, PayloadTooLarge
from nimbos.kernel.events import ProcState, SignalReceived
from nimbos.kernel.log import Draft, Log
from nimbos.kernel.processes import Head, locked_head, store_head
from nimbos.kernel.segments import canonical
from nimbos.kernel.words import Reason, SignalKind, State
from nimbos.work import Work

QUEUES = "process:"  # how the names of the queues begin in which ready processes wait for a server
UNREAD_MAX = 1_000  # signals that a mailbox holds, with the messages that were taken out of it and not heard
MESSAGE_BYTES_MAX = 1 << 20  # as JSON
CONTROL = frozenset({SignalKind.PAUSE, SignalKind.RESUME, SignalKind.CANCEL, SignalKind.KILL})  # the kernel obeys
WAKE_PAUSED = frozenset({SignalKind.RESUME, SignalKind.CANCEL, SignalKind.KILL})
_ALWAYS = CONTROL | {SignalKind.CHILD_EXIT, SignalKind.TIMER}  # a full mailbox takes these too
_TAKEN_AT_ONCE = 100
_UNHEARD = 0  # the position of a row that is no signal: its `at_ms` is a count, so that a sender need not read a log
_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    """A signal on its way. `body`: a segment that is there already. `reason`: how the child `about` ended."""

    signal: SignalKind
    source: str
    external_id: str
    about: str = ""
    body: str | None = None
    reason: Reason = Reason.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """`new`: False when it was there already, or the process is over and nobody minds. `woken`: there is work now."""

    new: bool
    woken: bool = False


def post(log: Log, work: Work, pid: str, mail: Mail) -> Transaction[Posted]:
    """Puts a signal into the mailbox, and wakes the process if it is parked.

    Raises: NotFound; Conflict for one that came too late, or an answer to what is not asked; Overloaded when the
    mailbox is full.
    """
    head = yield from locked_head(pid)
    if (yield KNOWN(process=pid, source=mail.source, external_id=mail.external_id)):
        return Posted(new=False)
    if head.state is State.DONE:
        gone = mail.signal is SignalKind.CANCEL and mail.source == f"process:{head.parent}"
        if gone or mail.signal in (SignalKind.CHILD_EXIT, SignalKind.TIMER):
            return Posted(new=False)
        raise Conflict(f"The process {pid} is over ({head.reason.value}).", param="pid")
    if mail.signal is SignalKind.ANSWER:
        mail = yield from _answering(head, mail)
    if mail.signal not in _ALWAYS:
        yield from _check_room(head, mail.signal)
    yield from _add(head, mail)
    if not head.parked or (head.state is State.PAUSED and mail.signal not in WAKE_PAUSED):
        return Posted(new=True)
    yield from wake(log, work, head, actor=mail.source)
    return Posted(new=True, woken=True)


def message_of(body: Any) -> bytes:
    """A message as its segment. Raises: InvalidRequest for what is no JSON value; PayloadTooLarge."""
    content = canonical(body)
    if len(content) > MESSAGE_BYTES_MAX:
        raise PayloadTooLarge(have=len(content), limit=MESSAGE_BYTES_MAX, what="message")
    return content


def keep_unheard(pid: str, count: int) -> Transaction[None]:
    """So many messages are in the log of the process, and nobody has heard them."""
    yield _KEEP(
        process=pid,
        position=_UNHEARD,
        source="kernel",
        external_id="unheard",
        signal=SignalKind.MESSAGE.value,
        about="",
        body=None,
        reason=Reason.NONE.value,
        after_seq=0,
        at_ms=count,
    )


def is_full(head: Head) -> bool:
    return head.mail - head.taken >= UNREAD_MAX


def wake(log: Log, work: Work, head: Head, *, actor: str) -> Transaction[None]:
    """Makes a parked process ready; its head is locked."""
    yield from log.append(head.pid, [Draft(body=ProcState(to=State.READY), actor=actor)], holder=None)
    yield from work.add(queue_of(head.account), head.pid)


def queue_of(account: str) -> str:
    """The kind of the work that a ready process is: a queue for each project, so that none waits behind another's."""
    return f"{QUEUES}{account}"


def account_of(queue: str) -> str:
    """Whose processes wait in it."""
    return queue.removeprefix(QUEUES)


def unread(head: Head, *, whole: bool = False) -> Transaction[list[Mail]]:
    """What was not taken yet, oldest first, up to a bound; or all of it."""
    left = head.mail - head.taken
    if not left:
        return []
    most = left if whole else _TAKEN_AT_ONCE
    rows = yield _UNREAD(process=head.pid, taken=head.taken, most=most)
    return [_mail(row) for row in rows]


def unread_kinds(head: Head) -> Transaction[frozenset[SignalKind]]:
    """Of all that was not taken yet, however much that is."""
    if head.mail == head.taken:
        return frozenset()
    return kinds_of((yield KINDS(process=head.pid)))


def kinds_of(rows: Sequence[Row]) -> frozenset[SignalKind]:
    """What `KINDS` gave."""
    return frozenset(SignalKind(row["signal"]) for row in rows)


def took(pid: str, count: int) -> Transaction[None]:
    """The first `count` of the unread are in the log, since this transaction."""
    head = yield from locked_head(pid)
    yield from store_head(msgspec.structs.replace(head, taken=head.taken + count))


def received(mail: Mail) -> Draft:
    body = SignalReceived(
        signal=mail.signal,
        source=mail.source,
        external_id=mail.external_id,
        about=mail.about,
        body=mail.body,
        reason=mail.reason,
    )
    return Draft(body=body, actor=mail.source)


def _check_room(head: Head, signal: SignalKind) -> Transaction[None]:
    """Raises: Overloaded."""
    used = head.mail - head.taken
    if signal is SignalKind.MESSAGE:
        rows = yield _FIND(process=head.pid, position=_UNHEARD)
        used += rows[0]["at_ms"] if rows else 0
    if used >= UNREAD_MAX:
        raise Overloaded(
            limit="signals in the mailbox",
            value=UNREAD_MAX,
            used=used,
            retry_after_s=_RETRY_AFTER_S,
            owner=f"process {head.pid}",
        )


def _answering(head: Head, mail: Mail) -> Transaction[Mail]:
    """An answer belongs to one question that is open. Raises: Conflict."""
    if not head.asked_seq or not head.about:  # a budget, or a key, is no question
        raise Conflict(f"The process {head.pid} asks nothing; it is {_doing(head)}.", param="pid")
    about = mail.about or head.asked
    if not about:
        asked = ", ".join(head.about)
        raise Conflict(f"The process {head.pid} asks more than one thing: say which of {asked}.", param="about")
    if about not in head.about:
        raise Conflict(f"The process {head.pid} does not ask {about[:80]!r}.", param="about")
    if (yield _ANSWERED(process=head.pid, about=about, asked_seq=head.asked_seq, signal=SignalKind.ANSWER.value)):
        raise Conflict(f"The process {head.pid} has its answer already.", param="about")
    return replace(mail, about=about)


def _doing(head: Head) -> str:
    return f"{head.state.value} ({head.reason.value})" if head.reason else head.state.value


def _add(head: Head, mail: Mail) -> Transaction[None]:
    position = head.mail + 1
    yield _INSERT(
        process=head.pid,
        position=position,
        source=mail.source,
        external_id=mail.external_id,
        signal=mail.signal.value,
        about=mail.about,
        body=mail.body,
        reason=mail.reason.value,
        after_seq=head.seq,
        at_ms=time.time_ns() // 1_000_000,
    )
    yield from store_head(msgspec.structs.replace(head, mail=position))


def _mail(row: Row) -> Mail:
    return Mail(
        signal=SignalKind(row["signal"]),
        source=row["source"],
        external_id=row["external_id"],
        about=row["about"],
        body=row["body"],
        reason=Reason(row["reason"]),
    )


_OF = process_mailbox.c.process == bindparam("process", type_=Text)
_INSERT = insert(process_mailbox)
_KEEP = upsert(process_mailbox, key=("process", "position"), set=("at_ms",))
_FIND = Statement(
    select(process_mailbox.c.at_ms).where(_OF, process_mailbox.c.position == bindparam("position", type_=BigInteger))
)
KNOWN = Statement(
    select(process_mailbox.c.position).where(
        _OF,
        process_mailbox.c.source == bindparam("source", type_=Text),
        process_mailbox.c.external_id == bindparam("external_id", type_=Text),
    )
)
_UNREAD = Statement(
    select(process_mailbox)
    .where(_OF, process_mailbox.c.position > bindparam("taken", type_=BigInteger))
    .order_by(process_mailbox.c.position)
    .limit(bindparam("most", type_=Integer))
)
_ANSWERED = Statement(
    select(process_mailbox.c.position)
    .where(
        _OF,
        process_mailbox.c.signal == bindparam("signal", type_=Text),
        process_mailbox.c.about == bindparam("about", type_=Text),
        process_mailbox.c.after_seq >= bindparam("asked_seq", type_=BigInteger),
    )
    .limit(1)
)
COUNTS = Statement(select(processes.c.mail, processes.c.taken).where(processes.c.id == bindparam("id", type_=Text)))
KINDS = Statement(
    select(process_mailbox.c.signal)
    .join(processes, processes.c.id == process_mailbox.c.process)
    .where(_OF, process_mailbox.c.position > processes.c.taken)
    .distinct()
)

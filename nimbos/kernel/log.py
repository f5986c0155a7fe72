"""The log of a process: appended to by one holder at a time, chained by hashes, read with a fork's past.

    processes        one row, the head: locked first by whoever appends, so that seq is dense and the chain has one end
    process_events   what happened; never changed

All of one transition is one transaction: `create` and `append` are parts of it. Knows the states and nothing else of
what may follow what: `fold.py` decides that, before anything is written.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace
from sqlalchemy import BigInteger, Integer, Text, bindparam, select

from nimbos.db import Database, ManyRows, Row, Statement, Transaction
from nimbos.db.tables.kernel import process_events
from nimbos.db.tables.processes import processes
from nimbos.errors import Conflict
from nimbos.kernel import heads
from nimbos.kernel.chain import columns_of, encoded, event_of, kind_of, sealed, version_of
from nimbos.kernel.events import Body, Event, Note, ProcCreated, ProcExited, ProcForked, ProcState
from nimbos.kernel.faults import Illegal
from nimbos.kernel.fold import View, fold
from nimbos.kernel.processes import Head, NewHead, after, first_head, head_of, insert_head, missing, store_head
from nimbos.kernel.processes import locked_head as _locked_head
from nimbos.kernel.verify import Verified, verify
from nimbos.kernel.words import Label, State, why_illegal
from nimbos.types import Usage
from nimbos.work import Claim, ClaimLost, Work

_ROWS_AT_ONCE = 8
_PAGE = 1000
_TIP = 2**62  # behind every event


class Fenced(ClaimLost):
    """Another holder has the process now: nothing of the transaction is written."""

    code = "fenced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An event that is not in a log yet. `cause`: the seq that led to it. `blob`: a large payload's hash."""

    body: Body
    cause: int | None = None
    call_id: str = ""
    actor: str = "kernel"
    label: Label = field(default_factory=Label)
    blob: str | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who may append while a process runs. `epoch`: the head's, raised when the process was claimed."""

    pid: str
    claim: Claim
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The events (after, upto] that a process, or a fork of it, has from this log."""

    pid: str
    after: int
    upto: int


class Log:
    def __init__(self, database: Database, work: Work, *, now_ms: Callable[[], int] | None = None) -> None:
        """`now_ms`: the wall clock, or one that goes on from it (`timers.py`)."""
        self._database = database
        self._work = work
        self._now_ms = now_ms or _now_ms

    def create(self, pid: str, drafts: Sequence[Draft], *, head: NewHead) -> Transaction[list[Event]]:
        """The first events of a process or fork, and its head.

        Raises: Conflict for a spawn key that was used; Illegal, also for a fork of an event that is not there.
        """
        born = first_head(pid, head, self._now_ms())
        first = drafts[0].body if drafts else None
        if isinstance(first, ProcForked):
            yield from _forkable(pid, first)
        elif not isinstance(first, ProcCreated):
            raise Illegal(pid, kind_of(first) if first else "none", "a log begins with proc.created or proc.forked")
        events, born = _written(born, drafts, self._now_ms())
        yield from insert_head(born)
        yield from _insert(events)
        return events

    def append(
        self,
        pid: str,
        drafts: Sequence[Draft],
        *,
        holder: Holder | None,
        view: Callable[[], View] | None = None,
    ) -> Transaction[list[Event]]:
        """`holder` None: from outside, while nobody runs it. `view`: makes a copy of what the holder has folded, so
        that nothing is written which the fold would refuse; called wherever the transaction runs.

        Raises: Fenced when another has it; Conflict when it runs and `holder` is None; Illegal; NotFound.
        """
        if holder is not None:
            yield from self._check(holder)
        head = yield from _locked_head(pid)
        if holder is not None and head.epoch != holder.epoch:
            raise Fenced(holder.claim)
        if holder is None and head.state is State.RUNNING:
            raise Conflict(f"The process {pid} is running; send it a signal.")
        if view is not None:
            (yield from caught_up(head, view())).go_on([draft.body for draft in drafts])
        events, head = _written(head, drafts, self._now_ms())
        yield from _insert(events)
        yield from store_head(head)
        return events

    def locked_head(self, pid: str) -> Transaction[Head]:
        """Raises: NotFound."""
        return _locked_head(pid)

    async def read(self, pid: str, *, after: int = 0, limit: int = _PAGE) -> list[Event]:
        """The next events, also those before it was forked, which bear the pid of the process they happened to.

        Raises: NotFound.
        """
        return [event_of(row) for row in await self._rows(await self.spans(pid), after, limit)]

    async def all(self, pid: str, *, after: int = 0) -> AsyncIterator[Event]:
        """Every event there is when it is reached. Raises: NotFound."""
        async for row in self.rows(pid, after=after):
            yield event_of(row)

    async def rows(self, pid: str, *, after: int = 0) -> AsyncIterator[Row]:
        """As `all`, as they are stored."""
        spans = await self.spans(pid)
        while rows := await self._rows(spans, after, _PAGE):
            for row in rows:
                yield row
            after = rows[-1]["seq"]

    async def verify(self, pid: str) -> Verified:
        """Raises: NotFound, FromNewerVersion."""
        rows = await self._database.read(heads.one(pid))
        if not rows:
            raise missing(pid)
        return await verify(head_of(rows[0]), self.rows(pid))

    async def spans(self, pid: str) -> list[Span]:
        """Whose events make its past, the oldest first. Raises: NotFound."""
        spans: list[Span] = []
        upto, at = _TIP, pid
        while at:
            rows = await self._database.read(_ORIGIN(pid=at))
            if not rows:
                raise missing(at)
            spans.append(Span(pid=at, after=rows[0]["forked_seq"], upto=upto))
            upto, at = min(upto, rows[0]["forked_seq"]), rows[0]["forked_from"]
        return spans[::-1]

    async def _rows(self, spans: list[Span], after: int, limit: int) -> list[Row]:
        found: list[Row] = []
        for span in spans:
            low = max(after, span.after)
            if low < span.upto and len(found) < limit:
                found += await self._database.read(
                    _READ(pid=span.pid, after=low, upto=span.upto, most=limit - len(found))
                )
        return found

    def _check(self, holder: Holder) -> Transaction[None]:
        try:
            yield from self._work.check(holder.claim)
        except ClaimLost as error:
            raise Fenced(holder.claim) from error


def caught_up(head: Head, view: View) -> Transaction[View]:
    """The view as the log is now: what was appended since it was folded is folded into it. `head` is locked.

    Raises: Illegal.
    """
    while view.seq < head.seq:
        rows = yield _READ(pid=head.pid, after=view.seq, upto=head.seq, most=_PAGE)
        if not rows:
            raise Illegal(head.pid, "none", f"event {view.seq + 1} is missing")
        fold((event_of(row) for row in rows), view)
    if (view.seq, view.hash) != (head.seq, head.hash):
        raise Illegal(head.pid, "none", f"the log ends at {head.seq}, and not as it was read up to {view.seq}")
    return view


def _forkable(pid: str, fork: ProcForked) -> Transaction[None]:
    """Raises: Illegal unless the event that the fork is chained to is in its parent's past."""
    upto, at = fork.at_seq, fork.of
    while at:
        rows = yield _ORIGIN(pid=at)
        if not rows:
            raise missing(at)
        if upto > rows[0]["forked_seq"]:
            found = yield _HASH(pid=at, seq=upto)
            if found and found[0]["hash"] == fork.at_hash:
                return
            break
        at = rows[0]["forked_from"]
    raise Illegal(pid, kind_of(fork), f"{fork.of} has no event {fork.at_seq} with this hash")


def _written(head: Head, drafts: Sequence[Draft], now_ms: int) -> tuple[list[Event], Head]:
    events = []
    for draft in drafts:
        _check_state(head, draft.body)
        kind = kind_of(draft.body)
        event = sealed(
            Event(
                pid=head.pid,
                seq=head.seq + 1,
                epoch=head.epoch,
                ts_ms=now_ms,
                kind=kind,
                cause=draft.cause,
                call_id=draft.call_id,
                actor=draft.actor,
                label=draft.label,
                body=encoded(draft.body),
                blob=draft.blob,
                usage=draft.usage,
                version=version_of(kind),
                prev_hash=head.hash,
                hash="",
            )
        )
        events.append(event)
        head = after(head, draft.body, seq=event.seq, hash=event.hash, ts_ms=now_ms)
    return events, replace(head, changed_ms=now_ms)


def _check_state(head: Head, body: Body) -> None:
    why = None
    if isinstance(body, ProcState):
        why = why_illegal(head.state, body.to, body.reason)
    elif isinstance(body, ProcExited):
        why = why_illegal(head.state, State.DONE, body.reason)
    elif head.state is State.DONE and not isinstance(body, Note):
        why = "the process is done"
    if why is not None:
        raise Illegal(head.pid, kind_of(body), why)


def _insert(events: Sequence[Event]) -> Transaction[None]:
    for at in range(0, len(events), _ROWS_AT_ONCE):
        yield _INSERT([columns_of(event) for event in events[at : at + _ROWS_AT_ONCE]])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


_PID = bindparam("pid", type_=Text)
_INSERT = ManyRows(process_events)
_ORIGIN = Statement(select(processes.c.forked_from, processes.c.forked_seq).where(processes.c.id == _PID))
_HASH = Statement(
    select(process_events.c.hash).where(
        process_events.c.pid == _PID, process_events.c.seq == bindparam("seq", type_=BigInteger)
    )
)
_READ = Statement(
    select(*process_events.c)
    .where(
        process_events.c.pid == _PID,
        process_events.c.seq > bindparam("after", type_=BigInteger),
        process_events.c.seq <= bindparam("upto", type_=BigInteger),
    )
    .order_by(process_events.c.seq)
    .limit(bindparam("most", type_=Integer))
)

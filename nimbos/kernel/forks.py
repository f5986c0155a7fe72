"""Forks: what if, from any event of a process's past. Only its files are copied, and those when somebody writes.

    fork    head and first event of each, chained to the event it goes on from; its budget draws on the original's
    adopt   the fork becomes real, with the children it has: from now on nothing is withheld
    drop    it is killed, and its files go

A fork has its own mailbox, its own children and fresh effect keys; what its past had begun, it begins anew. The rules
for that are the fold's (`folding/`); that its effects are withheld until it is adopted is the gate's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sqlalchemy import BigInteger, Integer, Text, bindparam, literal_column, select

from nimbos.db import Database, Statement, Transaction
from nimbos.db.tables.kernel import process_events
from nimbos.db.tables.processes import processes
from nimbos.errors import Conflict, InvalidRequest, NimbosError, StorageUnavailable
from nimbos.kernel import budgets, heads
from nimbos.kernel.bells import Bells
from nimbos.kernel.children import ADOPTION, check_project
from nimbos.kernel.events import ProcForked
from nimbos.kernel.fold import fold
from nimbos.kernel.holding import adopted
from nimbos.kernel.log import Draft, Log
from nimbos.kernel.mailbox import Mail, post, queue_of, wake
from nimbos.kernel.processes import Head, NewHead, head_of, locked_head
from nimbos.kernel.tools import Workspaces
from nimbos.kernel.words import SignalKind, State
from nimbos.types import Account, AskClass, new_id
from nimbos.work import Work

FORKS_MAX = 64  # at once
_FOLLOWING = frozenset({"ctx.changed", "budget.settled", "signal.consumed"})  # what an outcome or a message brings
_TOGETHER_MAX = 256
_EXIT_PATIENCE_S = 10.0
_EXIT_TICK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """After the commit: whom to ring."""

    posted: tuple[tuple[str, bool], ...] = ()


class _Over(Exception):
    """A process that is to be adopted is over, and may have withheld what can happen no more."""

    def __init__(self, pid: str) -> None:
        super().__init__(pid)
        self.pid = pid


class Forks:
    def __init__(self, database: Database, log: Log, work: Work, *, bells: Bells, workspaces: Workspaces) -> None:
        self._database = database
        self._log = log
        self._work = work
        self._bells = bells
        self._workspaces = workspaces

    async def fork(self, account: Account, pid: str, *, at: int | None = None, n: int = 1) -> list[str]:
        """`n` processes whose past is that of `pid` up to and with event `at`, and what was written together with it;
        None: all there is, and of one that is over, what was before its last answer. They run as soon as a server takes
        them.

        Raises: NotFound, InvalidRequest, Overloaded, StorageUnavailable.
        """
        if not 1 <= n <= FORKS_MAX:
            raise InvalidRequest(f"From 1 to {FORKS_MAX} forks can be made at once, not {n}.", param="n")
        if at is None:
            at = await self._last_answer(pid)
        made = [new_id("proc") for _ in range(n)]
        await self._workspaces.fork(pid, made)
        try:
            original = await self._database.run(partial(self._forking, account, pid, at, made), durable=True)
        except NimbosError as error:
            if not (isinstance(error, StorageUnavailable) and error.in_doubt):
                for fork in made:
                    await self._workspaces.drop(fork)
            raise
        if original.state is State.RUNNING:  # it may be writing; else the files are copied when somebody begins to
            await self._workspaces.settle(pid)
        self._bells.work()
        return made

    def _forking(self, account: Account, pid: str, at: int | None, made: Sequence[str]) -> Transaction[Head]:
        for fork in made:  # budgets are locked before heads
            yield from budgets.make(fork, None, pid)
        original = yield from locked_head(pid)
        yield from check_project(account, more=len(made))
        at_seq, at_hash = original.seq, original.hash
        if at is not None and at != original.seq:
            at_seq, at_hash = yield from _point(pid, at)
        head = NewHead(
            account=account,
            program=original.program,
            name=original.name,
            model=original.model,
            ask_class=_class_of(account, original.ask_class),
            depth=original.depth,
            detached=True,
            withheld=True,
            forked_from=pid,
            forked_seq=at_seq,
            forked_hash=at_hash,
        )
        first = Draft(
            body=ProcForked(of=pid, at_seq=at_seq, at_hash=at_hash), actor=f"user:{account.key or account.id}"
        )
        for fork in made:
            yield from self._log.create(fork, [first], head=head)
            yield from self._work.add(queue_of(account.id), fork)
        return original

    async def _last_answer(self, pid: str) -> int | None:
        """Of a process that is over: the event before it was last asked, so that there is something left to do."""
        rows = await self._database.read(heads.one(pid))
        if not rows or rows[0]["state"] != State.DONE.value:
            return None
        for span in reversed(await self._log.spans(pid)):
            found = await self._database.read(_LAST_ASK(pid=span.pid, after=span.after, upto=span.upto))
            if found:
                return max(1, int(found[0]["seq"]) - 1)
        return None

    async def adopt(self, pid: str, *, source: str) -> None:
        """What it does is done from now on, and so is what it had withheld (`releasing.py`).

        Raises: NotFound; Conflict for what is no fork, and for one that is over and withheld something;
        StorageUnavailable.
        """
        lossless: set[str] = set()  # of those that are over
        while True:
            try:
                told = await self._database.run(lambda: self._adopting_all(pid, source, lossless), durable=True)
                break
            except _Over as over:  # its log does not change any more, and is read outside of the transaction
                await self._check_nothing_is_lost(over.pid)
                lossless.add(over.pid)
        for member, woken in told.posted:
            self._bells.posted(member, woken=woken)

    def _adopting_all(self, pid: str, source: str, lossless: Collection[str]) -> Transaction[_Told]:
        """With its children, also those that are born meanwhile: until no more are found under a head that is locked.

        Raises: _Over, NotFound, Conflict."""
        posted: list[tuple[str, bool]] = []
        seen: set[str] = set()
        while True:
            rows = yield heads.family(pid)
            found = [head for head in map(head_of, rows) if head.pid not in seen]
            if not found:
                return _Told(posted=tuple(posted))
            for head in found:  # parents before their children
                if head.pid == pid and head.forked_from is None:
                    raise Conflict(f"The process {pid} is no fork.", param="pid")
                if head.withheld and (head.pid == pid or head.forked_from is None):
                    posted += yield from self._adopting(head.pid, source, lossless)
                seen.add(head.pid)

    def _adopting(self, pid: str, source: str, lossless: Collection[str]) -> Transaction[list[tuple[str, bool]]]:
        """By its own server where it runs: nobody else may append. Raises: _Over."""
        head = yield from locked_head(pid)
        if not head.withheld:
            return []
        if head.state is State.DONE and pid not in lossless:
            raise _Over(pid)
        if head.state is State.RUNNING:
            mail = Mail(signal=SignalKind.ADOPT, source=source, external_id="adopt")
            posted = yield from post(self._log, self._work, pid, mail)
            return [(pid, posted.woken)]
        yield from self._log.append(pid, [Draft(body=adopted(), actor=source)], holder=None)
        if head.state in (State.WAITING, State.ASKING):
            yield from wake(self._log, self._work, head, actor=source)
            return [(pid, True)]
        return [(pid, False)]

    async def _check_nothing_is_lost(self, pid: str) -> None:
        """Raises: Conflict."""
        events = [event async for event in self._log.all(pid)]
        withheld = fold(events).syscalls.withheld
        if withheld:
            first = next(event.seq for event in events if event.kind == "call.intent" and event.call_id in withheld)
            raise Conflict(
                f"The fork {pid} is over, and what it withheld can happen no more ({len(withheld)} calls). "
                f"`nimbos fork {pid} --at {first - 1}` makes one that can be adopted.",
                param="pid",
            )

    async def drop(self, pid: str, *, source: str) -> None:
        """Of a fork that was not adopted. Its log stays.

        Raises: NotFound; Conflict for a process that is real; StorageUnavailable.
        """

        def begin() -> Transaction[_Told]:
            head = yield from locked_head(pid)
            adopted_soon = yield ADOPTION(pid=pid, signal=SignalKind.ADOPT.value)
            if not head.withheld or head.forked_from is None or adopted_soon:
                raise Conflict(
                    f"The process {pid} is no fork that could be dropped; `nimbos kill` ends it.", param="pid"
                )
            if head.state is State.DONE:
                return _Told()
            mail = Mail(signal=SignalKind.KILL, source=source, external_id="drop")
            posted = yield from post(self._log, self._work, pid, mail)
            return _Told(posted=((pid, posted.woken),))

        told = await self._database.run(begin, durable=True)
        for member, woken in told.posted:
            self._bells.posted(member, woken=woken)
        if await self._is_over(pid):  # else its files stay until it is dropped again
            await self._workspaces.drop(pid)

    async def _is_over(self, pid: str) -> bool:
        """Waits for it, though not for long: perhaps no server runs it now."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + _EXIT_PATIENCE_S
        with self._bells.follow(pid) as follower:
            while True:
                follower.news.clear()
                (row,) = await self._database.read(heads.one(pid))
                if row["state"] == State.DONE.value or clock() >= deadline:
                    return bool(row["state"] == State.DONE.value)
                with suppress(TimeoutError):  # another server rings no bell here
                    async with asyncio.timeout(_EXIT_TICK_S):
                        await follower.news.wait()


def _point(pid: str, seq: int) -> Transaction[tuple[int, str]]:
    """Where a fork at this event of the process's past begins: behind what follows from it in the same transaction, as
    without that it would be nowhere the process ever was. (seq, hash). Raises: InvalidRequest."""
    of: str | None = pid
    while of is not None:
        (origin,) = yield _ORIGIN(pid=of)
        if seq > origin["forked_seq"]:
            rows = yield _BEHIND(pid=of, seq=seq, most=_TOGETHER_MAX)
            if not rows or rows[0]["seq"] != seq:
                break
            last = rows[0]
            for row in rows[1:]:
                if row["kind"] not in _FOLLOWING or (row["ts_ms"], row["epoch"]) != (last["ts_ms"], last["epoch"]):
                    break
                last = row
            return int(last["seq"]), str(last["hash"])
        of = origin["forked_from"]
    raise InvalidRequest(f"The process {pid} has no event {seq}; `nimbos logs {pid}` shows which it has.", param="at")


def _class_of(account: Account, wanted: AskClass) -> AskClass:
    """The original's, unless whoever forks has a key that is not for it."""
    allowed = [name for name in AskClass if f"class:{name}" in account.scopes]
    return wanted if not allowed or wanted in allowed else allowed[-1]


_PID = bindparam("pid", type_=Text)
_ORIGIN = Statement(select(processes.c.forked_from, processes.c.forked_seq).where(processes.c.id == _PID))
_BEHIND = Statement(
    select(*(process_events.c[name] for name in ("seq", "hash", "kind", "ts_ms", "epoch")))
    .where(process_events.c.pid == _PID, process_events.c.seq >= bindparam("seq", type_=BigInteger))
    .order_by(process_events.c.seq)
    .limit(bindparam("most", type_=Integer))
)
_LAST_ASK = Statement(
    select(process_events.c.seq)
    .where(
        process_events.c.pid == _PID,
        process_events.c.kind == literal_column("'model.intent'"),
        process_events.c.seq > bindparam("after", type_=BigInteger),
        process_events.c.seq <= bindparam("upto", type_=BigInteger),
    )
    .order_by(process_events.c.seq.desc())
    .limit(1)
)

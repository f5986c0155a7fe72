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
from dataclasses import dataclass, replace
from functools import partial

from nimbos.db import Database, Transaction
from nimbos.errors import Conflict, InvalidRequest, NimbosError, StorageUnavailable
from nimbos.kernel import budgets, heads
from nimbos.kernel.bells import Bells
from nimbos.kernel.children import ADOPTION, check_project
from nimbos.kernel.events import ProcForked
from nimbos.kernel.fold import View
from nimbos.kernel.fork_keys import ForkKey, MadeBefore
from nimbos.kernel.fork_points import last_answer, point
from nimbos.kernel.holding import adopted
from nimbos.kernel.log import Draft, Log
from nimbos.kernel.mailbox import Mail, post, queue_of, wake
from nimbos.kernel.processes import Head, NewHead, locked_head
from nimbos.kernel.releasing import MARK
from nimbos.kernel.tools import Workspaces
from nimbos.kernel.words import SignalKind, State
from nimbos.types import Account, AskClass, new_id
from nimbos.work import Work

FORKS_MAX = 64  # at once
_EXIT_PATIENCE_S = 10.0
_EXIT_TICK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """After the commit: whom to ring."""

    posted: tuple[tuple[str, bool], ...] = ()


class _Over(Exception):
    """Processes that are to be adopted are over, and may have withheld what can happen no more."""

    def __init__(self, pids: Sequence[str]) -> None:
        super().__init__(len(pids))
        self.pids = pids


class Forks:
    def __init__(self, database: Database, log: Log, work: Work, *, bells: Bells, workspaces: Workspaces) -> None:
        self._database = database
        self._log = log
        self._work = work
        self._bells = bells
        self._workspaces = workspaces

    async def fork(self, account: Account, pid: str, *, at: int | None = None, n: int = 1, key: str = "") -> list[str]:
        """`n` processes whose past is that of `pid` up to and with event `at`, and what was written together with it;
        None: all there is, and of one that is over, what was before its last answer. They run as soon as a server takes
        them. With a `key` that it was forked with before, those forks.

        Raises: NotFound, InvalidRequest, Overloaded, StorageUnavailable; Conflict for a key that others were made with.
        """
        if not 1 <= n <= FORKS_MAX:
            raise InvalidRequest(f"From 1 to {FORKS_MAX} forks can be made at once, not {n}.", param="n")
        asked = ForkKey(pid=pid, word=key, at=at, n=n)
        if key and (before := asked.made(await self._database.read(asked.looking()))):
            return before
        if at is None:
            at = await last_answer(self._database, self._log, pid)
        made = [new_id("proc") for _ in range(n)]
        await self._workspaces.fork(pid, made)
        try:
            original = await self._database.run(partial(self._forking, account, asked, at, made), durable=True)
        except (NimbosError, MadeBefore) as error:
            if not (isinstance(error, StorageUnavailable) and error.in_doubt):
                for fork in made:
                    await self._workspaces.drop(fork)
            if isinstance(error, MadeBefore):
                return error.pids
            raise
        if original.state is State.RUNNING:  # it may be writing; else the files are copied when somebody begins to
            await self._workspaces.settle(pid)
        self._bells.work()
        return made

    def _forking(self, account: Account, asked: ForkKey, at: int | None, made: Sequence[str]) -> Transaction[Head]:
        """Raises: MadeBefore when somebody else was quicker with the same key."""
        pid = asked.pid
        for fork in made:  # budgets are locked before heads
            yield from budgets.make(fork, None, pid)
        original = yield from locked_head(pid)
        if asked.word and (before := asked.made((yield asked.looking()))):
            raise MadeBefore(before)
        yield from check_project(account, more=len(made))
        at_seq, at_hash = original.seq, original.hash
        if at is not None and at != original.seq:
            at_seq, at_hash = yield from point(pid, at)
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
        actor = f"user:{account.key or account.id}"
        for number, fork in enumerate(made):
            key = asked.of(number)
            first = Draft(body=ProcForked(of=pid, at_seq=at_seq, at_hash=at_hash, key=key), actor=actor)
            yield from self._log.create(fork, [first], head=replace(head, key=key))
            yield from self._work.add(queue_of(account.id), fork)
        return original

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
            except _Over as over:  # their logs do not change any more, and are read outside of the transaction
                for one in over.pids:
                    await self._check_nothing_is_lost(one)
                lossless.update(over.pids)
        self._tell(told)

    def _adopting_all(self, pid: str, source: str, lossless: Collection[str]) -> Transaction[_Told]:
        """With its children, also those that are born meanwhile: until no more are found under a head that is locked.

        Raises: _Over, NotFound, Conflict."""
        posted: list[tuple[str, bool]] = []
        seen: set[str] = set()
        while True:
            found = [head for head in (yield from heads.whole_family(pid)) if head.pid not in seen]
            if not found:
                return _Told(posted=tuple(posted))
            if found[0].pid == pid and found[0].forked_from is None:
                raise Conflict(f"The process {pid} is no fork.", param="pid")
            its = [head for head in found if head.withheld and (head.pid == pid or head.forked_from is None)]
            if over := [head.pid for head in its if head.state is State.DONE and head.pid not in lossless]:
                raise _Over(over)
            for head in its:  # parents before their children
                posted += yield from self._adopting(head.pid, source, lossless)
            seen.update(head.pid for head in found)

    def _adopting(self, pid: str, source: str, lossless: Collection[str]) -> Transaction[list[tuple[str, bool]]]:
        """By its own server where it runs: nobody else may append. Raises: _Over."""
        head = yield from locked_head(pid)
        if not head.withheld:
            return []
        if head.state is State.DONE and pid not in lossless:
            raise _Over([pid])
        if head.state is State.RUNNING:
            if (yield ADOPTION(pid=pid, signal=SignalKind.ADOPT.value)):  # which it has yet to read
                return []
            mail = Mail(signal=SignalKind.ADOPT, source=source, external_id=new_id("sig"))
            posted = yield from post(self._log, self._work, pid, mail)
            return [(pid, posted.woken)]
        yield from self._log.append(pid, [Draft(body=adopted(), actor=source)], holder=None)
        if head.state in (State.WAITING, State.ASKING):
            yield from wake(self._log, self._work, head, actor=source)
            return [(pid, True)]
        return [(pid, False)]

    async def _check_nothing_is_lost(self, pid: str) -> None:
        """Raises: Conflict."""
        view, intended = View(), dict[str, int]()
        async for event in self._log.all(pid):
            view.apply(event)
            if event.kind == "call.intent":
                intended[event.call_id] = event.seq
        lost = [id for id in view.syscalls.withheld if f"{id}{MARK}" not in view.syscalls.ended]
        if lost:
            first = min(intended[id] for id in lost)
            raise Conflict(
                f"The fork {pid} is over, and what it withheld can happen no more ({len(lost)} calls). "
                f"`nimbos fork {pid} --at {first - 1}` makes one that can be adopted.",
                param="pid",
            )

    async def drop(self, pid: str, *, source: str) -> None:
        """Of a fork that was not adopted, and of its children, also those that are detached. The logs stay.

        Raises: NotFound; Conflict for a process that is real; StorageUnavailable.
        """

        def begin() -> Transaction[_Told]:
            head = yield from locked_head(pid)
            adopted_soon = yield ADOPTION(pid=pid, signal=SignalKind.ADOPT.value)
            if not head.withheld or head.forked_from is None or adopted_soon:
                raise Conflict(
                    f"The process {pid} is no fork that could be dropped; `nimbos kill` ends it.", param="pid"
                )
            return (yield from self._killing(pid, source))

        self._tell(await self._database.run(begin, durable=True))
        if await self._is_over(pid):  # else its files stay until it is dropped again
            born = await self._database.run(lambda: self._killing(pid, source), durable=True)
            self._tell(born)  # while it had not read yet that it is dropped
            await self._workspaces.drop(pid)

    def _killing(self, pid: str, source: str) -> Transaction[_Told]:
        """Those that its exit does not cancel would withhold for ever what they do."""
        posted = []
        for member in (yield from heads.whole_family(pid)):
            if member.pid != pid and not (member.detached and member.withheld and member.forked_from is None):
                continue
            if (yield from locked_head(member.pid)).state is not State.DONE:
                mail = Mail(signal=SignalKind.KILL, source=source, external_id=new_id("sig"))
                done = yield from post(self._log, self._work, member.pid, mail)
                posted.append((member.pid, done.woken))
        return _Told(posted=tuple(posted))

    def _tell(self, told: _Told) -> None:
        for member, woken in told.posted:
            self._bells.posted(member, woken=woken)

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


def _class_of(account: Account, wanted: AskClass) -> AskClass:
    """The original's, unless whoever forks has a key that is not for it."""
    allowed = [name for name in AskClass if f"class:{name}" in account.scopes]
    return wanted if not allowed or wanted in allowed else allowed[-1]

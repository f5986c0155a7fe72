"""The door to processes: spawn, signal, look, follow, and the crew that runs those that are ready.

Whoever has an account sees that account's processes, and nobody else's. What a process does is behind: `runner.py`
claims and drives, `mailbox.py` says how anything reaches it, `log.py` is what is true.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractContextManager, aclosing, suppress
from typing import Any

import structlog

from nimbos.blobs import Blobs
from nimbos.db import Database, Transaction
from nimbos.errors import Conflict, Forbidden, InvalidRequest, NimbosError
from nimbos.kernel import budgets, heads
from nimbos.kernel.bells import Bells, Delta, Follower
from nimbos.kernel.children import Birth, create
from nimbos.kernel.events import Event
from nimbos.kernel.holding import Shared
from nimbos.kernel.log import Log
from nimbos.kernel.mailbox import KIND, Mail, Posted, post
from nimbos.kernel.processes import Head, head_of, missing
from nimbos.kernel.programs import Programs
from nimbos.kernel.recovery import crew_name, release_dead
from nimbos.kernel.runner import Drive, Resolve, Runner
from nimbos.kernel.segments import Segments
from nimbos.kernel.timers import SteadyClock, Timers
from nimbos.kernel.words import SignalKind, State
from nimbos.ledger import Allowance
from nimbos.service import Service
from nimbos.types import Account, AskClass, new_id
from nimbos.work import Claim, Crew, Work

PLACES = 256  # processes that one server drives at a time
POLL_S = 1.0  # other servers ring no bell here
NAME_CHARACTERS_MAX = 200
ID_CHARACTERS_MAX = 300
EVENTS_MAX = 1_000

_log = structlog.get_logger(__name__)


class Kernel:
    """`start` within the loop that it is used from; `close` hands back what runs."""

    def __init__(
        self,
        *,
        database: Database,
        blobs: Blobs,
        service: Service,
        programs: Programs,
        server: str,
        resolve: Resolve,
        work: Work | None = None,
        clock: SteadyClock | None = None,
        places: int = PLACES,
    ) -> None:
        """`server`: what the ledger of this server calls it. `resolve`: what a key may do now."""
        self.database = database
        self.service = service
        self.programs = programs
        self.work = work or Work(database)
        self.log = Log(database, self.work)
        self.segments = Segments(blobs)
        self.bells = Bells()
        self.shared = Shared(
            database=database,
            log=self.log,
            work=self.work,
            segments=self.segments,
            bells=self.bells,
            clock=clock or SteadyClock(),
            on_exit=(budgets.close,),
        )
        self._resolve = resolve
        self._owner = crew_name(server)
        self._places = places
        self._timers = Timers(database, self.log, self.work, self.bells, self.shared.clock)
        self._crew: Crew | None = None
        self._looking: asyncio.Task[None] | None = None

    async def recover(self, dead: Iterable[str]) -> None:
        """What these servers held is free. Raises: StorageUnavailable."""
        await self.database.run(self.work.adopt)
        await release_dead(self.database, self.work, dead)

    async def start(self, drive: Drive) -> None:
        """`drive` runs an agent or a durable function, until it parks or exits."""
        runner = Runner(self.shared, shelf=self.programs, resolve=self._resolve, drive=drive)
        self._crew = Crew(
            self.database, self.work, places=self._places, claim=self._claim, run=runner.run, owner=self._owner
        )
        self.bells.answer(work=self._crew.wake)
        self._crew.start()
        self._timers.start()
        self._looking = asyncio.create_task(self._look(), name="process mail")

    async def close(self) -> None:
        """Processes that run are made ready for another server, or for the next start."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        await self._timers.close()
        if self._crew is not None:
            await self._crew.close()

    async def spawn(
        self,
        account: Account,
        program: str,
        input: Any,
        *,
        name: str = "",
        model: str = "",
        ask_class: AskClass | None = None,
        budget: Allowance | None = None,
        detached: bool = True,
        key: str = "",
    ) -> str:
        """A new process, or the one that was spawned with the same `key` before. `program`: a name or a hash.

        Raises: NotFound, ModelNotFound, Forbidden, InvalidRequest, PayloadTooLarge, Overloaded, StorageUnavailable.
        """
        _check_word(name, "name", NAME_CHARACTERS_MAX)
        _check_word(key, "key", ID_CHARACTERS_MAX)
        found = await self.programs.load(await self.programs.find(account.id, program))
        birth = Birth(
            pid=new_id("proc"),
            account=account,
            program=found.hash,
            name=name or found.name,
            input=await self.segments.put(account.id, input),
            model=await self.service.model_for(account, model or found.manifest.model.name),
            ask_class=_class_for(account, ask_class),
            detached=detached,
            key=key,
            actor=f"user:{account.key or account.id}",
        )
        allowance = budget or allowance_of(found.manifest.budget)

        def begin() -> Transaction[str]:
            pid = yield from create(self.log, self.work, birth)
            if pid == birth.pid:
                yield from budgets.make(pid, allowance, None, name=birth.name)
            return pid

        try:
            pid = await self.database.run(begin, durable=True)
        except Conflict:
            if not key:
                raise
            pid = await self.database.run(begin, durable=True)  # somebody spawned with this key meanwhile
        self.bells.work()
        return pid

    async def signal(
        self,
        account: Account,
        pid: str,
        kind: SignalKind,
        *,
        source: str,
        external_id: str,
        about: str = "",
        body: Any = None,
    ) -> bool:
        """False: this very signal (source and id) was there before.

        Raises: NotFound; Conflict for a process that is over, or an answer to what is not asked; Overloaded.
        """
        for what, word in (("source", source), ("id", external_id), ("about", about)):
            _check_word(word, what, ID_CHARACTERS_MAX)
        await self.find(account, pid)
        segment = None if body is None else await self.segments.put(account.id, body)
        mail = Mail(signal=kind, source=source, external_id=external_id, about=about, body=segment)
        posted = await self.database.run(lambda: self.posting(pid, mail), durable=True)
        self.bells.posted(pid, woken=posted.woken)
        return posted.new

    async def top_up(self, account: Account, pid: str, allowance: Allowance, *, source: str, external_id: str) -> bool:
        """More for the process, and those above it, to spend; whoever waits for it goes on. False: this very signal
        was there before. Raises: as `signal`; InvalidRequest."""
        for what, word in (("source", source), ("id", external_id)):
            _check_word(word, what, ID_CHARACTERS_MAX)
        await self.find(account, pid)

        def begin() -> Transaction[budgets.Told]:
            return budgets.top_up(self.log, self.work, pid, allowance, source=source, external_id=external_id)

        try:
            told = await self.database.run(begin, durable=True)
        except budgets.GivenBefore:
            return False
        for reached, woken in told:
            self.bells.posted(reached, woken=woken)
        return True

    def posting(self, pid: str, mail: Mail) -> Transaction[Posted]:
        """For larger transactions; ring `bells.posted` when it is committed."""
        return post(self.log, self.work, pid, mail)

    async def find(self, account: Account, pid: str) -> Head:
        """Raises: NotFound, also for another account's."""
        rows = await self.database.read(heads.one(pid))
        if not rows or rows[0]["account"] != account.id:
            raise missing(pid)
        return head_of(rows[0])

    async def list(
        self,
        account: Account,
        *,
        limit: int = 100,
        after: str = "",
        states: Iterable[State] = (),
        prefix: str = "",
    ) -> list[Head]:
        """Newest first, finished ones included. `after`: the last of the page before. `states`: those alone.
        `prefix`: those whose ids begin so."""
        return [
            head_of(row)
            for row in await self.database.read(
                heads.page(account.id, after=after, limit=limit, states=tuple(states), prefix=prefix)
            )
        ]

    async def tree(self, account: Account, pid: str) -> list[Head]:
        """The process and all below it, parents before children."""
        await self.find(account, pid)
        return [head_of(row) for row in await self.database.read(heads.family(pid))]

    async def events(self, account: Account, pid: str, *, after: int = 0, limit: int = EVENTS_MAX) -> list[Event]:
        await self.find(account, pid)
        return await self.log.read(pid, after=after, limit=min(limit, EVENTS_MAX))

    async def text(self, account: Account, hash: str) -> bytes:
        """A segment's content. Raises: NotFound."""
        return await self.segments.get_bytes(account.id, hash)

    async def follow(self, account: Account, pid: str, *, after: int = 0) -> AsyncGenerator[Event | Delta, None]:
        """The events after `after` as they come, and what running generations say meanwhile, until the process is
        done. Close the iterator (`contextlib.aclosing`). Raises: NotFound."""
        await self.find(account, pid)
        with self.bells.follow(pid) as follower:
            while True:
                follower.appended = False
                head = await self.find(account, pid)  # before its events: what is done writes none any more
                while events := await self.log.read(pid, after=after):
                    for event in events:
                        after = event.seq
                        yield event
                if head.state is State.DONE and after >= head.seq:
                    return
                async with aclosing(self._said(follower)) as said:
                    async for delta in said:
                        yield delta

    async def _said(self, follower: Follower) -> AsyncGenerator[Delta, None]:
        """Until there may be new events."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(follower.news.wait(), POLL_S)
            found = follower.news.is_set()
            follower.news.clear()
            while follower.deltas:
                yield follower.deltas.popleft()
            if follower.appended or not found:
                return

    def watching(self, pid: str) -> AbstractContextManager[None]:
        """A person looks at the process for as long as this lasts."""
        return self.bells.watching(pid)

    def _claim(self, n: int) -> Transaction[list[Claim]]:
        return self.work.claim(KIND, self._owner, n)

    async def _look(self) -> None:
        """Finds the mail that others wrote for what runs here."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.bells.look.wait(), POLL_S if self.bells.running else None)
            self.bells.look.clear()
            try:
                for row in await self.database.read(heads.running_with_mail()):
                    self.bells.posted(row["id"], woken=False)
            except NimbosError as error:
                _log.warning("kernel.mail_not_seen", code=error.code)


def allowance_of(budget: Any) -> Allowance:
    """What a manifest says."""
    return Allowance(tokens=budget.tokens, cost_micros=budget.cost_micros, seconds=budget.seconds, calls=budget.calls)


def _class_for(account: Account, wanted: AskClass | None) -> AskClass:
    """Raises: Forbidden for a class that the key is not for."""
    allowed = [name for name in AskClass if f"class:{name}" in account.scopes] or list(AskClass)
    chosen = wanted or (AskClass.AGENT if AskClass.AGENT in allowed else allowed[-1])
    if chosen not in allowed:
        raise Forbidden(f"This key is not for the class {chosen.value!r}, but for {', '.join(allowed)}.")
    return chosen


def _check_word(word: str, what: str, most: int) -> None:
    if len(word) > most or (word and not word.isprintable()):
        raise InvalidRequest(f"`{what}` may have {most} characters that can be shown.", param=what)

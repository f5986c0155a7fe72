"""The door to processes: spawn, signal, look, follow, and the crew that runs those that are ready.

Whoever has an account sees that account's processes, and nobody else's (`looking.py`). What a process does is behind:
`runner.py` runs what the crew has claimed, `mailbox.py` says how anything reaches it, `log.py` is what is true.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import structlog

from nimbos.accounts import project_weights
from nimbos.blobs import Blobs
from nimbos.db import Database, Transaction
from nimbos.errors import Conflict, Forbidden, InvalidRequest, NimbosError
from nimbos.kernel import budgets, heads
from nimbos.kernel.asking import check_choice
from nimbos.kernel.bells import Bells
from nimbos.kernel.children import Birth, create
from nimbos.kernel.driving import driver
from nimbos.kernel.forks import Forks
from nimbos.kernel.holding import Shared
from nimbos.kernel.log import Log
from nimbos.kernel.looking import POLL_S, Looking
from nimbos.kernel.mailbox import QUEUES, Mail, Posted, account_of, message_of, post, queue_of
from nimbos.kernel.programs import Programs
from nimbos.kernel.recovery import crew_name
from nimbos.kernel.replay import Folded, Replayed, Replays
from nimbos.kernel.runner import Drive, Resolve, Runner
from nimbos.kernel.segments import Segments, canonical
from nimbos.kernel.timers import SteadyClock, Timers
from nimbos.kernel.tools import Workspaces
from nimbos.kernel.words import SignalKind
from nimbos.ledger import Allowance
from nimbos.service import Service
from nimbos.types import Account, AskClass, new_id
from nimbos.work import Claim, Crew, Work, shares_of

PLACES = 256  # processes that one server drives at a time
NAME_CHARACTERS_MAX = 200
ID_CHARACTERS_MAX = 300

_log = structlog.get_logger(__name__)


class Kernel(Looking):
    """`start` within the loop that it is used from; `close` hands back what runs."""

    def __init__(
        self,
        *,
        database: Database,
        blobs: Blobs,
        service: Service,
        home: Path,
        server: str,
        resolve: Resolve,
        work: Work | None = None,
        clock: SteadyClock | None = None,
        places: int = PLACES,
    ) -> None:
        """`home`: the folder for what programs and processes have as files. `server`: what the ledger of this server
        calls it. `resolve`: what a key may do now."""
        self.work = work or Work(database)
        clock = clock or SteadyClock()
        super().__init__(database, Log(database, self.work, now_ms=clock.now_ms), Segments(database, blobs), Bells())
        self.programs = Programs(database, blobs, home / "programs")
        self.service = service
        self.workspaces = Workspaces(home / "workspaces")
        self.shared = Shared(
            database=database,
            log=self.log,
            work=self.work,
            segments=self.segments,
            bells=self.bells,
            clock=clock,
            on_exit=(budgets.close,),
        )
        self._resolve = resolve
        self._owner = crew_name(server)
        self._places = places
        self._forks = Forks(database, self.log, self.work, bells=self.bells, workspaces=self.workspaces)
        self._replays = Replays(self.shared, service=service, programs=self.programs, workspaces=self.workspaces)
        self._timers = Timers(database, self.log, self.work, self.bells, self.shared.clock)
        self._crew: Crew | None = None
        self._runner: Runner | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self, drive: Drive | None = None) -> None:
        """`drive`: for tests; otherwise agents and durable functions are driven."""
        drive = drive or driver(self.shared, service=self.service, programs=self.programs, workspaces=self.workspaces)
        self._runner = runner = Runner(self.shared, shelf=self.programs, resolve=self._resolve, drive=drive)
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
        if self._runner is not None:
            self._runner.closing = True
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
            actor=_user(account),
        )
        allowance = budgets.meant(budget, found.manifest.budget)

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

        Raises: NotFound; Conflict for a process that is over, or an answer to what is not asked; InvalidRequest for one
        that is none of the choices; Overloaded when its mailbox is full; PayloadTooLarge for a message.
        """
        for what, word in (("source", source), ("id", external_id), ("about", about)):
            _check_word(word, what, ID_CHARACTERS_MAX)
        head = await self.find(account, pid)
        if kind is SignalKind.ANSWER:
            about = about or head.asked  # another question may be asked by the time that the answer arrives
            await check_choice(self.database, self.log, self.segments, head, about, body)
        segment = None
        if body is not None:
            content = message_of(body) if kind is SignalKind.MESSAGE else canonical(body)
            segment = await self.segments.put_bytes(account.id, content)
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

    async def fork(self, account: Account, pid: str, *, at: int | None = None, n: int = 1, key: str = "") -> list[str]:
        """`n` processes that go on from the event `at` of its past, or from its last; their effects are withheld until
        they are adopted. With the same `key` again, the same processes. Raises: NotFound, InvalidRequest, Conflict,
        Overloaded."""
        _check_word(key, "key", ID_CHARACTERS_MAX)
        await self.find(account, pid)
        return await self._forks.fork(account, pid, at=at, n=n, key=key)

    async def adopt(self, account: Account, pid: str) -> None:
        """Raises: NotFound; Conflict for what is no fork, or is over."""
        await self.find(account, pid)
        await self._forks.adopt(pid, source=_user(account))

    async def drop(self, account: Account, pid: str) -> None:
        """Ends a fork and forgets its files. Raises: NotFound; Conflict for what is no fork."""
        await self.find(account, pid)
        await self._forks.drop(pid, source=_user(account))

    async def replay(self, account: Account, pid: str, *, model: str = "") -> AsyncGenerator[Replayed | Folded, None]:
        """The process's answers, folded from its log, and what `model` says to the same questions; nothing is done.
        Close the iterator (`contextlib.aclosing`). Raises: NotFound, ModelNotFound, Forbidden, and what asking does."""
        head = await self.find(account, pid)
        async with aclosing(self._replays.replay(account, head, model=model)) as replayed:
            async for one in replayed:
                yield one

    def _claim(self, n: int) -> Transaction[list[Claim]]:
        """One place at a time for the project that has fewest here for its weight."""
        assert self._crew is not None
        claims: list[Claim] = []
        queues = {queue: self._crew.holding(queue) for queue in (yield from self.work.queues(QUEUES))}
        weighed = (yield from project_weights([account_of(queue) for queue in queues])) if len(queues) > 1 else {}
        shared = {queue_of(account): weight for account, weight in weighed.items()}
        while shares := shares_of(n - len(claims), queues, weights=shared):
            for queue, share in shares.items():
                got = yield from self.work.claim(queue, self._owner, share)
                claims += got
                queues[queue] += len(got)
                if len(got) < share:  # there is no more of it
                    del queues[queue]
        return claims

    async def _look(self) -> None:
        """Finds the mail that others wrote for what runs here."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S if self.bells.running else None):
                    await self.bells.look.wait()
            self.bells.look.clear()
            if not self.bells.running:
                continue
            try:
                for row in await self.database.read(heads.running_with_mail()):
                    self.bells.posted(row["id"], woken=False)
            except NimbosError as error:
                _log.warning("kernel.mail_not_seen", code=error.code)


def _user(account: Account) -> str:
    return f"user:{account.key or account.id}"


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

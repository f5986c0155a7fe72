"""Runs a process that this server has claimed: folds its log, drives it until it parks or exits, and obeys signals.

    claim ─▶ seize (running, a new epoch) ─▶ fold ─▶ key still good? ─▶ drive ─▶ park or exit, in their transactions
                                                       │  mail rings: pause, cancel, kill stop the driving

Anything else that ends a run leaves the process running in the eyes of the log; whoever claims it next makes it ready
first, and folds what is there. Read `holding.py` for how a run writes, `agent.py` and `durable.py` for what drives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, Protocol

import structlog

from nimbos.db import Transaction
from nimbos.errors import NotFound, NotReady, StorageUnavailable, Unauthorized
from nimbos.kernel.events import Event, ProcState
from nimbos.kernel.faults import FromNewerVersion, Illegal
from nimbos.kernel.fold import fold
from nimbos.kernel.holding import Exited, Holding, Parked, Shared
from nimbos.kernel.log import Draft, Holder
from nimbos.kernel.processes import Head, locked_head, raise_epoch
from nimbos.kernel.programs import Program
from nimbos.kernel.view import View
from nimbos.kernel.words import Reason, State
from nimbos.types import Account
from nimbos.work import Claim, ClaimLost

FAILURES_MAX = 5  # runs of a process that end by a fault of ours, one after the other
_FAILURES_KEPT = 10_000

_log = structlog.get_logger(__name__)

Drive = Callable[[Holding], Awaitable[None]]
Resolve = Callable[[Account], Awaitable[Account]]


class Shelf(Protocol):
    """Where programs are found."""

    async def load(self, hash: str) -> Program: ...


class Runner:
    def __init__(self, shared: Shared, *, shelf: Shelf, resolve: Resolve, drive: Drive) -> None:
        """`resolve`: what the spawning key may do now. `drive` ends by `park` or `exit` of what it is given."""
        self._shared = shared
        self._shelf = shelf
        self._resolve = resolve
        self._drive = drive
        self._over: dict[str, asyncio.Event] = {}
        self._failures: dict[str, int] = {}

    async def run(self, claim: Claim) -> None:
        """Ends the claim, or leaves it to the crew. Raises: ClaimLost, and whatever went wrong."""
        pid = claim.ref
        while (before := self._over.get(pid)) is not None:  # parked, woken and claimed again before its run was cleared
            await before.wait()
        self._over[pid] = over = asyncio.Event()
        try:
            await self._run(claim)
        finally:
            del self._over[pid]
            over.set()

    async def _run(self, claim: Claim) -> None:
        seized = await self._shared.database.run(lambda: self._seize(claim), durable=True)
        if seized is None:
            return
        head, holder = seized
        self._shared.bells.appended(head.pid)
        async with AsyncExitStack() as closing:
            try:
                holding = await self._holding(head, holder, closing)
                await self._until_it_ends(holding)
            except (Parked, Exited):
                self._failures.pop(head.pid, None)
            except asyncio.CancelledError:
                await self._hand_back(holder)
                raise
            except (ClaimLost, StorageUnavailable, NotReady, FromNewerVersion):
                raise  # no fault of the process
            except Exception:
                self._note_failure(head.pid)
                raise

    def _seize(self, claim: Claim) -> Transaction[tuple[Head, Holder] | None]:
        """None: there is nothing to run, and the claim is ended."""
        yield from self._shared.work.check(claim)
        try:
            head = yield from locked_head(claim.ref)
        except NotFound:
            head = None
        if head is None or head.state not in (State.READY, State.RUNNING):
            yield from self._shared.work.finish(claim)
            return None
        holder = Holder(pid=head.pid, claim=claim, epoch=(yield from raise_epoch(head.pid)))
        drafts = [Draft(body=ProcState(to=State.RUNNING))]
        if head.state is State.RUNNING:  # its server died, or lost it
            drafts.insert(0, Draft(body=ProcState(to=State.READY)))
        yield from self._shared.log.append(head.pid, drafts, holder=holder)
        return head, holder

    async def _holding(self, head: Head, holder: Holder, closing: AsyncExitStack) -> Holding:
        """Raises: Parked for a key that does not hold any more; Exited for a program that is gone."""
        view = await self._folded(head.pid)
        holding = Holding(self._shared, account=head.spawner, view=view, holder=holder, closing=closing)
        self._shared.bells.run(head.pid, holding.mail)
        closing.callback(self._shared.bells.ran, head.pid)
        await holding.take_mail()
        if self._failures.get(head.pid, 0) >= FAILURES_MAX:
            del self._failures[head.pid]
            told = f"It failed {FAILURES_MAX} times by a fault of the server, whose log says which."
            await holding.exit(Reason.FAILED, error=told)
        try:
            holding.account = await self._resolve(head.spawner)
        except Unauthorized as error:
            _log.info("process.not_authorized", process=head.pid, why=error.code)
            await holding.park(State.ASKING, Reason.AUTH)
        try:
            holding.program = await self._shelf.load(head.program)
        except NotFound as error:
            await holding.exit(Reason.FAILED, error=error.message)
        return holding

    async def _folded(self, pid: str) -> View:
        events: list[Event] = [event async for event in self._shared.log.all(pid)]
        return await asyncio.to_thread(fold, events) if len(events) > 2_000 else fold(events)

    async def _until_it_ends(self, holding: Holding) -> None:
        """Raises: Parked, Exited, and whatever the driving raises."""
        while True:
            driving = asyncio.ensure_future(self._drive(holding))
            try:
                await self._until_it_must_stop(holding, driving)
            finally:
                await _stopped(driving)
            if not driving.cancelled():
                driving.result()
                await holding.exit(Reason.FAILED, error="The program ended without saying how.")
            await holding.refresh()
            await holding.take_mail()  # which parks or exits, unless it was resumed meanwhile

    async def _until_it_must_stop(self, holding: Holding, driving: asyncio.Future[None]) -> None:
        while not driving.done():
            ringing = asyncio.create_task(holding.mail.wait())
            try:
                both: set[asyncio.Future[Any]] = {driving, ringing}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ringing.cancel()
            if not driving.done():
                holding.mail.clear()
                if await holding.urgent():
                    return

    async def _hand_back(self, holder: Holder) -> None:
        """This server stops, or has lost the claim already."""

        def begin() -> Transaction[None]:
            ready = Draft(body=ProcState(to=State.READY))
            yield from self._shared.log.append(holder.pid, [ready], holder=holder)
            yield from self._shared.work.release(holder.claim)

        with suppress(ClaimLost, StorageUnavailable, Illegal):  # it parked, or another has it, or its lease runs out
            await asyncio.shield(self._shared.database.run(begin, durable=True))

    def _note_failure(self, pid: str) -> None:
        while len(self._failures) >= _FAILURES_KEPT:
            del self._failures[next(iter(self._failures))]
        self._failures[pid] = self._failures.get(pid, 0) + 1


async def _stopped(driving: asyncio.Future[None]) -> None:
    """Waits until what it started is put away."""
    driving.cancel()
    await asyncio.wait({driving})

"""Runs a process that this server has claimed: folds its log, drives it until it parks or exits, and obeys signals.

    claim ─▶ fold ─▶ seize (running, a new epoch) ─▶ key still good? ─▶ drive ─▶ park or exit, in their transactions
                                                       │  mail rings: pause, cancel, kill stop the driving

A run that fails makes it ready, if need be once the storage is back. The death of its server leaves it running in the
eyes of the log; whoever claims it next makes it ready first, and folds what is there. A process whose servers die again
and again while nothing comes of it is set aside: paused, with a note that says so. Read `holding.py` for how a run
writes, `agent.py` and `durable.py` for what drives.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, Protocol

import structlog

from nimbos.db import Transaction
from nimbos.errors import NotFound, NotReady, StorageUnavailable, Unauthorized
from nimbos.kernel.events import Event, Note, ProcState
from nimbos.kernel.faults import FromNewerVersion, Illegal, Unreadable
from nimbos.kernel.fold import fold
from nimbos.kernel.holding import Exited, Holding, Parked, Shared, Stop
from nimbos.kernel.log import Draft, Holder
from nimbos.kernel.processes import Head, locked_head, raise_epoch
from nimbos.kernel.programs import Program
from nimbos.kernel.view import View
from nimbos.kernel.views import Views
from nimbos.kernel.words import Reason, State
from nimbos.types import Account
from nimbos.work import Claim, ClaimLost, until_written

DEATHS_MAX = 5  # runs of a process that ended with their server, one after the other, and nothing came of them
SPREAD_FROM = 2  # of these, from which on those that may be to blame begin at different moments
FAILURES_MAX = 5  # runs of a process that end by a fault of ours, one after the other
UNREADABLE_RETRY_S = 60.0  # a newer version may have come meanwhile
LONG_LOG = 2_000  # events that are folded beside the loop
CALLS_TICK_S = 0.1
CALLS_GRACE_S = 5.0
STOP_AGAIN_S = 30.0
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
        self.closing = False  # the server stops
        self._over: dict[str, asyncio.Event] = {}
        self._failures: dict[str, int] = {}
        self.views = Views()
        self.events_read = 0  # in order to fold them

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
        try:
            view = await self._folded(claim.ref)
        except (FromNewerVersion, Unreadable, Illegal) as error:
            _log.error("process.unreadable", process=claim.ref, code=error.code)
            await self._shared.database.run(lambda: self._shared.work.release(claim, delay_s=UNREADABLE_RETRY_S))
            return
        if wait_s := spread_s(claim, view):
            await asyncio.sleep(wait_s)
        epoch = view.epoch
        try:
            await self._run_from(claim, view)
        except ClaimLost:
            raise
        except Exception:
            await self._survive(claim, epoch)
            raise

    async def _run_from(self, claim: Claim, view: View) -> None:
        seized = await self._shared.database.run(lambda: self._seize(claim, view), durable=True)
        if seized is None:
            return
        head, holder, events = seized
        fold(events, view)
        self._shared.bells.appended(head.pid)
        async with AsyncExitStack() as closing:
            try:
                holding = await self._holding(head, holder, view, closing)
                await self._until_it_ends(holding)
            except (Parked, Exited) as end:
                self._failures.pop(head.pid, None)
                if isinstance(end, Parked):
                    self.views.keep(head.pid, view.copy())
            except asyncio.CancelledError:
                await self._hand_back(holder)
                raise
            except (ClaimLost, StorageUnavailable, NotReady):
                raise  # no fault of the process
            except Exception:
                self._note_failure(head.pid)
                raise

    async def _folded(self, pid: str) -> View:
        """Before anything is written, so that a log which this version cannot read stays as it is. Of a process that
        is gone: nothing."""
        kept = self.views.take(pid)
        try:
            if kept is not None and (view := await self._folded_on(pid, kept)) is not None:
                return view
            return await self._folded_on(pid, View()) or View()
        except NotFound:
            return View()

    async def _folded_on(self, pid: str, view: View) -> View | None:
        """None: the log is not the one that the view was folded from."""
        events = [event async for event in self._shared.log.all(pid, after=max(0, view.seq - 1))]
        self.events_read += len(events)
        if view.seq:
            if not events or (events[0].seq, events[0].hash) != (view.seq, view.hash):
                return None
            del events[0]
        return await asyncio.to_thread(fold, events, view) if len(events) > LONG_LOG else fold(events, view)

    def _seize(self, claim: Claim, view: View) -> Transaction[tuple[Head, Holder, list[Event]] | None]:
        """None: there is nothing to run, and the claim is ended."""
        yield from self._shared.work.check(claim)
        if not view.seq:
            yield from self._shared.work.finish(claim)
            return None
        head = yield from locked_head(claim.ref)
        if head.state not in (State.READY, State.RUNNING):
            yield from self._shared.work.finish(claim)
            return None
        if head.seq != view.seq:  # a holder that lost it was just writing
            raise ClaimLost(claim)
        holder = Holder(pid=head.pid, claim=claim, epoch=(yield from raise_epoch(head.pid)))
        drafts = [Draft(body=ProcState(to=State.RUNNING))]
        if head.state is State.RUNNING:  # its server died, or lost it
            drafts.insert(0, Draft(body=ProcState(to=State.READY)))
        events = yield from self._shared.log.append(head.pid, drafts, holder=holder)
        return head, holder, events

    async def _holding(self, head: Head, holder: Holder, view: View, closing: AsyncExitStack) -> Holding:
        """Raises: Parked for a key that does not hold any more; Exited for a program that is gone."""
        holding = Holding(self._shared, account=head.spawner, view=view, holder=holder, closing=closing)
        self._shared.bells.run(head.pid, holding.ring)
        closing.callback(self._shared.bells.ran, head.pid)
        await holding.take_mail()
        if min(view.deaths, holder.claim.lapses) >= DEATHS_MAX:
            _log.error("process.set_aside", process=head.pid, deaths=view.deaths)
            told = f"Its server died {view.deaths} times while it ran, and nothing came of it. `resume` tries again."
            aside = Draft(body=Note(about="recovered", text=told))
            await holding.park(State.PAUSED, Reason.POLICY, drafts=(aside,))
        if self._failures.get(head.pid, 0) >= FAILURES_MAX:
            del self._failures[head.pid]
            told = f"It failed {FAILURES_MAX} times by a fault of the server, whose log says which."
            await holding.exit(Reason.FAILED, error=told, driven=False)
        try:
            holding.account = await self._resolve(head.spawner)
        except Unauthorized as error:
            _log.info("process.not_authorized", process=head.pid, why=error.code)
            await holding.park(State.ASKING, Reason.AUTH)
        try:
            holding.program = await self._shelf.load(head.program)
        except NotFound as error:
            await holding.exit(Reason.FAILED, error=error.message, driven=False)
        return holding

    async def _until_it_ends(self, holding: Holding) -> None:
        """Raises: Parked, Exited, and whatever the driving raises."""
        while True:
            holding.may_begin.set()
            driving = asyncio.ensure_future(self._drive(holding))
            try:
                await self._until_it_must_stop(holding, driving)
            except asyncio.CancelledError:
                await self._let_calls_end(holding, driving)
                raise
            finally:
                await _stopped(driving)
            if not driving.cancelled():
                driving.result()
                await holding.exit(Reason.FAILED, error="The program ended without saying how.")
            await holding.refresh()
            await holding.take_mail()  # which parks or exits, unless it was resumed meanwhile

    async def _until_it_must_stop(self, holding: Holding, driving: asyncio.Future[None]) -> None:
        stop = Stop.NO
        while not driving.done():
            ringing = asyncio.create_task(holding.rung.wait())
            both: set[asyncio.Future[Any]] = {driving, ringing}
            timeout_s = None if stop is Stop.NO else CALLS_TICK_S
            try:
                await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ringing.cancel()
            if not driving.done():
                holding.rung.clear()
                stop = await holding.must_stop()
                if stop is Stop.NOW:
                    return
                if stop is Stop.NO:
                    holding.may_begin.set()
                else:
                    holding.may_begin.clear()

    async def _let_calls_end(self, holding: Holding, driving: asyncio.Future[None]) -> None:
        """When the server stops, a call whose outcome would be unknown is given a moment to have one."""
        holding.may_begin.clear()
        if self.closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(CALLS_GRACE_S):
                    while holding.in_the_world() and not driving.done():
                        await asyncio.wait({driving}, timeout=CALLS_TICK_S)

    async def _hand_back(self, holder: Holder) -> None:
        """This server stops, or has lost the claim already."""

        def begin() -> Transaction[None]:
            ready = Draft(body=ProcState(to=State.READY))
            yield from self._shared.log.append(holder.pid, [ready], holder=holder)
            yield from self._shared.work.release(holder.claim)

        with suppress(ClaimLost, StorageUnavailable, Illegal):  # it parked, or another has it, or its lease runs out
            await asyncio.shield(self._shared.database.run(begin, durable=True))

    async def _survive(self, claim: Claim, epoch: int) -> None:
        """A run that failed, but whose server lives, must not look as if that had died. `epoch`: before the run, of
        which perhaps not even the beginning was written."""

        def begin() -> Transaction[None]:
            yield from self._shared.work.check(claim)
            head = yield from locked_head(claim.ref)
            if head.state is State.RUNNING and head.epoch > epoch:
                holder = Holder(pid=head.pid, claim=claim, epoch=head.epoch)
                yield from self._shared.log.append(head.pid, [Draft(body=ProcState(to=State.READY))], holder=holder)

        def write() -> Awaitable[None]:
            return self._shared.database.run(begin, durable=True)

        with suppress(ClaimLost, NotFound):  # it parked, or another has it
            await until_written(write, closing=lambda: self.closing)

    def _note_failure(self, pid: str) -> None:
        while len(self._failures) >= _FAILURES_KEPT:
            del self._failures[next(iter(self._failures))]
        self._failures[pid] = self._failures.get(pid, 0) + 1


def spread_s(claim: Claim, view: View) -> float:
    """How long a process waits that was running at each of the last deaths of its servers. One of those may be what
    they die of; the others, which begin at another moment each time, get their turn without it, and are not set aside
    with it."""
    deaths = min(view.deaths + 1, claim.lapses)
    if view.state is not State.RUNNING or not SPREAD_FROM <= deaths < DEATHS_MAX:
        return 0.0
    lot = hashlib.sha256(f"{claim.ref} {claim.epoch}".encode()).digest()[:4]
    return int.from_bytes(lot) / 2**32 * (1 << deaths)


async def _stopped(driving: asyncio.Future[None]) -> None:
    """Waits until what it started is put away. An order to stop that was lost in it is given again."""
    while not driving.done():
        driving.cancel()
        await asyncio.wait({driving}, timeout=STOP_AGAIN_S)
    if not driving.cancelled():
        driving.exception()  # which somebody raises, or nobody asks for any more

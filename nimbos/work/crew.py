"""A crew: the tasks of this server that claim work, do it, and hand it back when the server stops.

`run` gets a claim and ends it itself, by `Work.finish` or `Work.release` in a transaction of its own. A run that is
cancelled (shutdown, claim lost) or that fails leaves the claim to the crew, which releases it when the storage lets it.

Leases run out while nobody reaches the storage, and say nothing then of who died. So whoever could not reach it claims
nothing when it is back until every server that lives has had the time to renew what it holds. Storage that stands still
refuses nothing and answers late: what counts is since when an answer is waited for, and a claim that got its rows too
late is undone.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from nimbos.db import Database, Transaction
from nimbos.errors import NimbosError, StorageUnavailable
from nimbos.work.claims import Claim, ClaimLost, Held, Work

POLL_S = 1.0  # another server may have added work, or a lease may have run out
RETRY_S = 5.0  # after a run that failed, of our own fault
AWAY_S = 1.0  # between tries to write while the storage is away
_RENEWALS_PER_LEASE = 3

_log = structlog.get_logger(__name__)


async def until_written(write: Callable[[], Awaitable[object]], *, closing: Callable[[], bool]) -> None:
    """As often as the storage is away, until the server stops: then it is left undone."""
    while True:
        try:
            await write()
            return
        except StorageUnavailable:
            if closing():
                return
            await asyncio.sleep(AWAY_S)


class _StoodStill(Exception):
    """A claim's rows came so long after they were asked for that the leases of servers that live may have run out."""


class Crew:
    def __init__(
        self,
        database: Database,
        work: Work,
        *,
        places: int,
        claim: Callable[[int], Transaction[list[Claim]]],
        run: Callable[[Claim], Awaitable[None]],
        owner: str,
        poll_s: float = POLL_S,
    ) -> None:
        """`places`: claims held at once. `claim`: takes at most so many, in the name of `owner`, which is this crew's
        alone: it renews and releases what bears it."""
        self._database = database
        self._work = work
        self._places = places
        self._claim = claim
        self._run = run
        self._owner = owner
        self._poll_s = poll_s
        self._news = asyncio.Event()
        self._running: dict[Held, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._between_s = work.lease_s / _RENEWALS_PER_LEASE
        self._asked_since: float | None = None  # the first call to the storage since it answered last
        self._claims_from = 0.0
        self._tops: list[asyncio.Task[None]] = []

    def holding(self, kind: str) -> int:
        """Claims of this kind that are being worked on. From any thread."""
        return sum(1 for held in list(self._running) if held[0] == kind)

    def start(self) -> None:
        """Within a running loop; `close` ends it."""
        self._tops = [asyncio.create_task(self._take()), asyncio.create_task(self._renew())]

    def wake(self) -> None:
        """There is new work: whoever added it says so, once it is committed."""
        self._news.set()

    async def close(self) -> None:
        """Stops claiming, cancels what runs, and hands everything back."""
        self._closing = True
        self._news.set()
        if self._tops:
            taking, renewing = self._tops
            await asyncio.wait({taking})  # a claim that is being made must be known before it can be handed back
            renewing.cancel()
        running = list(self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*self._tops, *running, return_exceptions=True)
        with suppress(StorageUnavailable):  # then the leases run out
            await self._database.run(lambda: self._work.release_all(self._owner))

    async def _take(self) -> None:
        while not self._closing:
            self._news.clear()
            free = self._places - len(self._running)
            claims = await self._claims(free) if free > 0 else []
            for claim in claims:
                task = asyncio.create_task(self._do(claim), name=f"{claim.kind} {claim.ref}")
                self._running[claim.kind, claim.ref, claim.epoch] = task
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            if (len(claims) < free or free <= 0) and not self._closing:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), self._poll_s)

    async def _claims(self, n: int) -> list[Claim]:
        try:
            if self._asked_since is not None and self._stood_still(self._asked_since):
                await self._renewed()
            if time.monotonic() < self._claims_from:
                return []
            return await self._claimed(n)
        except StorageUnavailable as error:
            _log.warning("work.not_claimed", reason=error.reason)
            return []

    async def _claimed(self, n: int) -> list[Claim]:
        """Nothing where the storage stood still before it was told. Raises: StorageUnavailable."""
        since = self._ask()

        def begin() -> Transaction[list[Claim]]:
            claims = yield from self._claim(n)
            if self._stood_still(since):
                raise _StoodStill
            return claims

        try:
            claims = await self._database.run(begin)
        except _StoodStill:
            self._asked_since = since
            _log.warning("work.not_claimed", reason="it stood still.")
            return []
        self._asked_since = since if self._stood_still(since) else None  # the commit may be what was late
        return claims

    async def _renewed(self) -> frozenset[Held]:
        """What this crew holds. Raises: StorageUnavailable."""
        since = self._ask()
        held = await self._database.run(lambda: self._work.renew(self._owner))
        if self._stood_still(since):
            self._claims_from = time.monotonic() + self._between_s + self._poll_s
        self._asked_since = None
        return held

    def _ask(self) -> float:
        """Since when the storage owes an answer, with the call that begins now."""
        if self._asked_since is None:
            self._asked_since = time.monotonic()
        return self._asked_since

    def _stood_still(self, since: float) -> bool:
        """For so long that a renewal of some lease was missed. From any thread."""
        return time.monotonic() - since >= self._between_s

    async def _do(self, claim: Claim) -> None:
        retry_s: float | None = 0.0
        try:
            await self._run(claim)
            retry_s = None
        except ClaimLost:
            _log.info("work.lost", kind=claim.kind, ref=claim.ref, epoch=claim.epoch)
        except NimbosError as error:
            retry_s = RETRY_S
            _log.warning("work.failed", kind=claim.kind, ref=claim.ref, code=error.code)
        except Exception as error:  # the top of this piece of work: it is tried again, the crew goes on
            retry_s = RETRY_S
            frames = [f"{at.filename}:{at.lineno} {at.name}" for at in traceback.extract_tb(error.__traceback__)]
            _log.error("work.failed", kind=claim.kind, ref=claim.ref, error=type(error).__name__, frames=frames[-12:])
        finally:
            try:
                if retry_s is not None:
                    await self._hand_back(claim, retry_s)
            finally:
                self._forget(claim)

    def _forget(self, claim: Claim) -> None:
        held = claim.kind, claim.ref, claim.epoch
        if self._running.get(held) is asyncio.current_task():  # work that was added anew begins at the same epoch
            del self._running[held]
        self._news.set()

    async def _hand_back(self, claim: Claim, retry_s: float) -> None:
        def release() -> Awaitable[object]:
            return self._database.run(lambda: self._work.release(claim, delay_s=retry_s))

        await until_written(release, closing=lambda: self._closing)

    async def _renew(self) -> None:
        """Also ends the runs whose claims are gone, as what they would write is refused anyway, and hands back claims
        that nothing runs for: a run that forgot to end its claim must not hold it for ever."""
        strays: frozenset[Held] = frozenset()
        while True:
            await asyncio.sleep(self._between_s)
            before = set(self._running)
            if not before and not strays:
                continue
            try:
                held = await self._renewed()
            except StorageUnavailable as error:
                _log.warning("work.not_renewed", reason=error.reason)
                continue
            for lost in before - held:
                if (task := self._running.get(lost)) is not None:
                    task.cancel()
            seen = held - self._running.keys()
            for kind, ref, epoch in strays & seen:
                claim = Claim(kind=kind, ref=ref, payload=b"", owner=self._owner, epoch=epoch, lapses=0)
                _log.error("work.not_ended", kind=kind, ref=ref, epoch=epoch)
                await self._hand_back(claim, RETRY_S)
            strays = seen - strays

"""Responses that nobody waits for on a connection: written down, done by whichever server claims them, ended once.

    queue ─▶ claimed ─▶ journal of events ─▶ end: events, items, row and claim in one transaction
      └──────────── cancel: row and claim in one transaction, so that only one of the two can be ────────────┘

Each project has a queue of its own, and of the places here as many as the others for its weight. What computes the
answer is given to `attend`; it knows the dialect. A server that dies leaves the claim to lapse, and
the answer is computed again, with the same seed; what was paid for it is not paid again. Read `journal.py` for the
events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from nimbos.accounts import project_weights
from nimbos.db import Transaction
from nimbos.errors import StorageUnavailable
from nimbos.ledger import Attempt, Attempts
from nimbos.responses.ending import Ending
from nimbos.responses.journal import Journal, Live
from nimbos.responses.store import Answered, Kept, Store, cancelled
from nimbos.work import Claim, Crew, Work, shares_of

KIND = "response"  # also the queue of all projects that was before each had its own
_QUEUES = f"{KIND}:"
_PLACES = 64
_SWEEP_S = 60.0

_log = structlog.get_logger(__name__)

Run = Callable[[Claim], Awaitable[None]]


class Background:
    def __init__(self, store: Store, *, owner: str) -> None:
        """`owner`: this server, and no other crew of it."""
        self._store = store
        self._database = store.database
        self._work = Work(store.database)
        self._owner = f"{owner}/{KIND}"
        self._crew: Crew | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.journal = Journal(store.database, self._work)

    def attend(self, run: Run) -> None:
        """From now on this server does what is queued. Within a running loop; `close` ends it. Only the first call
        counts."""
        if self._crew is not None:
            return

        async def known(claim: Claim) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks[claim.ref] = task
            try:
                await run(claim)
            finally:
                self._tasks.pop(claim.ref, None)

        self._crew = Crew(self._database, self._work, places=_PLACES, claim=self._claim, run=known, owner=self._owner)
        self._crew.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Hands back what runs."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait({self._sweeper})
        if self._crew is not None:
            await self._crew.close()

    async def queue(self, answered: Answered, payload: bytes) -> None:
        """`payload`: what `attend`'s function needs to compute it."""

        async def queueing() -> Callable[[], Transaction[None]]:
            write = await self._store.writing(answered)

            def queue() -> Transaction[None]:
                yield from write()
                yield from self._work.add(f"{_QUEUES}{answered.account}", answered.id, payload)

            return queue

        await self._store.run(queueing)
        if self._crew is not None:
            self._crew.wake()

    def ending(self, live: Live, kept: Kept, attempt: Attempt) -> Ending:
        return Ending(self._store, self._work, self.journal, live, kept, attempt=attempt)

    async def settled(self, attempts: Attempts) -> Attempts:
        """What earlier attempts at a response have paid for."""
        return await self._database.run(attempts.settled) if attempts.open else attempts

    def keep(self, claim: Claim, payload: Callable[[], bytes]) -> Transaction[None]:
        """What the next attempt finds. Raises: ClaimLost."""
        yield from self._work.keep(claim, payload)

    async def drop(self, claim: Claim) -> None:
        """Ends work whose response is gone. Raises: ClaimLost."""
        await self._database.run(lambda: self._work.finish(claim))

    async def cancel(self, account: str, response_id: str) -> bool:
        """True when it was running. Raises: NotFound."""

        def end() -> Transaction[bool]:
            was_running = yield from cancelled(account, response_id)
            if was_running:
                yield from self._drop(account, response_id)
            return was_running

        was_running = await self._database.run(end, durable=True)
        self._stop(response_id)
        return was_running

    async def delete(self, account: str, response_id: str) -> None:
        """Of any response; one that runs is stopped. Raises: NotFound."""

        def remove() -> Transaction[None]:
            yield from self._store.remove(account, response_id)
            yield from self._drop(account, response_id)

        await self._database.run(remove, durable=True)
        self._stop(response_id)

    def _claim(self, n: int) -> Transaction[list[Claim]]:
        """One place at a time for the project that has fewest here for its weight."""
        assert self._crew is not None
        claims: list[Claim] = []
        queues = {queue: self._crew.holding(queue) for queue in (yield from self._work.queues(KIND))}
        accounts = [queue.removeprefix(_QUEUES) for queue in queues]
        weighed = (yield from project_weights(accounts)) if len(queues) > 1 else {}
        weights = {f"{_QUEUES}{account}": weight for account, weight in weighed.items()}
        while shares := shares_of(n - len(claims), queues, weights=weights):
            for queue, share in shares.items():
                got = yield from self._work.claim(queue, self._owner, share)
                claims += got
                queues[queue] += len(got)
                if len(got) < share:  # there is no more of it
                    del queues[queue]
        return claims

    def _drop(self, account: str, response_id: str) -> Transaction[None]:
        for queue in (f"{_QUEUES}{account}", KIND):
            yield from self._work.drop(queue, response_id)

    def _stop(self, response_id: str) -> None:
        """If this server computes it; another one finds its claim gone."""
        task = self._tasks.get(response_id)
        if task is not None:
            task.cancel()

    async def _sweep(self) -> None:
        """Takes away what has expired and what nothing needs, a little at a time."""
        while True:
            with suppress(StorageUnavailable):
                await self._store.room.sum_up()
            with suppress(StorageUnavailable):  # the next round will do
                while await self._store.expire():
                    pass
                while await self._store.sweep():
                    pass
                await self.journal.prune()
            await asyncio.sleep(_SWEEP_S)

"""Batches in a running server: two crews, one for the lines and one for what comes before and after them.

    validating ── in_progress ── finalizing ── completed, expired
         └── failed      └────── cancelling ── cancelled

Every change of a batch is in the database with the work that follows from it, so any server goes on with what another
left. Read `desk.py` for what clients do, `validating.py`, `running.py` and `finishing.py` for the three stages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace

import structlog

from nimbos.accounts import Authority
from nimbos.batches import rows
from nimbos.batches.contents import Contents
from nimbos.batches.desk import JOBS, Desk, jobs_of, lines_of
from nimbos.batches.endpoint import Endpoint
from nimbos.batches.fairness import Caps, Queue, Turns, places
from nimbos.batches.files import Files
from nimbos.batches.finishing import LOOK_AGAIN_S, Finishing
from nimbos.batches.orphans import Orphans
from nimbos.batches.running import Resolve, Running
from nimbos.batches.uploads import Uploads
from nimbos.batches.validating import Validating
from nimbos.batches.words import OVER, State, batch_of
from nimbos.blobs import Blobs
from nimbos.config import BatchSettings
from nimbos.db import Database, Transaction
from nimbos.errors import NimbosError
from nimbos.work import Claim, Crew, Work, shares_of

SWEEP_S = 5.0
ORPHANS_FIRST_S, ORPHANS_S = 60.0, 24 * 3600.0
_JOBS_AT_ONCE = 2
_OPEN_MAX = 100  # batches whose lines are answered at the same time; further ones wait for these

_log = structlog.get_logger(__name__)


class Batches:
    """`files`, `uploads` and `desk` are for the routes. `serve` names the endpoints, `start` begins, `close` hands
    back."""

    def __init__(
        self,
        database: Database,
        blobs: Blobs,
        settings: BatchSettings,
        *,
        server_id: str,
        work: Work | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        self._database = database
        self._work = work or Work(database)
        self._endpoints: dict[str, Endpoint] = {}
        self.settings = settings
        contents = Contents(blobs)
        self.files = Files(database, contents, settings)
        self.uploads = Uploads(database, contents, self.files, settings)
        self._orphans = Orphans(database, contents)
        self.desk = Desk(database, self.files, self._work, settings)
        self._caps = Caps()
        self._turns, self._job_turns = Turns(), Turns()
        self._validating = Validating(database, contents, self._work, settings)
        self._finishing = Finishing(database, contents, self._work, self.files)
        self._running = Running(
            database,
            contents,
            self._work,
            endpoints=self._endpoints,
            caps=self._caps,
            holding=lambda batch_id: self._lines.holding(lines_of(batch_id)),
            resolve=resolve or Authority(database).check,
            wake=self.wake,
        )
        self._jobs_owner, self._lines_owner = f"{server_id}/jobs", f"{server_id}/lines"
        self._jobs = Crew(
            database,
            self._work,
            places=_JOBS_AT_ONCE,
            claim=self._claim_jobs,
            run=self._do_job,
            owner=self._jobs_owner,
        )
        self._lines = Crew(
            database,
            self._work,
            places=settings.lines_at_once,
            claim=self._claim_lines,
            run=self._running.run,
            owner=self._lines_owner,
        )
        self._sweeping: tuple[asyncio.Task[None], ...] = ()

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(sorted(self._endpoints))

    def serve(self, endpoints: Iterable[Endpoint]) -> None:
        """Lines are answered by these from now on."""
        self._endpoints.update({endpoint.path: endpoint for endpoint in endpoints})
        self.wake()

    async def start(self) -> None:
        await self._database.run(self._work.adopt)
        self._jobs.start()
        self._lines.start()
        sweeps = (self._keep_expiring(), self._keep_tidying(), self._sweep_orphans())
        self._sweeping = tuple(asyncio.create_task(sweep) for sweep in sweeps)

    def wake(self) -> None:
        """A batch was submitted or cancelled, or has no line left."""
        self._jobs.wake()
        self._lines.wake()

    async def close(self) -> None:
        """Lines that are not answered yet are handed back: another server, or the next start, goes on."""
        for task in self._sweeping:
            task.cancel()
        await asyncio.gather(*self._sweeping, return_exceptions=True)
        await asyncio.gather(self._lines.close(), self._jobs.close())

    async def expire(self) -> None:
        """Ends batches whose window is over: what waits is not begun any more."""
        now_ms = time.time_ns() // 1_000_000
        for row in await self._database.read(rows.LAPSED(now_ms=now_ms)):
            await self._database.run(lambda batch_id=row["id"]: self._expire(batch_id, now_ms))  # type: ignore[misc]
            self.wake()

    def _expire(self, batch_id: str, now_ms: int) -> Transaction[None]:
        moved = yield rows.MOVE[State.FINALIZING](id=batch_id, now_ms=now_ms)
        if moved:
            yield rows.END(id=batch_id, how=State.EXPIRED.value)
            yield from self._work.drop_waiting(lines_of(batch_id))
            yield from self._work.add(jobs_of(moved[0]["project"]), batch_id)

    def _claim_jobs(self, n: int) -> Transaction[list[Claim]]:
        """One place at a time for the project that has fewest: a thousand files of one are read beside another's."""
        claims: list[Claim] = []
        queues = yield from self._work.queues(JOBS)
        holding = {queue: self._jobs.holding(queue) for queue in self._job_turns.ordered(queues)}
        while shares := shares_of(n - len(claims), holding):
            for queue, share in shares.items():
                got = yield from self._work.claim(queue, self._jobs_owner, share)
                claims += got
                holding[queue] += len(got)
                self._job_turns.given(queue)
                if len(got) < share:
                    del holding[queue]  # nothing more waits there
        return claims

    def _claim_lines(self, n: int) -> Transaction[list[Claim]]:
        """One place at a time for the project that has fewest here for its weight."""
        claims: list[Claim] = []
        if not self._endpoints:
            return claims
        found = yield rows.READY(now_ms=time.time_ns() // 1_000_000, limit=_OPEN_MAX)
        turn = {project: at for at, project in enumerate(self._turns.ordered(row["project"] for row in found))}
        queues = {
            row["id"]: Queue(
                project=row["project"], held=self._lines.holding(lines_of(row["id"])), weight=row["weight"]
            )
            for row in sorted(found, key=lambda row: turn[row["project"]])
        }
        caps = self._caps.among(queues, time.monotonic())
        while shares := places(n - len(claims), queues, caps):
            for batch_id, count in shares.items():
                got = yield from self._work.claim(lines_of(batch_id), self._lines_owner, count)
                claims += got
                queue = queues[batch_id] = replace(queues[batch_id], held=queues[batch_id].held + len(got))
                self._turns.given(queue.project)
                if len(got) < count:
                    caps[batch_id] = queue.held  # nothing more waits there
        return claims

    async def _do_job(self, claim: Claim) -> None:
        """One stage after the other, until the batch waits for its lines or is over. Raises: ClaimLost."""
        while True:
            found = await self._database.read(rows.GET(id=claim.ref))
            if not found or State(found[0]["state"]) in OVER:
                await self._finishing.clean(claim.ref, claim)
                return
            batch = batch_of(found[0])
            if batch.state is State.VALIDATING:
                file_bytes = await self.files.size_bytes(batch.input_file)
                if await self._validating.run(batch, claim, file_bytes=file_bytes):
                    self._lines.wake()
                    return
            elif batch.state is State.IN_PROGRESS:
                if await self._database.run(lambda: self._nothing_to_do(claim)):
                    return
            elif not await self._finishing.run(batch, claim):
                await self._database.run(lambda: self._work.release(claim, delay_s=LOOK_AGAIN_S))
                return

    def _nothing_to_do(self, claim: Claim) -> Transaction[bool]:
        """Its lines are being answered; the last of them makes a job anew."""
        (row,) = yield rows.LOCK(id=claim.ref)
        if row["state"] != State.IN_PROGRESS:
            return False
        yield from self._work.finish(claim)
        return True

    async def _keep_expiring(self) -> None:
        while True:
            try:
                await self.expire()
            except NimbosError as error:
                _log.warning("batches.not_expired", code=error.code)
            await asyncio.sleep(SWEEP_S)

    async def _keep_tidying(self) -> None:
        """Beside the expiry of batches: there may be much, and a file is large."""
        while True:
            try:
                while await self.files.sweep() + await self.uploads.sweep():
                    pass  # that was a part of them
            except NimbosError as error:
                _log.warning("batches.not_swept", code=error.code)
            await asyncio.sleep(SWEEP_S)

    async def _sweep_orphans(self) -> None:
        """Soon after the start, and once a day: it looks at every content there is."""
        await asyncio.sleep(ORPHANS_FIRST_S)
        while True:
            try:
                if removed := await self._orphans.sweep():
                    _log.warning("batches.orphans_removed", contents=removed)
            except NimbosError as error:
                _log.warning("batches.orphans_not_swept", code=error.code)
            await asyncio.sleep(ORPHANS_S)

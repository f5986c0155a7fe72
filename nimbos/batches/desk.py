"""What clients do with batches: submit, look, list, cancel. Everything else happens behind: read `jobs.py` next."""

from __future__ import annotations

import time

import msgspec

from nimbos.batches import rows
from nimbos.batches.files import Files, missing
from nimbos.batches.words import OVER, Batch, Dialect, State, batch_of
from nimbos.config import BatchSettings
from nimbos.db import Database, Transaction
from nimbos.errors import Conflict, NotFound, Overloaded
from nimbos.types import Account, new_id
from nimbos.work import Work

JOBS = "batch.job"  # every kind of job begins so
RETRY_OPEN_S = 60.0
_LINES = "batch.line:"


def jobs_of(project: str) -> str:
    """The kind of work that a project's batches are before and after their lines: each project has a queue of its
    own."""
    return f"{JOBS}:{project}"


def lines_of(batch_id: str) -> str:
    """The kind of work that a batch's lines are: each batch has a queue of its own."""
    return f"{_LINES}{batch_id}"


def batch_of_lines(kind: str) -> str:
    return kind.removeprefix(_LINES)


class Desk:
    def __init__(self, database: Database, files: Files, work: Work, settings: BatchSettings) -> None:
        self._database = database
        self._files = files
        self._work = work
        self._settings = settings

    async def create(
        self,
        account: Account,
        *,
        dialect: Dialect,
        endpoint: str,
        input_file: str,
        completion_window: str,
        window_s: int,
        metadata: dict[str, str] | None = None,
        output_expires_s: int | None = None,
    ) -> Batch:
        """Raises: NotFound for a file that is not this project's; Overloaded where the project has too many that are
        not over."""
        file = await self._files.get(account.id, input_file)
        now_ms = time.time_ns() // 1_000_000
        batch_id = new_id("batch")

        def begin() -> Transaction[Batch]:
            if not (yield from self._files.lock(account.id, input_file)):
                raise missing(input_file)
            yield from self._files.lock_all(account.id)
            (row,) = yield rows.OPEN(project=account.id)
            if row["open"] >= self._settings.open_batches:
                raise Overloaded(
                    limit="open batches",
                    value=self._settings.open_batches,
                    used=row["open"],
                    retry_after_s=RETRY_OPEN_S,
                    owner=f"project {account.name!r}",
                )
            yield rows.ADD(
                id=batch_id,
                project=account.id,
                account=msgspec.json.encode(account).decode(),
                dialect=dialect,
                endpoint=endpoint,
                input_file=file.id,
                input_blob=file.blob,
                completion_window=completion_window,
                metadata=msgspec.json.encode(metadata).decode() if metadata is not None else None,
                output_expires_s=output_expires_s,
                state=State.VALIDATING.value,
                ending="",
                created_ms=now_ms,
                expires_ms=now_ms + window_s * 1000,
                errors=None,
                output_file=None,
                error_file=None,
                total=0,
                completed=0,
                failed=0,
                validated_lines=0,
                validated_bytes=0,
                waiting_for=None,
                waiting_until_ms=0,
                **dict.fromkeys((f"{state}_ms" for state in rows.MOVE), None),
            )
            yield from self._work.add(jobs_of(account.id), batch_id)
            (row,) = yield rows.GET(id=batch_id)
            return batch_of(row)

        return await self._database.run(begin, durable=True)

    async def get(self, project: str, batch_id: str, *, dialect: Dialect) -> Batch:
        """Raises: NotFound, also for another project's."""
        found = await self._database.read(rows.GET_OWN(project=project, id=batch_id, dialect=dialect))
        if not found:
            raise _missing(batch_id)
        return batch_of(found[0])

    async def list(
        self, project: str, *, dialect: Dialect, limit: int, after: str = "", before: str = ""
    ) -> list[Batch]:
        """Newest first. `after`, `before`: the id of the last, or of the first, of the page that is shown."""
        if before:
            found = await self._database.read(
                rows.LIST_BACK(project=project, dialect=dialect, before=before, limit=limit)
            )
            return [batch_of(row) for row in reversed(found)]
        found = await self._database.read(rows.LIST(project=project, dialect=dialect, after=after, limit=limit))
        return [batch_of(row) for row in found]

    async def cancel(self, project: str, batch_id: str, *, dialect: Dialect) -> Batch:
        """Lines that are being answered may finish; those that wait are not begun. Cancelling twice is no error.

        Raises: NotFound; Conflict when it is over, or about to be.
        """

        def begin() -> Transaction[Batch]:
            found = yield rows.LOCK(id=batch_id)
            if not found or (found[0]["project"], found[0]["dialect"]) != (project, dialect):
                raise _missing(batch_id)
            state = State(found[0]["state"])
            if state in OVER or state is State.FINALIZING:
                raise Conflict(f"The batch {batch_id} is {state.value} and cannot be cancelled any more.")
            if state is not State.CANCELLING:
                found = yield rows.MOVE[State.CANCELLING](id=batch_id, now_ms=time.time_ns() // 1_000_000)
                yield rows.END(id=batch_id, how=State.CANCELLED.value)
                yield from self._work.drop_waiting(lines_of(batch_id))
                yield from self._work.add(jobs_of(project), batch_id)
            return batch_of(found[0])

        return await self._database.run(begin, durable=True)

    async def delete(self, project: str, batch_id: str, *, dialect: Dialect) -> None:
        """The batch is forgotten; its files stay. What is left of its lines goes piece by piece, as work.

        Raises: NotFound; Conflict while it is not over.
        """

        def begin() -> Transaction[None]:
            found = yield rows.LOCK(id=batch_id)
            if not found or (found[0]["project"], found[0]["dialect"]) != (project, dialect):
                raise _missing(batch_id)
            if State(found[0]["state"]) not in OVER:
                raise Conflict(f"The batch {batch_id} is {found[0]['state']}. Cancel it, or wait until it is over.")
            yield rows.DELETE(id=batch_id)
            yield from self._work.add(jobs_of(project), batch_id)

        await self._database.run(begin, durable=True)


def _missing(batch_id: str) -> NotFound:
    return NotFound(f"There is no batch {batch_id[:100]!r} in this project.", param="batch_id")

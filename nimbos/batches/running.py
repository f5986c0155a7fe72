"""One line of a batch: read, asked as class `batch` in the name of the key that submitted it, and its answer settled.

The answer and the end of the line's claim are one transaction, and a line is settled once, so each custom id has one
answer, whatever died meanwhile. A limit that is hit makes the batch wait, never fail; nothing else may hold it up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import msgspec

from nimbos.accounts import allowed_classes, allowed_route
from nimbos.batches import rows
from nimbos.batches.contents import Contents
from nimbos.batches.desk import batch_of_lines, jobs_of
from nimbos.batches.endpoint import Endpoint, Reply
from nimbos.batches.fairness import Caps
from nimbos.batches.journal import LineJournal, attempts_of
from nimbos.batches.lines import request_of
from nimbos.batches.words import Batch, State, batch_of
from nimbos.db import Database, Row, Transaction
from nimbos.errors import (
    AnswerFailed,
    BudgetExhausted,
    EngineFailed,
    Forbidden,
    NimbosError,
    NotReady,
    Overloaded,
    StorageUnavailable,
)
from nimbos.types import Account, AskClass, Origin
from nimbos.work import Claim, ClaimLost, Work

LAPSES_MAX = 5  # so many servers may die over one line
FAILURES_MAX = 5  # so often an engine may
CONCURRENT = "concurrent asks"  # the ledger's word for that limit
WAIT_MOST_S = 60.0  # a limit is looked at again, as it may have been raised
_WAIT_LEAST_S = 0.1
_RETRY_S = 5.0
_FAILURES_KEPT = 10_000

Resolve = Callable[[Account], Awaitable[Account]]


class Running:
    def __init__(
        self,
        database: Database,
        contents: Contents,
        work: Work,
        *,
        endpoints: Mapping[str, Endpoint],
        caps: Caps,
        holding: Callable[[str], int],
        resolve: Resolve,
        wake: Callable[[], None],
    ) -> None:
        """`holding`: how many lines of a batch run here. `resolve`: what the submitting key may do now. `wake`: there
        is something to claim."""
        self._database = database
        self._contents = contents
        self._work = work
        self._endpoints = endpoints
        self._caps = caps
        self._holding = holding
        self._resolve = resolve
        self._wake = wake
        self._failures: dict[
            tuple[str, str], int
        ] = {}  # of engines, by line: an epoch counts limits that were met, too

    async def run(self, claim: Claim) -> None:
        """Ends the claim. Raises: ClaimLost, StorageUnavailable."""
        batch_id, number = batch_of_lines(claim.kind), int(claim.ref)
        found = await self._database.read(rows.GET(id=batch_id))
        lines = await self._database.read(rows.GET_LINE(batch=batch_id, number=number))
        begun = found and found[0]["state"] == State.IN_PROGRESS  # else it was cancelled since the line was claimed
        if not begun or not lines or lines[0]["state"] != "waiting":
            await self._database.run(lambda: self._work.finish(claim))
            return
        batch = batch_of(found[0])
        settling = Settling(self._work, claim, batch.id, number, on_over=self._wake)
        if claim.lapses >= LAPSES_MAX:
            told = f"{claim.lapses} servers ended while this line was being answered; it is not tried again."
            await settling.write(self._database, partial(settling.fail, "line_abandoned", told))
            return
        attempts = attempts_of(claim)
        if attempts.open:
            attempts = await self._database.run(attempts.settled)
        journal = LineJournal(self._work, claim, settling.answer, before=attempts)
        try:
            reply = await self._reply(batch, lines[0], journal)
        except (Overloaded, BudgetExhausted) as error:
            seconds = await self._database.run(partial(self._wait, batch, claim, error))
            asyncio.get_running_loop().call_later(seconds, self._wake)
        except NotReady:  # shutting down, or still loading
            await self._database.run(lambda: self._work.release(claim, delay_s=_RETRY_S))
        except EngineFailed as error:
            if not isinstance(error, AnswerFailed) and self._may_fail_again(claim):
                await self._database.run(lambda: self._work.release(claim, delay_s=_RETRY_S))
                return
            refusal = Reply(error.status, self._endpoints[batch.endpoint].refuse(error))
            await settling.write(self._database, partial(settling.answer, refusal))
        else:
            self._caps.grow(batch.id)
            self._failures.pop((claim.kind, claim.ref), None)
            if not journal.written:
                await settling.write(self._database, partial(settling.answer, reply))
            elif journal.over:
                self._wake()

    async def _reply(self, batch: Batch, line: Row, journal: LineJournal) -> Reply:
        """Raises: what is worth another try; everything else is an answer, in the route's shape."""
        endpoint = self._endpoints[batch.endpoint]
        start, end = line["start_byte"], line["start_byte"] + line["size_bytes"]
        pieces = self._contents.read(batch.input_file, batch.input_blob, start=start, end=end)
        request = request_of(b"".join([piece async for piece in pieces]))
        origin = Origin(route=endpoint.path, batch=batch.id)
        try:
            account = await self._resolve(batch.account)
            _check_allowed(account, batch, endpoint.path)
            as_batch = msgspec.structs.replace(account, scopes=frozenset({f"class:{AskClass.BATCH}"}))
            return await endpoint.perform(as_batch, bytes(request.body), origin=origin, journal=journal)
        except BudgetExhausted as error:
            if error.too_small:  # this line alone is more than the whole budget: the others need not wait for it
                return Reply(error.status, endpoint.refuse(error))
            raise
        except (Overloaded, NotReady, EngineFailed, StorageUnavailable, ClaimLost):
            raise
        except NimbosError as error:
            return Reply(error.status, endpoint.refuse(error))

    def _may_fail_again(self, claim: Claim) -> bool:
        line = claim.kind, claim.ref
        failures = self._failures.pop(line, 0) + 1
        if failures < FAILURES_MAX:
            while len(self._failures) >= _FAILURES_KEPT:  # of lines that ended elsewhere
                del self._failures[next(iter(self._failures))]
            self._failures[line] = failures
        return failures < FAILURES_MAX

    def _wait(self, batch: Batch, claim: Claim, error: Overloaded | BudgetExhausted) -> Transaction[float]:
        """The whole batch waits, as its other lines would meet the same limit; where it is how many may run at once,
        only those wait that are too many. For how long."""
        seconds = WAIT_MOST_S if error.retry_after_s is None else error.retry_after_s
        seconds = min(WAIT_MOST_S, max(_WAIT_LEAST_S, seconds))
        concurrent = isinstance(error, Overloaded) and error.limit == CONCURRENT
        self._caps.put(batch.id, error.used if concurrent else self._holding(batch.id) // 2, time.monotonic())
        if concurrent:
            yield from self._work.release(claim, delay_s=seconds)
            return seconds
        until_ms = time.time_ns() // 1_000_000 + int(seconds * 1000)
        if (yield from self._work.release(claim)):  # otherwise the batch may be over
            yield rows.WAIT(id=batch.id, limit_told=error.message, until_ms=until_ms)
        return seconds


def _check_allowed(account: Account, batch: Batch, path: str) -> None:
    """What the key may use now, as when it submitted the batch. Raises: Forbidden."""
    if not allowed_route(account, f"{path}/batches" if batch.dialect == "anthropic" else path):
        raise Forbidden(f"This key may not use {path} any more.")
    if AskClass.BATCH not in allowed_classes(account):
        raise Forbidden(f"This key is not for the class {AskClass.BATCH.value!r} any more.")


class Settling:
    """How one line ends. `write` runs a way of ending alone; a journal may run it within the ledger's transaction."""

    def __init__(self, work: Work, claim: Claim, batch_id: str, number: int, *, on_over: Callable[[], None]) -> None:
        self._work = work
        self._claim = claim
        self._batch_id = batch_id
        self._number = number
        self._on_over = on_over

    async def write(self, database: Database, ending: Callable[[], Transaction[bool]]) -> None:
        """Raises: ClaimLost."""

        def begin() -> Transaction[bool]:
            yield from self._work.finish(self._claim)
            return (yield from ending())

        if await database.run(begin, durable=True):
            self._on_over()

    def answer(self, reply: Reply) -> Transaction[bool]:
        """Whether this was the batch's last line."""
        good = 200 <= reply.status < 300
        return self._settle(
            good=good,
            how="done" if good else "refused",
            code=reply.status,
            ask=reply.ask_id,
            body=reply.body,
            fault=None,
            message=None,
        )

    def fail(self, code: str, message: str) -> Transaction[bool]:
        return self._settle(good=False, how="failed", code=None, ask=None, body=None, fault=code, message=message)

    def _settle(
        self,
        *,
        good: bool,
        how: str,
        code: int | None,
        ask: str | None,
        body: bytes | None,
        fault: str | None,
        message: str | None,
    ) -> Transaction[bool]:
        """After the last line the batch's job is to write the files."""
        settled = yield rows.SETTLE(
            batch=self._batch_id,
            number=self._number,
            how=how,
            code=code,
            ask=ask,
            body=body,
            fault=fault,
            message=message,
        )
        if not settled:
            return False
        (row,) = yield rows.COUNT(
            id=self._batch_id, good=int(good), bad=int(not good), now_ms=time.time_ns() // 1_000_000
        )
        if row["completed"] + row["failed"] < row["total"] or row["state"] != State.IN_PROGRESS:
            return False
        yield rows.MOVE[State.FINALIZING](id=self._batch_id, now_ms=time.time_ns() // 1_000_000)
        yield rows.END(id=self._batch_id, how=State.COMPLETED.value)
        yield from self._work.add(jobs_of(row["project"]), self._batch_id)
        return True

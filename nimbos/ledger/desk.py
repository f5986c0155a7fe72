"""The ledger's desk in a running server: lets asks in, and settles each of them once, whatever happens meanwhile.

    admit    a row of the meter file, then the reservation; `Running` (running.py) is the ask from then on
    settle   in a task of its own, which no cancelled caller takes along

When the database cannot be used, new asks are refused (StorageUnavailable), and settlements wait here and are tried
again until they are durable; only then is the meter's row freed. What still waits when the server ends stays in the
meter file, for recovery. Knows no source and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import structlog

from nimbos.db import Database, Transaction
from nimbos.errors import NimbosError, StorageUnavailable
from nimbos.ledger.alerts import Fired
from nimbos.ledger.bell import Bell
from nimbos.ledger.budgets import Held
from nimbos.ledger.journal import Journal
from nimbos.ledger.ledger import Extended, Ledger, Reserved, Settled
from nimbos.ledger.rows import Settlement
from nimbos.ledger.running import Due, Running
from nimbos.meterfile import MeterFile
from nimbos.types import Account, Ask, ModelCard, Origin, Prepared, Usage

ADMIT_PATIENCE_S = 10.0  # how long an ask waits for what running asks hold of its budget
HELD_TICK_S = 0.5  # another server's settlements ring no bell here
RETRY_FIRST_S, RETRY_MOST_S = 0.25, 5.0

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class Desk:
    def __init__(
        self,
        *,
        database: Database,
        ledger: Ledger,
        meters: MeterFile,
        on_alert: Callable[[Fired], None] | None = None,
        admit_patience_s: float = ADMIT_PATIENCE_S,
    ) -> None:
        """`on_alert` is told of each threshold that was crossed, once its transaction is committed."""
        self.bell = Bell()
        self.database = database
        self.ledger = ledger
        self.meters = meters
        self._on_alert = on_alert
        self._admit_patience_s = admit_patience_s
        self._running: dict[str, Running] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._late: list[Due] = []
        self._waiting = 0
        self._closed = False
        self._retrying: asyncio.Task[None] | None = None

    @property
    def late(self) -> int:
        """Settlements that wait for the database."""
        return len(self._late)

    @property
    def waiting(self) -> int:
        """Asks that wait for what running ones hold of their budget."""
        return self._waiting

    async def admit(
        self, account: Account, prepared: Prepared, *, origin: Origin, card: ModelCard, journal: Journal | None = None
    ) -> Running:
        """Reserves for the ask; `Running.ask` is what the source gets. Whoever is given a `Running` ends it.

        Raises: Overloaded, BudgetExhausted, StorageUnavailable; then nothing was taken.
        """
        ask = prepared.ask
        unpaid_tokens = max(0, prepared.prompt_tokens - ask.paid_prompt_tokens)
        row = self.meters.allot(ask.id)

        def begin() -> Transaction[Reserved]:
            reserved = yield from self.ledger.reserve(
                account, ask, origin=origin, prompt_tokens=unpaid_tokens, card=card
            )
            if journal is not None:
                yield from journal.reserved(ask, prompt_tokens=prepared.prompt_tokens)
            return reserved

        clock = asyncio.get_running_loop().time
        deadline, waited = clock() + self._admit_patience_s, False
        reserving = asyncio.create_task(self.database.run(begin, quick=True))
        try:
            while True:
                try:
                    reserved = await asyncio.shield(reserving)
                    break
                except Held:
                    if clock() >= deadline:
                        raise
                await self._wait(most_s=deadline - clock())
                waited = True
                reserving = asyncio.create_task(self.database.run(begin, quick=True))
        except asyncio.CancelledError:
            self._keep(self._undo(reserving, Due(settlement=_nothing(ask), row=row, journal=journal)))
            raise
        except BaseException as error:
            self._refused(error, Due(settlement=_nothing(ask), row=row, journal=journal))
            raise
        self.ledger.remember(reserved.prices)
        if waited:
            self.bell.ring()  # there may be more than this ask needs
        counted = msgspec.structs.replace(
            ask, meter_row=row, allowance_tokens=reserved.allowance_tokens, weight=account.weight
        )
        running = self._running[ask.id] = Running(self, counted, reserved, row=row, journal=journal)
        return running

    async def _wait(self, *, most_s: float) -> None:
        self._waiting += 1
        try:
            await self.bell.wait(HELD_TICK_S, most_s=most_s)
        finally:
            self._waiting -= 1

    def used(self, ask_id: str) -> Usage:
        """What a running ask has used so far."""
        running = self._running.get(ask_id)
        return running.used() if running is not None else Usage()

    def settle(self, due: Due) -> asyncio.Task[None]:
        """Begins at once. The task ends when it is durable, or when it waits for the database to come back."""
        self._running.pop(due.settlement.ask_id, None)
        return self._keep(self._settle(due))

    def extend(self, begin: Callable[[], Transaction[Extended]]) -> asyncio.Task[Extended]:
        return self._keep(self._extend(begin))

    def _tell(self, fired: tuple[Fired, ...]) -> None:
        for one in fired:
            budget = one.budget
            _log.warning(
                "budget.alert",
                alert=one.alert,
                budget=budget.id,
                owner_kind=budget.owner_kind,
                owner_id=budget.owner_id,
                meter=budget.meter,
                threshold=one.threshold,
                used=budget.used,
                limit=budget.limit,
            )
            if self._on_alert is not None:
                self._on_alert(one)

    async def close(self) -> None:
        """Waits for settlements; tries once more those that wait for the database."""
        self._closed = True
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._retrying is not None:
            self._retrying.cancel()
            with suppress(asyncio.CancelledError):
                await self._retrying
        await self._settle_late()
        if self._late:
            _log.error("ledger.left_to_recovery", asks=len(self._late))

    async def _settle(self, due: Due) -> None:
        try:
            await self._write(due)
        except StorageUnavailable as error:
            self._late.append(due)
            _log.warning("ledger.settlement_waits", ask=due.settlement.ask_id, reason=error.reason)
            if not self._closed and (self._retrying is None or self._retrying.done()):
                self._retrying = asyncio.create_task(self._retry(), name="late settlements")
        except NimbosError as error:
            await self._settle_alone(due, error)

    async def _settle_alone(self, due: Due, error: NimbosError) -> None:
        """A journal that refuses keeps nobody from what was used; without one, the row and its meter stay for
        recovery."""
        _log.error("ledger.settlement_refused", ask=due.settlement.ask_id, code=error.code)
        if due.journal is not None:
            await self._settle(replace(due, journal=None))

    async def _write(self, due: Due) -> None:
        def begin() -> Transaction[Settled]:
            settled = yield from self.ledger.settle(due.settlement)
            if settled.new and due.journal is not None:
                yield from due.journal.settled(due.settlement, settled)
            return settled

        settled = await self.database.run(begin, durable=True, quick=True)
        self.meters.free(due.row)
        self.ledger.remember(settled.prices)
        self._tell(settled.fired)
        self.bell.ring()

    async def _retry(self) -> None:
        wait_s = RETRY_FIRST_S
        while self._late:
            await asyncio.sleep(wait_s)
            wait_s = min(RETRY_MOST_S, 2 * wait_s)
            await self._settle_late()

    async def _settle_late(self) -> None:
        """In their order, until the database fails again."""
        while self._late:
            due = self._late[0]
            try:
                await self._write(due)
            except StorageUnavailable:
                return
            except NimbosError as error:
                await self._settle_alone(due, error)
            self._late.pop(0)

    async def _undo(self, reserving: asyncio.Task[Reserved], due: Due) -> None:
        """The caller went while the reservation was on its way."""
        try:
            await reserving
        except NimbosError as error:
            self._refused(error, due)
            return
        await self._settle(due)

    def _refused(self, error: BaseException, due: Due) -> None:
        """Nothing was reserved; where that is in doubt, it is given back as soon as the database answers."""
        if isinstance(error, StorageUnavailable) and error.in_doubt:
            self.settle(due)
        else:
            self.meters.free(due.row)

    async def _extend(self, begin: Callable[[], Transaction[Extended]]) -> Extended:
        extended = await self.database.run(begin, quick=True)
        self.ledger.remember(extended.prices)
        self._tell(extended.fired)
        return extended

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _nothing(ask: Ask) -> Settlement:
    return Settlement(ask_id=ask.id, usage=Usage(), outcome="cancelled")

"""Puts a server's parts together: models, database, accounts, ledger, service, kernel. The one place where they meet.

`cli/serve.py` and the tests call `assemble`; closing the `Runtime` closes everything it made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from nimbos.accounts import Accounts, Authority
from nimbos.batches import Batches, rehearsal_source
from nimbos.blobs import Blobs, open_blobs
from nimbos.config import Settings
from nimbos.db import Database
from nimbos.engine.scripted import TEMPLATE_SHA256
from nimbos.hub import Hub
from nimbos.keys import OwnerKey, file_keys
from nimbos.ledger import Desk, Ledger, Recovery
from nimbos.meterfile import MeterFile
from nimbos.meters import Meters
from nimbos.models import Models
from nimbos.responses import Background, Store
from nimbos.service import Service
from nimbos.telemetry import Telemetry, open_telemetry
from nimbos.types import ModelCard, new_id
from nimbos.watching import LiveAsks

if TYPE_CHECKING:
    from nimbos.kernel import Kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A server's parts. Whoever called `assemble` calls `close`. `server_id`: new at each start. `loading`: of the
    first model, if one was named."""

    settings: Settings
    server_id: str
    database: Database
    blobs: Blobs
    hub: Hub
    service: Service
    accounts: Accounts
    meters: Meters
    live: LiveAsks
    telemetry: Telemetry | None
    ledger: Ledger
    recovery: Recovery
    meter_file: MeterFile
    responses: Store
    background: Background
    batches: Batches
    kernel: Kernel
    loading: asyncio.Task[ModelCard] | None

    closing: AsyncExitStack

    async def close(self) -> None:
        """The last that was made goes first, and each goes, whatever happens to another."""
        await self.closing.aclose()


async def assemble(settings: Settings, *, owner: OwnerKey, models: Models) -> Runtime:
    """`models` are the runtime's from here on, also when it fails.

    Raises: ConfigError for keys that cannot be read; StorageUnavailable.
    """
    async with AsyncExitStack() as closing:  # closes what was made so far when something fails
        closing.push_async_callback(models.close)
        return await _made(settings, closing, owner, models)


async def _made(settings: Settings, closing: AsyncExitStack, owner: OwnerKey, models: Models) -> Runtime:
    """`closing` is given what has to be closed, in the order it was made."""
    configured = file_keys(settings)
    server_id = new_id("srv")
    telemetry = open_telemetry(server_id)
    if telemetry is not None:
        closing.push_async_callback(asyncio.to_thread, telemetry.close)
    database = await Database.open(settings)
    closing.push_async_callback(database.close)
    accounts = await Accounts.open(database, owner=owner, file_keys=configured)
    closing.push_async_callback(accounts.close)
    ledger = Ledger(server_id=models.meter_file.path.stem)
    recovery = Recovery(database=database, ledger=ledger, run_dir=settings.run_dir)
    dead = await recovery.dead()  # before their files are gone
    await recovery.recover()
    recovery.start()
    closing.push_async_callback(recovery.close)
    meters, live = Meters(), LiveAsks()
    rehearsal = rehearsal_source()
    rehearsal.count_into(models.meter_file)
    models.sources.hide(rehearsal)
    service = Service(
        sources=models.sources,
        desk=Desk(
            database=database,
            ledger=ledger,
            meters=models.meter_file,
            on_alert=lambda fired: meters.alert(fired.budget.meter),
        ),
        watchers=(meters, live, *((telemetry,) if telemetry is not None else ())),
        trusted_templates=frozenset({TEMPLATE_SHA256, *models.hub.trusted_templates}),
    )
    closing.push_async_callback(service.close)
    closing.push_async_callback(models.give_up)
    blobs = open_blobs(settings, database)
    responses = Store(database, blobs, project_bytes=settings.server.responses_bytes)
    background = Background(responses, owner=server_id)
    closing.push_async_callback(background.close)
    batches = Batches(database, blobs, settings.batches, server_id=server_id)
    await batches.start()
    closing.push_async_callback(batches.close)
    kernel = await _kernel(settings, database, blobs, service, server=ledger.server_id, dead=dead)
    closing.push_async_callback(kernel.close)
    await kernel.start()
    return Runtime(
        settings=settings,
        server_id=server_id,
        database=database,
        blobs=blobs,
        hub=models.hub,
        service=service,
        accounts=accounts,
        meters=meters,
        live=live,
        telemetry=telemetry,
        ledger=ledger,
        recovery=recovery,
        meter_file=models.meter_file,
        responses=responses,
        background=background,
        batches=batches,
        kernel=kernel,
        loading=models.loading,
        closing=closing.pop_all(),
    )


async def _kernel(
    settings: Settings, database: Database, blobs: Blobs, service: Service, *, server: str, dead: Iterable[str]
) -> Kernel:
    """Imported in a thread, beside the first model's start."""
    await asyncio.to_thread(import_module, "nimbos.kernel.kernel")
    from nimbos.kernel import Kernel, release_dead

    await release_dead(database, dead)
    return Kernel(
        database=database,
        blobs=blobs,
        service=service,
        home=Path(settings.home),
        server=server,
        resolve=Authority(database).check,
    )

"""Puts a server's parts together: hub, engines, sources, service. The one place where they meet.

`cli/serve.py` and the tests call `assemble`; closing the `Runtime` closes everything it made.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from nimbos.accounts import Accounts, Authority
from nimbos.batches import Batches, rehearsal_source
from nimbos.blobs import Blobs, open_blobs
from nimbos.config import EngineSettings, Settings
from nimbos.db import Database
from nimbos.engine import Engine
from nimbos.engine.scripted import TEMPLATE_SHA256, ScriptedSource
from nimbos.hub import Hub, LocalModel
from nimbos.keys import OwnerKey, file_keys
from nimbos.ledger import Desk, Ledger, Recovery
from nimbos.meterfile import MeterFile
from nimbos.meters import Meters
from nimbos.responses import Background, Store
from nimbos.service import Service
from nimbos.sources import Sources
from nimbos.telemetry import Telemetry, open_telemetry
from nimbos.types import ModelCard, new_id
from nimbos.watching import LiveAsks

if TYPE_CHECKING:
    from nimbos.kernel import Kernel

_FREE_SHARE = 0.8
_UNKNOWN_MEMORY_BYTES = 8 << 30
_CELLS_MIN, _CELLS_MAX = 2_048, 131_072
_EMBEDDING_SEQUENCES = 64
_RECURRENT_SEQUENCES_MAX = 16


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


async def assemble(
    settings: Settings,
    *,
    owner: OwnerKey,
    hub: Hub | None = None,
    scripted: Iterable[ScriptedSource] = (),
    named: Mapping[str, LocalModel] | None = None,
    first: str = "",
) -> Runtime:
    """`named`: models outside the hub's folder, by id. `first`: a model whose loading begins as soon as it can, while
    the rest is being made.

    Raises: ConfigError for keys that cannot be read; StorageUnavailable.
    """
    async with AsyncExitStack() as closing:  # closes what was made so far when something fails
        return await _made(settings, closing, owner, hub or Hub(settings), tuple(scripted), named, first)


async def _made(
    settings: Settings,
    closing: AsyncExitStack,
    owner: OwnerKey,
    hub: Hub,
    scripted: tuple[ScriptedSource, ...],
    named: Mapping[str, LocalModel] | None,
    first: str,
) -> Runtime:
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
    meter_file = MeterFile.create(settings.run_dir)
    closing.callback(meter_file.close)
    ledger = Ledger(server_id=meter_file.path.stem)
    recovery = Recovery(database=database, ledger=ledger, run_dir=settings.run_dir)
    dead = await recovery.dead()  # before their files are gone
    await recovery.recover()
    recovery.start()
    closing.push_async_callback(recovery.close)
    meters, live = Meters(), LiveAsks()
    service = Service(
        sources=_sources(settings, hub, meter_file, scripted, named),
        desk=Desk(
            database=database, ledger=ledger, meters=meter_file, on_alert=lambda fired: meters.alert(fired.budget.meter)
        ),
        watchers=(meters, live, *((telemetry,) if telemetry is not None else ())),
        trusted_templates=frozenset({TEMPLATE_SHA256, *hub.trusted_templates}),
    )
    closing.push_async_callback(service.close)
    loading = asyncio.create_task(service.card(first), name="first model") if first else None
    closing.push_async_callback(_given_up, loading)
    blobs = open_blobs(settings, database)
    responses = Store(database, blobs)
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
        hub=hub,
        service=service,
        accounts=accounts,
        meters=meters,
        live=live,
        telemetry=telemetry,
        ledger=ledger,
        recovery=recovery,
        meter_file=meter_file,
        responses=responses,
        background=background,
        batches=batches,
        kernel=kernel,
        loading=loading,
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


async def _given_up(loading: asyncio.Task[ModelCard] | None) -> None:
    """What still loads when the server ends."""
    if loading is not None:
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)


def _sources(
    settings: Settings,
    hub: Hub,
    meter_file: MeterFile,
    scripted: tuple[ScriptedSource, ...],
    named: Mapping[str, LocalModel] | None,
) -> Sources:
    """Every source counts into the meter file."""
    budget_bytes = memory_budget_bytes(settings)
    hidden = (rehearsal_source(),)
    for source in (*scripted, *hidden):
        source.count_into(meter_file)

    def start_engine(model: LocalModel) -> Engine:
        return Engine(
            model_path=model.path,
            model_id=model.id,
            settings=settings,
            model_hash=model.sha256,
            meters=meter_file,
        )

    def memory_needed(model: LocalModel) -> int:
        cells = cells_of(model, settings.engine)
        sequences = sequences_of(model, settings.engine)
        return hub.check_memory(model, cells=cells, sequences=sequences, budget_bytes=budget_bytes)

    return Sources(
        shelf=hub,
        start_engine=start_engine,
        memory_needed=memory_needed,
        memory_budget_bytes=budget_bytes,
        scripted=scripted,
        hidden=hidden,
        aliases=settings.server.aliases,
        named=named,
    )


def cells_of(model: LocalModel, settings: EngineSettings) -> int:
    """How many tokens of KV the engine will make room for (`engine/sizes.py`), as far as the file's own facts tell."""
    if settings.cells:
        return settings.cells
    per_cell = model.facts.kv_bytes_per_cell + model.facts.window_bytes_per_cell
    return max(_CELLS_MIN, min(_CELLS_MAX, settings.kv_memory_mib * 2**20 // max(1, per_cell)))


def sequences_of(model: LocalModel, settings: EngineSettings) -> int:
    """How many sequences the engine will make room for; each costs a state where layers are recurrent."""
    wanted = settings.sequences if model.facts.kind == "generate" else _EMBEDDING_SEQUENCES
    return max(2, min(wanted, _RECURRENT_SEQUENCES_MAX)) if model.facts.state_bytes else wanted


def memory_budget_bytes(settings: Settings) -> int:
    """For all loaded models: as set, or 80 % of what the machine has free now."""
    if settings.server.memory_mib:
        return settings.server.memory_mib * 2**20
    return int(_FREE_SHARE * _free_bytes())


def _free_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return _UNKNOWN_MEMORY_BYTES

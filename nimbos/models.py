"""The models that a server answers with: scripted ones, and engines that start on first use.

Knows neither database nor HTTP, so that the first model's process starts before those are imported: `cli/serve.py`
opens the models first and the rest of the server (`runtime.py`) after them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from nimbos.config import EngineSettings, Settings
from nimbos.engine import Engine
from nimbos.engine.scripted import ScriptedSource
from nimbos.hub import Hub, LocalModel
from nimbos.meterfile import MeterFile
from nimbos.sources import Sources
from nimbos.types import ModelCard

_FREE_SHARE = 0.8
_UNKNOWN_MEMORY_BYTES = 8 << 30
_CELLS_MIN, _CELLS_MAX = 2_048, 131_072
_EMBEDDING_SEQUENCES = 64
_RECURRENT_SEQUENCES_MAX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """`loading`: of the first model, if one was named. Whoever opened them closes them, or hands them to `assemble`."""

    hub: Hub
    meter_file: MeterFile
    sources: Sources
    loading: asyncio.Task[ModelCard] | None

    async def close(self) -> None:
        """May be called again."""
        await self.give_up()
        await self.sources.close()
        self.meter_file.close()

    async def give_up(self) -> None:
        """What still loads need not be waited for."""
        if self.loading is not None:
            self.loading.cancel()
            await asyncio.gather(self.loading, return_exceptions=True)


def open_models(
    settings: Settings,
    *,
    hub: Hub | None = None,
    scripted: Iterable[ScriptedSource] = (),
    named: Mapping[str, LocalModel] | None = None,
    first: str = "",
) -> Models:
    """`named`: models outside the hub's folder, by id. `first`: a model whose loading begins at once; then an event
    loop must be running."""
    hub = hub or Hub(settings)
    meter_file = MeterFile.create(settings.run_dir)
    sources = _sources(settings, hub, meter_file, tuple(scripted), named)
    loading = asyncio.create_task(sources.load(first), name="first model") if first else None
    return Models(hub=hub, meter_file=meter_file, sources=sources, loading=loading)


def _sources(
    settings: Settings,
    hub: Hub,
    meter_file: MeterFile,
    scripted: tuple[ScriptedSource, ...],
    named: Mapping[str, LocalModel] | None,
) -> Sources:
    """Every source counts into the meter file."""
    budget_bytes = memory_budget_bytes(settings)
    for source in scripted:
        source.count_into(meter_file)

    def start_engine(model: LocalModel, swap_bytes: int) -> Engine:
        engine = msgspec.structs.replace(settings.engine, swap_memory_mib=swap_bytes // 2**20)
        return Engine(
            model_path=model.path,
            model_id=model.id,
            settings=msgspec.structs.replace(settings, engine=engine),
            model_hash=model.sha256,
            meters=meter_file,
        )

    def memory_needed(model: LocalModel) -> int:
        return check_memory(hub, model, settings.engine, budget_bytes=budget_bytes)

    return Sources(
        shelf=hub,
        start_engine=start_engine,
        memory_needed=memory_needed,
        memory_wished=lambda model: swap_bytes_of(model, settings.engine),
        memory_budget_bytes=budget_bytes,
        scripted=scripted,
        aliases=settings.server.aliases,
        named=named,
    )


def check_memory(hub: Hub, model: LocalModel, settings: EngineSettings, *, budget_bytes: int) -> int:
    """Bytes that an engine with these settings needs for it.

    Raises: ModelUnusable with the numbers when that is more than the budget.
    """
    return hub.check_memory(
        model,
        cells=cells_of(model, settings),
        sequences=sequences_of(model, settings),
        budget_bytes=budget_bytes,
        flash_attention=settings.flash_attention,
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


def swap_bytes_of(model: LocalModel, settings: EngineSettings) -> int:
    """Memory that the engine fills in time with contexts that nobody uses now, as far as the file's own facts tell."""
    facts = model.facts
    shares = settings.share_prefixes and facts.kind == "generate" and not (facts.state_bytes or facts.window_tokens)
    return settings.swap_memory_mib * 2**20 if shares else 0


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

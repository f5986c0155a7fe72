"""Which models answer here: scripted ones always, installed ones from their first use until their memory is needed.

One load at a time per model, and everyone who asks meanwhile waits for it. A model that is answering is never unloaded.
Knows no accounts and no HTTP; `service.py` is its only caller.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import structlog

from nimbos.errors import EngineFailed, ModelNotFound, NimbosError, Overloaded
from nimbos.hub.reading import in_thread
from nimbos.types import ModelCard, TokenSource

if TYPE_CHECKING:
    from nimbos.engine import EngineStats
    from nimbos.engine.scripted import ScriptedSource
    from nimbos.hub import LocalModel

RETRY_LOAD_AFTER_S = 5.0
RETRY_UNLOAD_AFTER_S = 5.0

_log = structlog.get_logger(__name__)


class EngineSource(TokenSource, Protocol):
    """What `nimbos.engine.Engine` shows here."""

    @property
    def active(self) -> int: ...

    @property
    def pid(self) -> int | None: ...
    @property
    def given_up(self) -> bool: ...
    @property
    def answering(self) -> bool: ...

    async def start(self) -> ModelCard: ...

    async def stats(self) -> EngineStats: ...


class Shelf(Protocol):
    """The installed models, as `nimbos.hub.Hub` shows them. Its calls read files: they run in a thread."""

    def models(self) -> list[LocalModel]: ...

    def find(self, name: str, *, allow_path: bool = True) -> LocalModel: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A model that can be asked for. `model` is None for a scripted one."""

    id: str
    created: int
    owner: str
    model: LocalModel | None = None


@dataclass(slots=True, eq=False)
class Loaded:
    """A source with its card, and how many are using it."""

    source: TokenSource
    card: ModelCard
    engine: EngineSource | None
    memory_bytes: int
    holders: int = 0
    used_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: NimbosError
    retry_at: float


class Sources:
    def __init__(
        self,
        *,
        shelf: Shelf,
        start_engine: Callable[[LocalModel, int], EngineSource],
        memory_needed: Callable[[LocalModel], int],
        memory_wished: Callable[[LocalModel], int],
        memory_budget_bytes: int,
        scripted: tuple[ScriptedSource, ...] = (),
        aliases: Mapping[str, str] | None = None,
        named: Mapping[str, LocalModel] | None = None,
    ) -> None:
        """`memory_needed` raises ModelUnusable for a model that cannot fit at all. `memory_wished`: what its engine
        makes use of beyond that; `start_engine` gets what it may have of it.
        `named`: models from outside the shelf that the operator named, by id."""
        self._shelf = shelf
        self._start_engine = start_engine
        self._memory_needed, self._memory_wished = memory_needed, memory_wished
        self._memory_budget_bytes = memory_budget_bytes
        self._scripted = {
            source.card.id: Loaded(source=source, card=source.card, engine=None, memory_bytes=0) for source in scripted
        }
        self._hidden: dict[str, Loaded] = {}
        self._aliases = dict(aliases or {})
        self._named = dict(named or {})
        self._loaded: dict[str, Loaded] = {}
        self._loading: dict[str, asyncio.Task[Loaded]] = {}
        self._loading_bytes: dict[str, int] = {}
        self._failures: dict[str, _Failure] = {}
        self._making_room = asyncio.Lock()

    def hide(self, source: ScriptedSource) -> None:
        """One more scripted model, which is not listed and does not make the server ready."""
        self._hidden[source.card.id] = Loaded(source=source, card=source.card, engine=None, memory_bytes=0)

    async def load(self, name: str) -> ModelCard:
        """Raises: as `hold`."""
        async with self.hold(name) as held:
            return held.card

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[Loaded]:
        """The model's source, loaded if it was not; while it is held it stays.

        Raises: ModelNotFound, ModelUnusable, Overloaded when no memory can be freed, EngineFailed.
        """
        loaded = await self._get(name)
        while not await self._is_current(loaded):
            loaded = await self._get(name)
        loaded.holders += 1
        try:
            yield loaded
        except EngineFailed:
            await self._forget_dead(loaded)
            raise
        finally:
            loaded.holders -= 1
            loaded.used_at = time.monotonic()

    async def list(self) -> list[Listed]:
        """Scripted models first."""
        listed = [
            Listed(id=held.card.id, created=held.card.created, owner="scripted") for held in self._scripted.values()
        ]
        seen = set(self._scripted)
        for model in [*self._named.values(), *await asyncio.to_thread(self._shelf.models)]:
            if model.id not in seen:
                seen.add(model.id)
                created = await asyncio.to_thread(_created, model)
                listed.append(Listed(id=model.id, created=created, owner="nimbos", model=model))
        return listed

    @property
    def ready(self) -> bool:
        """Whether some model can answer now, without loading first."""
        return bool(self._scripted) or any(
            held.engine is None or held.engine.answering for held in self._loaded.values()
        )

    def engines(self) -> dict[str, EngineSource]:
        """The running engines by model id."""
        return {name: held.engine for name, held in self._loaded.items() if held.engine is not None}

    async def close(self) -> None:
        for task in self._loading.values():
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        held = [*self._loaded.values(), *self._scripted.values(), *self._hidden.values()]
        self._loaded.clear()
        await asyncio.gather(*(one.source.close() for one in held))

    async def id_of(self, name: str) -> str:
        """The id of the model that this name means, without loading it. Raises: ModelNotFound."""
        name = self._aliases.get(name, name)
        if name in self._scripted or name in self._hidden or name in self._loaded:
            return name
        return (await self._find(name)).id

    async def _get(self, name: str) -> Loaded:
        name = self._aliases.get(name, name)
        if name in self._scripted:
            return self._scripted[name]
        if name in self._hidden:
            return self._hidden[name]
        if name in self._loaded:
            return self._loaded[name]
        model = await self._find(name)
        if model.id in self._loaded:
            return self._loaded[model.id]
        failure = self._failures.get(model.id)
        if failure is not None and time.monotonic() < failure.retry_at:
            raise failure.error.with_traceback(None)
        task = self._loading.get(model.id)
        if task is None:
            task = asyncio.create_task(self._load(model), name=f"load {model.id}")
            self._loading[model.id] = task
            task.add_done_callback(lambda done: self._load_ended(model.id, done))
        return await asyncio.shield(task)

    async def _is_current(self, loaded: Loaded) -> bool:
        """False when it was unloaded between its load and our turn, or gave up while nobody asked."""
        await self._forget_dead(loaded)
        return loaded.engine is None or self._loaded.get(loaded.card.id) is loaded

    def _load_ended(self, name: str, task: asyncio.Task[Loaded]) -> None:
        self._loading.pop(name, None)
        if not task.cancelled():
            task.exception()  # seen, also when nobody waits for it any more

    async def _find(self, name: str) -> LocalModel:
        """Clients name installed models; a path is for the operator alone, who names it at start."""
        if name in self._named:
            return await in_thread(self._as_it_is_now, self._named[name])
        try:
            return await asyncio.to_thread(self._shelf.find, name, allow_path=False)
        except ModelNotFound as error:
            have = tuple(listed.id for listed in await self.list())
            raise ModelNotFound(name, have=have) from error

    def _as_it_is_now(self, model: LocalModel) -> LocalModel:
        """Its file may be another one than at the start. Raises: ModelUnusable."""
        outside = model.source == str(model.path)
        try:
            found = self._shelf.find(str(model.path) if outside else model.id, allow_path=outside)
        except ModelNotFound:
            return model  # that its file is gone is said when it is loaded
        return replace(found, id=model.id)

    async def _load(self, model: LocalModel) -> Loaded:
        started = time.monotonic()
        try:
            needed = await asyncio.to_thread(self._memory_needed, model)
            spare = await self._make_room(model.id, needed, self._memory_wished(model))
            engine = self._start_engine(model, spare)
            card = await _started_or_closed(engine)
        except NimbosError as error:
            if not isinstance(error, Overloaded):
                self._failures[model.id] = _Failure(error, time.monotonic() + RETRY_LOAD_AFTER_S)
            _log.warning("model.load_failed", model=model.id, code=error.code)
            raise
        finally:
            self._loading_bytes.pop(model.id, None)
        self._failures.pop(model.id, None)
        loaded = Loaded(source=engine, card=card, engine=engine, memory_bytes=needed + spare)
        self._loaded[model.id] = loaded
        seconds = round(time.monotonic() - started, 3)
        _log.info("model.loaded", model=model.id, memory_bytes=needed, spare_bytes=spare, seconds=seconds)
        return loaded

    async def _make_room(self, name: str, needed: int, wished: int) -> int:
        """Reserves `needed` bytes for `name`; unloads idle models, the longest unused first.

        Returns: how many of the bytes `wished` besides it may have, too; nobody gives way to those.
        """
        async with self._making_room:
            while self._used_bytes() + needed > self._memory_budget_bytes:
                idle = [held for held in self._loaded.values() if held.holders == 0]
                if not idle:
                    if self._used_bytes() == 0:
                        break  # it fits alone, or `memory_needed` would have refused it
                    raise Overloaded(
                        limit="memory",
                        value=self._memory_budget_bytes,
                        used=self._used_bytes(),
                        retry_after_s=RETRY_UNLOAD_AFTER_S,
                    )
                oldest = min(idle, key=lambda held: held.used_at)
                del self._loaded[oldest.card.id]
                _log.info("model.unloaded", model=oldest.card.id, memory_bytes=oldest.memory_bytes)
                await oldest.source.close()
            spare = max(0, min(wished, self._memory_budget_bytes - self._used_bytes() - needed))
            self._loading_bytes[name] = needed + spare
            return spare

    def _used_bytes(self) -> int:
        return sum(held.memory_bytes for held in self._loaded.values()) + sum(self._loading_bytes.values())

    async def _forget_dead(self, loaded: Loaded) -> None:
        """An engine that is not restarted any more makes room for a new one."""
        if loaded.engine is None or not loaded.engine.given_up:
            return
        name = loaded.card.id
        if self._loaded.get(name) is loaded:
            del self._loaded[name]
            await loaded.source.close()


async def _started_or_closed(engine: EngineSource) -> ModelCard:
    done = False
    try:
        card = await engine.start()
        done = True
    finally:
        if not done:
            await engine.close()
    return card


def _created(model: LocalModel) -> int:
    try:
        return int(model.path.stat().st_mtime)
    except OSError:
        return 0

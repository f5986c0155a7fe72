"""Which models answer: loaded once, unloaded when memory is needed, never while they answer.

The engines here are a source of our own, since what is tested is when they start and close, not what they say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from nimbos.config import Settings
from nimbos.engine import EngineStats
from nimbos.errors import EngineFailed, ModelNotFound, ModelUnusable, NimbosError, Overloaded
from nimbos.hub import Hub, LocalModel, ModelFacts
from nimbos.sources import Sources
from nimbos.types import Ask, Chunk, ModelCard, Prepared
from tests import tiny_gguf

GIB = 2**30


def local(name: str) -> LocalModel:
    path = Path(f"/models/{name}.gguf")
    return LocalModel(id=name, path=path, size_bytes=1, sha256=name * 8, source="x", facts=ModelFacts())


class Shelf:
    def __init__(self, *names: str) -> None:
        self._models = [local(name) for name in names]

    def models(self) -> list[LocalModel]:
        return self._models

    def find(self, name: str, *, allow_path: bool = True) -> LocalModel:
        assert not allow_path
        for model in self._models:
            if model.id == name:
                return model
        raise ModelNotFound(name)


class FakeEngine:
    """Starts when it is let, and remembers."""

    def __init__(self, yard: Yard, name: str) -> None:
        self.yard = yard
        self.name = name
        self.active = 0
        self.pid: int | None = None
        self.given_up = False

    @property
    def answering(self) -> bool:
        return self.pid is not None

    async def start(self) -> ModelCard:
        self.yard.starts.append(self.name)
        await self.yard.may_start.wait()
        if self.name in self.yard.failing:
            raise self.yard.failing[self.name]
        self.pid = 1
        return await self.describe()

    async def describe(self) -> ModelCard:
        return ModelCard(id=self.name, model_hash=self.name, architecture="none", context_tokens=1)

    async def prepare(self, ask: Ask) -> Prepared:
        return Prepared(ask=ask, prompt_tokens=0)

    async def generate(self, ask: Ask) -> AsyncIterator[Chunk]:
        for chunk in ():
            yield chunk

    async def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None:
        self.pid = None
        self.yard.closes.append(self.name)


class Yard:
    """Sources over models a, b, c of 1 GiB each, with room for two."""

    def __init__(self, budget_bytes: int = 2 * GIB, *, wished_bytes: int = 0) -> None:
        self.spare: dict[str, int] = {}
        self.starts: list[str] = []
        self.closes: list[str] = []
        self.failing: dict[str, NimbosError] = {}
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.sources = Sources(
            shelf=Shelf("a", "b", "c"),
            start_engine=self._start,
            memory_needed=lambda model: GIB,
            memory_wished=lambda model: wished_bytes,
            memory_budget_bytes=budget_bytes,
            aliases={"gpt": "a"},
            named={"mine": local("mine")},
        )

    def _start(self, model: LocalModel, spare_bytes: int) -> FakeEngine:
        self.spare[model.id] = spare_bytes
        return FakeEngine(self, model.id)

    async def use(self, name: str) -> str:
        async with self.sources.hold(name) as held:
            return held.card.id


async def test_a_model_is_loaded_at_its_first_use_and_stays() -> None:
    yard = Yard()
    assert not yard.sources.ready
    assert [await yard.use("a") for _ in range(3)] == ["a", "a", "a"]
    assert yard.starts == ["a"]
    assert yard.sources.ready


async def test_first_asks_at_once_wait_for_one_load() -> None:
    yard = Yard()
    yard.may_start.clear()
    asks = [asyncio.create_task(yard.use("a")) for _ in range(10)]
    while not yard.starts:
        await asyncio.sleep(0)
    yard.may_start.set()
    assert await asyncio.gather(*asks) == ["a"] * 10
    assert yard.starts == ["a"]


async def test_an_ask_that_goes_does_not_stop_the_load_for_others() -> None:
    yard = Yard()
    yard.may_start.clear()
    leaving, staying = asyncio.create_task(yard.use("a")), asyncio.create_task(yard.use("a"))
    while not yard.starts:
        await asyncio.sleep(0)
    leaving.cancel()
    yard.may_start.set()
    assert await staying == "a"
    assert (yard.starts, yard.closes) == (["a"], [])


async def test_the_longest_unused_idle_model_makes_room() -> None:
    yard = Yard()
    for name in ("a", "b", "a", "c"):
        await yard.use(name)
    assert yard.closes == ["b"]
    assert set(yard.sources.engines()) == {"a", "c"}
    await yard.use("b")
    assert yard.closes == ["b", "a"]


async def test_a_model_that_answers_is_never_unloaded() -> None:
    yard = Yard()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(yard.sources.hold("a"))
        await yard.use("b")
        await yard.use("c")
        assert yard.closes == ["b"]
        await stack.enter_async_context(yard.sources.hold("c"))
        with pytest.raises(Overloaded) as caught:
            await yard.use("b")
        assert caught.value.limit == "memory"
    assert yard.closes == ["b"]
    assert await yard.use("b") == "b"


async def test_models_that_load_at_the_same_time_share_the_budget() -> None:
    yard = Yard()
    yard.may_start.clear()
    asks = [asyncio.create_task(yard.use(name)) for name in ("a", "b", "c")]
    await asyncio.wait([asks[2]])
    assert isinstance(asks[2].exception(), Overloaded)
    yard.may_start.set()
    assert await asyncio.gather(*asks[:2]) == ["a", "b"]
    assert await yard.use("c") == "c"


async def test_what_engines_keep_besides_counts_as_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second model finds what the first may fill, and gives up what it only wishes for."""
    yard = Yard(budget_bytes=7 * GIB // 2, wished_bytes=GIB)
    await yard.use("a")
    await yard.use("b")
    assert yard.spare == {"a": GIB, "b": GIB // 2}
    assert yard.closes == []
    await yard.use("c")
    assert yard.closes == ["a"], "there was no room for all three"
    assert yard.spare["c"] == GIB
    assert await yard.use("a") == "a"
    assert yard.closes == ["a", "b"]


async def test_nobody_gives_way_to_what_is_only_wished_for() -> None:
    yard = Yard(budget_bytes=2 * GIB, wished_bytes=GIB)
    yard.may_start.clear()
    asks = [asyncio.create_task(yard.use(name)) for name in ("a", "b")]
    await asyncio.wait([asks[1]])
    assert isinstance(asks[1].exception(), Overloaded), "what the first one was given is not free"
    yard.may_start.set()
    assert await asks[0] == "a"
    assert yard.spare == {"a": GIB}


async def test_a_failed_load_fails_its_asks_is_remembered_a_moment_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    yard = Yard()
    yard.failing["a"] = ModelUnusable("a.gguf", reason="cut off")
    for _ in range(3):
        with pytest.raises(ModelUnusable, match="cut off"):
            await yard.use("a")
    assert (yard.starts, yard.closes) == (["a"], ["a"])
    assert await yard.use("b") == "b"
    yard.failing.clear()
    monkeypatch.setattr("time.monotonic", lambda: float("inf"))
    assert await yard.use("a") == "a"


async def test_an_engine_that_is_given_up_is_loaded_anew_at_the_next_ask() -> None:
    yard = Yard()
    with pytest.raises(EngineFailed):
        async with yard.sources.hold("a") as held:
            assert isinstance(held.engine, FakeEngine)
            held.engine.given_up = True
            raise EngineFailed("It died too often.")
    assert yard.closes == ["a"]
    assert await yard.use("a") == "a"
    assert yard.starts == ["a", "a"]


async def test_an_engine_that_gave_up_while_nobody_asked_fails_nobody() -> None:
    yard = Yard()
    async with yard.sources.hold("a") as held:
        engine = held.engine
    assert isinstance(engine, FakeEngine)
    engine.given_up = True
    async with yard.sources.hold("a") as held:
        assert held.engine is not engine
    assert (yard.starts, yard.closes) == (["a", "a"], ["a"])


async def test_an_engine_that_refused_one_step_stays() -> None:
    yard = Yard()
    with pytest.raises(EngineFailed):
        async with yard.sources.hold("a"):
            raise EngineFailed("One step failed.")
    assert yard.closes == []


async def test_names_are_ids_aliases_and_what_the_operator_named() -> None:
    yard = Yard()
    assert await yard.use("gpt") == "a"
    assert await yard.use("mine") == "mine"
    assert [listed.id for listed in await yard.sources.list()] == ["mine", "a", "b", "c"]
    with pytest.raises(ModelNotFound) as caught:
        await yard.use("/etc/passwd.gguf")
    assert "installed: mine, a, b, c" in caught.value.message


async def test_closing_ends_what_loads_and_what_is_loaded() -> None:
    yard = Yard()
    await yard.use("a")
    yard.may_start.clear()
    loading = asyncio.create_task(yard.use("b"))
    while yard.starts != ["a", "b"]:
        await asyncio.sleep(0)
    await yard.sources.close()
    assert sorted(yard.closes) == ["a", "b"]
    with pytest.raises(asyncio.CancelledError):
        await loading


async def test_a_file_named_at_the_start_is_read_again_before_it_is_loaded_again(tmp_path: Path) -> None:
    """Its hash goes into receipts, and what it says of itself into the memory that is reserved."""
    hub = Hub(Settings(home=str(tmp_path / "home")), environment={})
    path = tiny_gguf.write("qwen2", tmp_path)
    before = hub.find(str(path))
    seen: list[LocalModel] = []
    yard = Yard()

    def start(model: LocalModel, _spare_bytes: int) -> FakeEngine:
        seen.append(model)
        return FakeEngine(yard, model.id)

    sources = Sources(
        shelf=hub,
        start_engine=start,
        memory_needed=lambda model: GIB,
        memory_wished=lambda model: 0,
        memory_budget_bytes=GIB,
        named={"mine": replace(before, id="mine"), "other": local("other")},
    )
    await sources.load("mine")
    other = tiny_gguf.write("qwen3", tmp_path)
    other.replace(path)
    await sources.load("other")  # there is room for one
    await sources.load("mine")
    await sources.close()
    assert [model.id for model in seen] == ["mine", "other", "mine"]
    assert seen[0].sha256 == before.sha256 != seen[2].sha256
    assert seen[2].facts.architecture == "qwen3"

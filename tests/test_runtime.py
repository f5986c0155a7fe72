"""What the parts are told when they are put together."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from nimbos.cli.measuring import require_memory
from nimbos.config import EngineSettings, ServerSettings, Settings
from nimbos.engine import Engine
from nimbos.errors import ModelUnusable
from nimbos.hub import Hub, LocalModel, ModelFacts
from nimbos.models import open_models, sequences_of, swap_bytes_of
from tests import tiny_gguf

CELLS = 4096


def model_with(facts: ModelFacts) -> LocalModel:
    return LocalModel(id="m", path=Path("m.gguf"), size_bytes=1, sha256="", source="", facts=facts)


@pytest.mark.parametrize(
    ("facts", "sequences", "expected"),
    [
        (ModelFacts(), 128, 128),
        (ModelFacts(state_bytes=7), 128, 16),
        (ModelFacts(state_bytes=7), 8, 8),
        (ModelFacts(kind="embed"), 32, 64),
        (ModelFacts(kind="embed", state_bytes=7), 128, 16),
    ],
)
def test_as_many_sequences_are_counted_as_the_engine_makes(facts: ModelFacts, sequences: int, expected: int) -> None:
    assert sequences_of(model_with(facts), EngineSettings(sequences=sequences)) == expected


@pytest.mark.parametrize(
    ("facts", "settings", "mebibytes"),
    [
        (ModelFacts(), EngineSettings(), 512),
        (ModelFacts(), EngineSettings(swap_memory_mib=7), 7),
        (ModelFacts(), EngineSettings(share_prefixes=False), 0),
        (ModelFacts(kind="embed"), EngineSettings(), 0),
        (ModelFacts(state_bytes=7), EngineSettings(), 0),
        (ModelFacts(window_tokens=7), EngineSettings(), 0),
    ],
)
def test_contexts_that_rest_are_counted_where_the_engine_keeps_them(
    facts: ModelFacts, settings: EngineSettings, mebibytes: int
) -> None:
    assert swap_bytes_of(model_with(facts), settings) == mebibytes * 2**20


async def test_an_engine_keeps_no_more_than_the_budget_leaves(tmp_path: Path) -> None:
    path = tiny_gguf.write("qwen2", tmp_path)
    settings = Settings(home=str(tmp_path / "home"), engine=EngineSettings(cells=CELLS, threads=1))
    hub = Hub(settings, environment={})
    model = hub.find(str(path))
    need = hub.check_memory(model, cells=CELLS, budget_bytes=1 << 40, sequences=settings.engine.sequences)
    memory_mib = need // 2**20 + 101
    settings = msgspec.structs.replace(settings, server=ServerSettings(memory_mib=memory_mib))
    models = open_models(settings, hub=hub, named={model.id: model}, first=model.id)
    try:
        assert models.loading is not None
        await models.loading
        engine = models.sources.engines()[model.id]
        assert isinstance(engine, Engine)
        assert engine._settings.engine.swap_memory_mib == 100
    finally:
        await models.close()


def test_the_states_of_a_recurrent_model_count_for_each_sequence(tmp_path: Path) -> None:
    hub = Hub(Settings(home=str(tmp_path / "home")), environment={})
    model = hub.find(str(tiny_gguf.write("qwen35", tmp_path)))
    assert model.facts.state_bytes
    need = hub.check_memory(model, cells=CELLS, budget_bytes=1 << 40, sequences=16)
    assert need == hub.check_memory(model, cells=CELLS, budget_bytes=1 << 40) + 15 * model.facts.state_bytes
    mebibytes = need // 2**20  # below the need, and above what a single sequence would need
    assert mebibytes * 2**20 < need
    settings = Settings(engine=EngineSettings(cells=CELLS), server=ServerSettings(memory_mib=mebibytes))
    with pytest.raises(ModelUnusable):
        require_memory(hub, model, settings)

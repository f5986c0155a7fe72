"""How much an engine takes: what is said before it starts is what it takes, also when it is only timed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nimbos.config import EngineSettings
from nimbos.engine import llama
from nimbos.engine.calibrate import SPREAD_ROWS, measuring_sequences
from nimbos.engine.llama import Library
from nimbos.engine.model import Model, ModelOptions
from nimbos.engine.sizes import choose_sequences
from nimbos.hub import Hub
from nimbos.models import sequences_of
from tests import tiny_gguf
from tests.engine.asking import settings_in


@pytest.mark.parametrize("arch", ["qwen35", "gemma3", "qwen2"])
def test_states_are_counted_before_they_are_made(arch: str, tmp_path: Path) -> None:
    path = tiny_gguf.write(arch, tmp_path)
    local = Hub(settings_in(tmp_path)).find(str(path))
    model = Model(Library(llama.wheel_library()), path, ModelOptions(cells=0, sequences=1, threads=1))
    try:
        for wanted in (1, 2, 8, 16, 17, 128):
            made = choose_sequences(model, wanted)
            if local.facts.state_bytes:
                assert (
                    made == measuring_sequences(model, wanted) == sequences_of(local, EngineSettings(sequences=wanted))
                )
            else:
                assert made >= wanted
                assert measuring_sequences(model, wanted) > SPREAD_ROWS
    finally:
        model.close()
    assert bool(local.facts.state_bytes) == (arch == "qwen35")

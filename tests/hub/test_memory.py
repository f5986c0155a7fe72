"""What a model needs, against what libllama says that it takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nimbos.config import EngineSettings, Settings
from nimbos.engine import llama
from nimbos.engine.llama import Library
from nimbos.engine.model import Model, ModelOptions
from nimbos.engine.worker import EMBED_STEP_TOKENS
from nimbos.errors import ModelUnusable
from nimbos.hub import Hub
from nimbos.hub.facts import read_gguf
from nimbos.hub.memory import memory_need, pass_tokens
from nimbos.models import check_memory
from tests import tiny_gguf

CELLS = 8192
MIB = 2**20
FIXED_BYTES = 64 * MIB


class Talking(Library):
    """Remembers what libllama says that it allocates for computing."""

    def __init__(self, path: Path) -> None:
        self.compute_bytes = 0.0
        super().__init__(path)

    def _keep_log(self, level: int, text: bytes | None, user: object) -> None:
        found = re.search(rb"compute buffer size = +([0-9.]+) MiB", text or b"")
        if found:
            self.compute_bytes = float(found[1]) * MIB
        super()._keep_log(level, text, user)


@pytest.fixture(scope="module")
def library() -> Talking:
    return Talking(llama.wheel_library())


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "whole"])
@pytest.mark.parametrize("arch", ["qwen2", "qwen3moe", "gemma3", "qwen35", "qwen3-embedding", "bert-embedding"])
def test_what_a_pass_takes_is_counted(arch: str, flash: bool, library: Talking, tmp_path: Path) -> None:
    path = tiny_gguf.write(arch, tmp_path)
    facts = read_gguf(path).facts
    step = 512 if facts.kind == "generate" else EMBED_STEP_TOKENS
    model = Model(
        library, path, ModelOptions(cells=CELLS, sequences=16, threads=1, step_tokens=step, flash_attention=flash)
    )
    try:
        model.open_context()
    finally:
        model.close()
    need = memory_need(facts, cells=CELLS, flash_attention=flash)
    counted = need.buffer_bytes - FIXED_BYTES - need.scores_bytes // 3  # that third is made when a pass first needs it
    assert library.compute_bytes <= counted < 1.5 * library.compute_bytes + 8 * MIB
    assert (need.scores_bytes > 0) is not flash


def test_the_numbers_without_flash_attention(tmp_path: Path) -> None:
    """4 heads, 256 rows of a pass, 6 bytes for each score; the mask has four bytes for each row and cell, not two."""
    facts = read_gguf(tiny_gguf.write("qwen2", tmp_path)).facts
    assert pass_tokens(facts) == ModelOptions(cells=1, sequences=1, threads=1).micro_tokens
    with_flash, without = (memory_need(facts, cells=50_000, flash_attention=flash) for flash in (True, False))
    assert without.scores_bytes == 4 * 256 * 50_000 * 6
    assert without.total_bytes - with_flash.total_bytes == without.scores_bytes + 256 * 50_000 * 2
    twice = memory_need(facts, cells=100_000, flash_attention=False)
    assert twice.scores_bytes == 2 * without.scores_bytes


def test_a_model_that_fits_only_with_flash_attention_is_refused_without_it(tmp_path: Path) -> None:
    hub = Hub(Settings(home=str(tmp_path / "home")), environment={})
    model = hub.find(str(tiny_gguf.write("qwen2", tmp_path)))
    with_flash = EngineSettings(cells=50_000)
    need = check_memory(hub, model, with_flash, budget_bytes=1 << 40)
    assert check_memory(hub, model, with_flash, budget_bytes=need) == need
    with pytest.raises(ModelUnusable) as caught:
        check_memory(hub, model, EngineSettings(cells=50_000, flash_attention=False), budget_bytes=need)
    assert "engine.flash_attention = true (307 MB less)" in caught.value.reason
    assert f"{need / 1e6:,.0f} MB may be used" in caught.value.reason

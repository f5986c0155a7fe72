"""How many cells of KV an engine takes."""

from __future__ import annotations

from nimbos.config import EngineSettings
from nimbos.engine.model import Model

CELL_STEP = 256  # libllama rounds a context up to this
CELLS_MIN = 2048
CELLS_MAX = 131_072


def choose_cells(model: Model, settings: EngineSettings) -> int:
    """The setting, or as many as fit in `kv_memory_mib`, at least one context of 2,048 and at most 131,072."""
    if settings.cells:
        return -(-settings.cells // CELL_STEP) * CELL_STEP
    fitting = settings.kv_memory_mib * 1024 * 1024 // max(1, model.kv_bytes_per_token)
    return max(CELLS_MIN, min(CELLS_MAX, fitting) // CELL_STEP * CELL_STEP)

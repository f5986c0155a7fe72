"""How many cells of KV an engine takes, and how many sequences."""

from __future__ import annotations

from nimbos.config import EngineSettings
from nimbos.engine.model import SEQUENCES_MAX, Model
from nimbos.types import Kind

CELL_STEP = 256  # libllama rounds a context up to this
CELLS_MIN = 2048
CELLS_MAX = 131_072
SHARING_SEQUENCES_MIN = 5
RECURRENT_SEQUENCES_MAX = 16
WHOLE_INPUTS_SEQUENCES = 64


def choose_cells(model: Model, settings: EngineSettings) -> int:
    """The setting, or as many as fit in `kv_memory_mib`, at least one context of 2,048 and at most 131,072."""
    if settings.cells:
        return -(-settings.cells // CELL_STEP) * CELL_STEP
    fitting = settings.kv_memory_mib * 1024 * 1024 // max(1, model.kv_bytes_per_token)
    return max(CELLS_MIN, min(CELLS_MAX, fitting) // CELL_STEP * CELL_STEP)


def choose_sequences(model: Model, wanted: int) -> int:
    """Ids in use: each costs a recurrent model a whole state, and others nothing. Where prefixes are shared, an ask may
    need one while others compute, one is pinned, and one holds the prefix that it is to go on with."""
    most = SEQUENCES_MAX if model.can_truncate else RECURRENT_SEQUENCES_MAX
    least = SHARING_SEQUENCES_MIN if model.shares_prefixes else 2
    return max(least, min(most, wanted if model.kind is Kind.GENERATE else WHOLE_INPUTS_SEQUENCES))

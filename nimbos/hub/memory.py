"""How much memory a model needs, before anything of it is loaded.
An estimate that errs upwards: weights are exact, the cache is exact for f16, the buffers of a step are bounded.

Without flash attention a pass makes whole matrices, of a score for each head, row and cell, and grows with the cells.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nimbos.errors import ModelUnusable
from nimbos.hub.facts import ModelFacts

_FIXED_BYTES = 64 << 20  # interpreter, library, tokenizer, graph
_STEP_TOKENS = 512
_PASS_TOKENS = 256  # of a generating model: libllama computes a longer step in several passes
_WHOLE_PASS_TOKENS = 2048  # of one that takes whole inputs
_F32, _F16 = 4, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """`scores_bytes`: of `buffer_bytes`, what a pass without flash attention needs for its matrices of scores."""

    weights_bytes: int
    cache_bytes: int
    buffer_bytes: int
    scores_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.buffer_bytes


def memory_need(
    facts: ModelFacts,
    *,
    cells: int,
    sequences: int = 1,
    step_tokens: int = _STEP_TOKENS,
    whole_window: bool = True,
    flash_attention: bool = True,
) -> MemoryNeed:
    """Bytes for `cells` tokens of KV. With `whole_window` (libllama's `swa_full`, which sharing needs) layers with a
    sliding window keep every cell; without, only their window for each sequence and one step more."""
    window_cells = cells if whole_window else min(cells, facts.window_tokens * sequences + step_tokens)
    cache = cells * facts.kv_bytes_per_cell + window_cells * facts.window_bytes_per_cell + sequences * facts.state_bytes
    rows = pass_tokens(facts)
    seen = cells if facts.keeps_cells else rows  # by each row
    layer = 8 * facts.embedding_size + 3 * facts.feed_forward_size
    scores = 0 if flash_attention else facts.heads * rows * seen * (_F32 + _F16)  # the softmax's input, and its copy
    mask = rows * seen * (_F16 if flash_attention else _F32)
    outputs = _F32 * step_tokens * facts.vocabulary
    buffers = outputs + _F32 * max(step_tokens, rows) * layer + mask + scores + _FIXED_BYTES
    return MemoryNeed(weights_bytes=facts.file_bytes, cache_bytes=cache, buffer_bytes=buffers, scores_bytes=scores)


def pass_tokens(facts: ModelFacts) -> int:
    """Rows that are computed at once, at most. Source: `engine/worker.py` and `engine/model.py`."""
    if facts.kind == "generate":
        return _PASS_TOKENS
    return min(_WHOLE_PASS_TOKENS, facts.context_tokens or _WHOLE_PASS_TOKENS)


def require_memory(
    path: Path,
    facts: ModelFacts,
    *,
    cells: int,
    budget_bytes: int,
    sequences: int = 1,
    flash_attention: bool = True,
) -> int:
    """The bytes needed. `sequences` matters to recurrent layers, which keep a state for each.

    Raises: ModelUnusable with the numbers when they are more than the budget.
    """
    need = memory_need(facts, cells=cells, sequences=sequences, flash_attention=flash_attention)
    if need.total_bytes > budget_bytes:
        flash = f"engine.flash_attention = true ({megabytes(need.scores_bytes)} less), " if need.scores_bytes else ""
        reason = (
            f"it needs about {megabytes(need.total_bytes)} of memory ({megabytes(need.weights_bytes)} of weights, "
            f"{megabytes(need.cache_bytes)} for {cells} cells of KV, {megabytes(need.buffer_bytes)} to compute) and "
            f"{megabytes(budget_bytes)} may be used. Choose a smaller model or quantisation, fewer cells "
            f"(engine.cells), {flash}or a larger server.memory_mib."
        )
        raise ModelUnusable(str(path), reason=reason)
    return need.total_bytes


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def machine_memory_bytes() -> int | None:
    """All of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None

"""Step time t(rows, cells) of one model with one library on one processor.

`StepTime` predicts, and is corrected by every step that runs, so the start never waits for a calibration. `measure`
does it thoroughly, for `nimbos bench` and for the limits in `bench/`. Source of the shape: our own measurements, see
`bench/RESULTS.md`.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nimbos.config import Settings

if TYPE_CHECKING:
    from nimbos.engine.model import Model

KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_PRIOR = (1.0, 1.7, 2.2, 2.5, 3.6, 4.4, 5.6, 6.8, 8.6, 11.2, 13, 15, 20, 26, 38, 50, 75, 100)  # × t(1)
_PRIOR_BYTES_PER_MS = 15e6  # weights that a small machine reads in a millisecond
_PRIOR_IDLE_NS = 3.8  # for a head of a layer to pass a cell that is masked, on one thread
SPREAD_ROWS = 32  # so many at most are of one sequence each
_LEARN = 0.15
_IDLE_COUNTS = 0.2  # of a step


class StepTimeTable(msgspec.Struct, kw_only=True):
    """What is kept between runs. `row_ms[i]`: milliseconds of a step of KNOTS[i] rows before any context;
    `seen[i]`: how many steps taught it; `cell_us`: microseconds for each cell that each row attends to; `idle_part`:
    of a step of one row, for each cell in use that a row does not attend to (0: not known); no time, so that on a busy
    machine it grows with the steps."""

    row_ms: list[float]
    seen: list[int]
    cell_us: float
    idle_part: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether it fits this release's knots and holds sane numbers."""
        numbers = [*self.row_ms, self.cell_us + 1e-9, self.idle_part + 1e-9]
        return len(self.row_ms) == len(self.seen) == len(KNOTS) and all(0 < n < 1e6 for n in numbers)


class StepTime:
    """Predicts the milliseconds of a step. Rows between knots are interpolated; what was never seen is the prior's
    shape, scaled by what was. `used_cells`: in the pool now; every row passes all of them."""

    def __init__(self, table: StepTimeTable) -> None:
        self.table = table
        self.used_cells = 0

    @classmethod
    def prior(cls, *, weight_bytes: int, kv_bytes_per_token: int, heads: int = 0, threads: int = 1) -> StepTime:
        """`heads`: of attention, in all layers together."""
        one = max(0.2, weight_bytes / _PRIOR_BYTES_PER_MS)
        cell_us = kv_bytes_per_token / _PRIOR_BYTES_PER_MS * 1e3
        idle_part = _PRIOR_IDLE_NS * heads / max(1, threads) / 1e6 / one
        row_ms = [one * f for f in _PRIOR]
        return cls(StepTimeTable(row_ms=row_ms, seen=[0] * len(KNOTS), cell_us=cell_us, idle_part=idle_part))

    def copy(self) -> StepTime:
        """One that does not learn with this one."""
        return StepTime(msgspec.json.decode(msgspec.json.encode(self.table), type=StepTimeTable))

    def predict(self, rows: int, cells: int) -> float:
        return self._base(rows) + self.table.cell_us * cells / 1e3 + self._idle_ms(rows, cells)

    def _idle_ms(self, rows: int, cells: int) -> float:
        return self.table.idle_part * self._base(1) * max(0, rows * self.used_cells - cells)

    def idle_cells(self, share: float) -> int:
        """How many of them make a step of one row longer by this share."""
        return int(share / self.table.idle_part) if self.table.idle_part > 0 else 1 << 30

    def _base(self, rows: int) -> float:
        row_ms = self.table.row_ms
        if rows >= KNOTS[-1]:
            return row_ms[-1] * rows / KNOTS[-1]
        i = bisect_right(KNOTS, rows) - 1
        share = (rows - KNOTS[i]) / (KNOTS[i + 1] - KNOTS[i])
        return row_ms[i] + share * (row_ms[i + 1] - row_ms[i])

    def observe(self, rows: int, cells: int, milliseconds: float) -> None:
        """Corrects the knots around `rows`. One outlier (a busy moment of the machine) moves them little."""
        base, idle_ms = self._base(rows), self._idle_ms(rows, cells)
        self._learn_idle(idle_ms, milliseconds / self.predict(rows, cells), base)
        seen_base = max(0.05 * milliseconds, milliseconds - self.table.cell_us * cells / 1e3 - idle_ms)
        i = min(bisect_right(KNOTS, rows) - 1, len(KNOTS) - 1)
        near = [i] if KNOTS[i] == rows or i + 1 == len(KNOTS) else [i, i + 1]
        first = not any(self.table.seen)
        ratio = seen_base / base
        for knot in near:
            fresh = self.table.seen[knot] < 3
            bounded = ratio if fresh else min(2.0, max(0.5, ratio))
            self.table.row_ms[knot] *= 1 + (0.5 if fresh else _LEARN) * (bounded - 1)
            self.table.seen[knot] += 1
        if first:
            for knot in range(len(KNOTS)):
                if knot not in near:
                    self.table.row_ms[knot] *= ratio
        self._keep_order()

    def _learn_idle(self, idle_ms: float, ratio: float, base_ms: float) -> None:
        """From steps in which idle cells count; the rows are corrected as well, each by its part."""
        part = idle_ms / (idle_ms + base_ms)
        if part > _IDLE_COUNTS:
            self.table.idle_part *= 1 + _LEARN * part * (min(2.0, max(0.5, ratio)) - 1)

    def _keep_order(self) -> None:
        """More rows never take less: a knot that was not seen gives way to one that was."""
        row_ms, seen = self.table.row_ms, self.table.seen
        for i in range(1, len(row_ms)):
            if row_ms[i] < row_ms[i - 1]:
                if seen[i] >= seen[i - 1]:
                    row_ms[i - 1] = row_ms[i]
                else:
                    row_ms[i] = row_ms[i - 1]
        for i in range(1, len(row_ms)):
            row_ms[i] = max(row_ms[i], row_ms[i - 1])


def measure_model(
    model: Model,
    *,
    contexts: tuple[int, ...] = (0, 2048),
    rows: tuple[int, ...] = KNOTS,
    repeats: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, int, float]]:
    """Times steps of a loaded model, up to `SPREAD_ROWS` rows as in decoding, more as in prefill; those for which it
    has too few sequences are left out. The pool must be empty, and is empty afterwards.

    Returns: (rows, cells each row attends to before the step, median milliseconds).
    """

    found: list[tuple[int, int, float]] = []
    spread_most = min(SPREAD_ROWS, model.options.sequences - 1)  # one holds the context
    counts = [m for m in rows if m <= model.options.step_tokens and not spread_most < m <= SPREAD_ROWS]
    for level, context in enumerate(contexts):
        with _context_of(model, context):
            for number, m in enumerate(counts, start=1):
                if context + m * (m <= SPREAD_ROWS) + m <= model.cells:
                    found.append((m, context, _time_step(model, m, context, repeats if m <= 64 else 1)))
                if progress:
                    progress(level * len(counts) + number, len(contexts) * len(counts))
    return found


def measuring_sequences(model: Model, wanted: int) -> int:
    """Enough to time steps of `SPREAD_ROWS` rows; of a recurrent model as many as an engine has, whose memory was
    checked."""
    from nimbos.engine.sizes import choose_sequences

    return choose_sequences(model, 2 * SPREAD_ROWS if model.can_truncate else wanted)


def _time_step(model: Model, m: int, context: int, repeats: int) -> float:
    """Median milliseconds of `m` rows; the first run warms up and is not counted."""
    from nimbos.engine.model import Rows

    step = (
        [Rows(sequence=1 + i, start=context, tokens=[10 + i], logits=True) for i in range(m)]
        if m <= SPREAD_ROWS
        else [Rows(sequence=1, start=context, tokens=[10 + i % 50 for i in range(m)], logits=True)]
    )
    times = []
    for _ in range(repeats + 1):
        for row in step:
            model.copy(0, row.sequence, context)
        start = time.perf_counter()
        model.decode(step)
        times.append((time.perf_counter() - start) * 1e3)
        for row in step:
            model.drop(row.sequence)
    return statistics.median(times[1:])


@contextmanager
def _context_of(model: Model, tokens: int) -> Iterator[None]:
    from nimbos.engine.model import Rows

    model.clear()
    step = model.options.step_tokens
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        model.decode([Rows(sequence=0, start=start, tokens=[10 + i % 50 for i in range(count)], logits=False)])
    yield
    model.clear()


def measure(
    model_path: Path, settings: Settings, *, contexts: tuple[int, ...] = (0, 2048), repeats: int = 3
) -> list[tuple[int, int, float]]:
    """Loads a model in this process and times it, with the library and the threads that the engine would use.

    Returns: (rows, cells each row attends to before the step, median milliseconds).
    """
    from nimbos.engine.library import candidates, quiet_environment, thread_count
    from nimbos.engine.llama import open_library
    from nimbos.engine.model import Model, ModelOptions

    quiet_environment()
    library, _ = open_library(candidates(settings))
    options = ModelOptions(
        cells=max(contexts) + 1024,
        sequences=1,
        threads=thread_count(settings.engine),
        flash_attention=settings.engine.flash_attention,
    )
    model = Model(library, model_path, options)
    model.options = replace(options, sequences=measuring_sequences(model, settings.engine.sequences))
    model.open_context()
    try:
        return measure_model(model, contexts=contexts, repeats=repeats)
    finally:
        model.close()


def table_from(found: list[tuple[int, int, float]], prior: StepTime) -> StepTimeTable:
    """A table of measured values: knots at the shortest context, the cells' part from the longest against it."""
    shortest, longest = min(c for _, c, _ in found), max(c for _, c, _ in found)
    base = {rows: ms for rows, c, ms in found if c == shortest}
    deep = {rows: ms for rows, c, ms in found if c == longest}
    span = longest - shortest
    per_cell = [(deep[m] - base[m]) / (m * span) * 1e3 for m in base if span and m in deep and m <= SPREAD_ROWS]
    cell_us = max(0.0, statistics.median(per_cell)) if per_cell else prior.table.cell_us
    row_ms = [max(0.01, base.get(m, prior.table.row_ms[i]) - cell_us * m * shortest / 1e3) for i, m in enumerate(KNOTS)]
    return StepTimeTable(row_ms=row_ms, seen=[8 if m in base else 0 for m in KNOTS], cell_us=cell_us)

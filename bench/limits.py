"""What the hardware allows: t(rows, cells) of this model, library and processor, and what follows from it.

`python -m bench.limits …` measures in a process of its own, so that no second engine lives while a server is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.setup import Setup, from_arguments, parser

MEASURE_LIMIT_S = 600.0
STEP_TOKENS = 512
Point = tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Milliseconds of one pass, by (rows, cells that each row attends to before the pass)."""

    points: tuple[Point, ...]

    def at(self, rows: int, cells: int) -> float:
        """Linear between the measured points; outside of them the nearest two go on as a line, rows past the largest
        measured batch as several batches."""
        levels = sorted({level for _, level, _ in self.points})
        known = [self._at_level(rows, level) for level in levels]
        if len(levels) == 1:
            return known[0]
        after = min(max(bisect_left(levels, cells), 1), len(levels) - 1)
        (left, right), (low, high) = levels[after - 1 : after + 1], known[after - 1 : after + 1]
        return max(0.0, low + (high - low) * (cells - left) / (right - left))

    def _at_level(self, rows: int, level: int) -> float:
        line = sorted((count, ms) for count, cells, ms in self.points if cells == level)
        most = line[-1][0]
        if rows > most:
            return (rows // most) * line[-1][1] + (self._at_level(rows % most, level) if rows % most else 0.0)
        counts, times = zip(*line, strict=True)
        return float(np.interp(rows, counts, times))

    def prefill_ms(self, tokens: int, *, after: int = 0) -> float:
        """Of `tokens` new ones of one sequence behind `after` cells, in full steps."""
        steps = ((start, min(STEP_TOKENS, tokens - start)) for start in range(0, tokens, STEP_TOKENS))
        return sum(self.at(rows, after + start) for start, rows in steps)

    def decode_ms(self, steps: int, *, rows: int, cells: int) -> float:
        """`cells`: that each row attends to in the first of these steps; one more in each."""
        return steps * self.at(rows, cells + steps // 2)

    def fan_out_ms(self, *, shared: int, branches: int, own: int, out: int) -> float:
        """(S + N·U) / pp + O · t(N): every token computed once, all branches decoded together. The first token of an
        answer needs no step of its own: it comes with the last one of the prompt."""
        full, rest = divmod(branches * own, STEP_TOKENS)
        unique = full * self.at(STEP_TOKENS, shared) + (self.at(rest, shared) if rest else 0.0)
        return self.prefill_ms(shared) + unique + self.decode_ms(out - 1, rows=branches, cells=shared + own)

    def alone_ms(self, *, cached: int, new: int, out: int) -> float:
        """One ask, nothing beside it."""
        return self.prefill_ms(new, after=cached) + self.decode_ms(out - 1, rows=1, cells=cached + new)

    def shown(self) -> str:
        rows = sorted({count for count, _, _ in self.points})
        levels = sorted({level for _, level, _ in self.points})
        table = "; ".join(
            f"{count}: {' / '.join(f'{self.at(count, level):.1f}' for level in levels)}" for count in rows
        )
        return f"calibration t(rows) in ms at {' / '.join(map(str, levels))} cells: {table}"


async def measured(setup: Setup) -> StepTimes | None:
    """None when the setup skips it. Raises: RuntimeError when the measuring process fails."""
    if not setup.limits:
        return None
    command = [sys.executable, "-m", "bench.limits", "--model", str(setup.model), "--threads", str(setup.threads)]
    if setup.library is not None:
        command += ["--library", str(setup.library)]
    if not setup.flash_attention:
        command += ["--no-flash-attention"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        output, _ = await asyncio.wait_for(process.communicate(), MEASURE_LIMIT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise RuntimeError(f"The calibration ended with {process.returncode}; --no-limits goes on without it.")
    return step_times(json.loads(output.decode().splitlines()[-1]))


def step_times(points: Sequence[Sequence[float]]) -> StepTimes:
    return StepTimes(tuple((int(rows), int(cells), float(ms)) for rows, cells, ms in points))


def main() -> None:
    from nimbos.config import EngineSettings, Settings
    from nimbos.engine.calibrate import measure

    setup = from_arguments(parser("Measure t(rows, cells) and print it as JSON.").parse_args())
    engine = EngineSettings(
        library=str(setup.library or ""), threads=setup.threads, flash_attention=setup.flash_attention
    )
    print(json.dumps(measure(setup.model, Settings(engine=engine, home=str(setup.work)))))


if __name__ == "__main__":
    main()

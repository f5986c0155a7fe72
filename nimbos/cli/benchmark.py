"""What `nimbos bench` does: calibrate in a process of its own, keep the table for later engines, then ask an engine
in a temporary home, so that nothing of the real one is touched but that table."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import msgspec

from nimbos import __version__
from nimbos.cli.interruptible import run_interruptible
from nimbos.cli.machine import WATCH_S, busy_share
from nimbos.cli.measuring import BUSY_SHARE, CPU_SHARE_MIN, Bar, libraries, library_name, time_library
from nimbos.cli.probe import Timed, Timing
from nimbos.cli.workload import QUICK, Decode, FanOut, Prefill, Size, Workload
from nimbos.config import Settings
from nimbos.engine import Engine
from nimbos.engine.calibrate import KNOTS, StepTimeTable
from nimbos.engine.library import thread_count
from nimbos.engine.memo import StepTimes, head_hash
from nimbos.errors import EngineFailed, ModelUnusable
from nimbos.hub import LocalModel

DEEP_CELLS, DEEP_ROWS = 2048, (1, 4, 16)  # where the cost of a long context is read off
QUICK_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """t(rows, cells): `milliseconds` of a step of `rows` rows, when each attends to `cells` cells before it."""

    rows: int
    cells: int
    milliseconds: float


class EngineSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """`load_s`: from starting the process until it can answer. `overhead_share`: of the forward passes' time, what
    Python adds around them."""

    threads: int
    cells: int
    load_s: float
    first_token_ms: float
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]
    fan_out: FanOut | None
    overhead_share: float


class Results(msgspec.Struct, kw_only=True):
    """`busy_share`: of the cores, what others had before; `cpu_share`: what the calibration really got of them.
    `table`: the file where engines will find the calibration, None when it was not kept."""

    nimbos: str
    model: str
    quick: bool
    library: str
    library_path: str
    engine: EngineSpeed
    calibration: tuple[Calibration, ...]
    busy_share: float | None
    cpu_share: float
    table: str | None
    warnings: tuple[str, ...] = ()


def run(settings: Settings, model: LocalModel, *, quick: bool, bar: Bar) -> Results:
    """Raises: ModelUnusable, EngineFailed. Whatever ends it, its processes and its temporary home are gone."""
    busy = busy_share(WATCH_S)
    path, timed = _calibrate(settings, model, quick=quick, bar=bar)
    model_hash = model.sha256 or head_hash(model.path)
    with tempfile.TemporaryDirectory(prefix="nimbos-bench-") as home:
        own = msgspec.structs.replace(
            settings, home=home, engine=msgspec.structs.replace(settings.engine, library=str(path))
        )
        _keep(StepTimes(own, model_hash), timed.table)
        engine = Engine(model_path=model.path, model_id=model.id, settings=own, model_hash=model_hash)
        speed = run_interruptible(_ask(engine, QUICK if quick else Size(), bar))
    results = Results(
        nimbos=__version__,
        model=model.id,
        quick=quick,
        library=library_name(path),
        library_path=str(path),
        engine=speed,
        calibration=tuple(Calibration(rows=r, cells=c, milliseconds=ms) for r, c, ms in timed.points),
        busy_share=busy,
        cpu_share=timed.cpu_share,
        table=_keep(StepTimes(settings, model_hash), timed.table) if timed.cpu_share >= CPU_SHARE_MIN else None,
    )
    results.warnings = _warnings(results)
    return results


def _calibrate(settings: Settings, model: LocalModel, *, quick: bool, bar: Bar) -> tuple[Path, Timed]:
    """With the first library that can, as the engine itself chooses."""
    deep = min(DEEP_CELLS, model.facts.context_tokens // 2)
    timing = Timing(
        model=str(model.path),
        threads=thread_count(settings.engine),
        rows=QUICK_ROWS if quick else KNOTS,
        deep_rows=() if quick else DEEP_ROWS,
        deep_cells=0 if quick else deep,
        step_tokens=settings.engine.max_step_tokens,
        sequences=settings.engine.sequences,
        repeats=1 if quick else 3,
        flash_attention=settings.engine.flash_attention,
    )
    reasons = []
    for choice in libraries(settings):
        if not choice.own:
            break
        answer = time_library(choice.path, timing, bar, f"Step times with {library_name(choice.path)}")
        if isinstance(answer, Timed):
            return choice.path, answer
        if answer.model:
            raise ModelUnusable(str(model.path), reason=answer.reason)
        reasons.append(f"{choice.path}: {answer.reason}")
    raise EngineFailed(f"No libllama here could time {model.id}: " + " | ".join(reasons))


def _keep(times: StepTimes, table: StepTimeTable | None) -> str | None:
    """Where it is kept; None where there is none or it could not be."""
    if table is None:
        return None
    encoded = msgspec.json.encode(table)
    times.save(encoded)
    return str(times.path) if times.load() == encoded else None


async def _ask(engine: Engine, size: Size, bar: Bar) -> EngineSpeed:
    bar.begin("Loading")
    begun = time.perf_counter()
    try:
        await engine.start()
        load_s = time.perf_counter() - begun
        assert engine.ready is not None
        workload = Workload(engine, size)
        await workload.start()
        before = await workload.stats()
        bar.begin("First token")
        first_token_s = await workload.first_token_s()
        bar.begin("Decode")  # before the prompts that stay in memory afterwards
        decode = await workload.decode()
        bar.begin("Prefill")
        prefill = await workload.prefill()
        bar.begin("Fan-out")
        fan_out = await workload.fan_out()
        after = await workload.stats()
        return EngineSpeed(
            threads=engine.ready.threads,
            cells=engine.ready.cells,
            load_s=load_s,
            first_token_ms=first_token_s * 1e3,
            prefill=prefill,
            decode=decode,
            fan_out=fan_out,
            overhead_share=(after.overhead_seconds_sum - before.overhead_seconds_sum)
            / (after.step_seconds_sum - before.step_seconds_sum),
        )
    finally:
        await engine.close()


def _warnings(results: Results) -> tuple[str, ...]:
    found = []
    if results.busy_share is not None and results.busy_share > BUSY_SHARE:
        found.append(
            f"The machine is overcommitted: other processes took {results.busy_share:.0%} of its cores before."
        )
    if results.cpu_share < CPU_SHARE_MIN:
        found.append(
            f"Only {results.cpu_share:.0%} of the cores' time was to be had while calibrating, so the numbers are too "
            "low, and the step times are not kept."
        )
    return tuple(found)

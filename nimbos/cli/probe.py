"""A child process that opens one libllama and, given a model, times it: `python -m nimbos.cli.probe ORDER`.

Each library gets a process of its own: two in one would share symbols, and one that crashes takes nobody along. What
is found goes to stdout, one JSON object a line. Read `measuring.py` for the parent's side.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nimbos.engine import confine
from nimbos.engine.calibrate import StepTime, StepTimeTable, measure_model, measuring_sequences, table_from
from nimbos.engine.llama import Library
from nimbos.errors import EngineFailed, ModelUnusable

if TYPE_CHECKING:
    from nimbos.engine.model import Model

REPEATS_MIN, REPEATS_MAX = 3, 25
TIMING_S = 4.0  # about how long the repeats take together

Point = tuple[int, int, float]  # rows, cells each row attends to before the step, median milliseconds


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of `rows` rows before any context, and of `deep_rows` that each attend to `deep_cells` cells: they take
    much longer, and a few tell what a cell costs. `sequences`: of an engine with these settings. `repeats`: None takes
    as many as fit in a few seconds."""

    model: str
    threads: int
    rows: tuple[int, ...]
    step_tokens: int
    sequences: int
    deep_rows: tuple[int, ...] = ()
    deep_cells: int = 0
    repeats: int | None = None
    flash_attention: bool = True


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """`library`: a folder or one shared object. Without `timing` it is only opened."""

    library: str
    timing: Timing | None = None


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag="opened"):
    """`tier`: the confinement that this process reached; `holds`: a file that it may not read was refused."""

    variant: str
    features: str
    tier: str
    holds: bool


class Timed(msgspec.Struct, frozen=True, kw_only=True, tag="timed"):
    """`table`: for engines; only with deep rows, and where the model can share prefixes. `cpu_share`: of cores × time,
    what this process really computed; less means that others had the cores."""

    points: list[Point]
    table: StepTimeTable | None
    cpu_share: float


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """With `model`, it is the model that does not fit, and not the library."""

    reason: str
    model: bool = False


class Step(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    done: int
    total: int


Message = Opened | Timed | Refused | Step


def say(message: Message) -> None:
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
    sys.stdout.flush()


def look(library: Library) -> Opened:
    """Confines this process for good."""
    features, tier = library.features, confine.confine([])
    try:
        Path(__file__).read_bytes()
        holds = False
    except PermissionError:
        holds = True
    return Opened(variant=library.variant, features=features, tier=tier, holds=holds)


def measure(library: Library, timing: Timing) -> Timed:
    """Loads the model, confines this process as an engine's is, and times steps.

    Raises: ModelUnusable, EngineFailed.
    """
    from nimbos.engine.model import Model, ModelOptions

    path = Path(timing.model)
    options = ModelOptions(
        cells=timing.deep_cells + max(1024, timing.step_tokens),
        sequences=1,
        threads=timing.threads,
        step_tokens=timing.step_tokens,
        flash_attention=timing.flash_attention,
    )
    model = Model(library, path, options)
    model.options = replace(options, sequences=measuring_sequences(model, timing.sequences))
    confine.confine([path, library.folder, *confine.code_paths()])
    model.open_context()
    try:
        begun, begun_cpu = time.perf_counter(), time.process_time()
        points = _points(model, timing)
        share = (time.process_time() - begun_cpu) / ((time.perf_counter() - begun) * timing.threads)
        prior = StepTime.prior(weight_bytes=model.weight_bytes, kv_bytes_per_token=model.kv_bytes_per_token)
        table = table_from(points, prior) if any(cells for _, cells, _ in points) else None
        return Timed(points=points, table=table, cpu_share=min(1.0, share))
    finally:
        model.close()


def _points(model: Model, timing: Timing) -> list[Point]:
    repeats = timing.repeats or _affordable_repeats(model, timing)
    deep_rows = timing.deep_rows if model.shares_prefixes else ()  # a deep step copies its context to each row
    total = len(timing.rows) + len(deep_rows)

    def at(done: int, _: int) -> None:
        say(Step(done=done, total=total))

    def at_deep(done: int, _: int) -> None:
        say(Step(done=len(timing.rows) + done, total=total))

    points = measure_model(model, contexts=(0,), rows=timing.rows, repeats=repeats, progress=at)
    if deep_rows:
        deep = (timing.deep_cells,)
        points += measure_model(model, contexts=deep, rows=deep_rows, repeats=repeats, progress=at_deep)
    return points


def _affordable_repeats(model: Model, timing: Timing) -> int:
    once = measure_model(model, contexts=(0,), rows=timing.rows, repeats=1)
    total_s = sum(milliseconds for _, _, milliseconds in once) / 1e3
    return max(REPEATS_MIN, min(REPEATS_MAX, int(TIMING_S / max(1e-6, total_s))))


def main() -> None:
    confine.die_with_parent()
    order = msgspec.json.decode(sys.argv[1], type=Order)
    try:
        library = Library(Path(order.library))
        say(look(library) if order.timing is None else measure(library, order.timing))
    except ModelUnusable as error:
        say(Refused(reason=error.reason, model=True))
    except (EngineFailed, OSError) as error:
        say(Refused(reason=str(error)))


if __name__ == "__main__":
    main()

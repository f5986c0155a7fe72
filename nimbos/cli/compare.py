"""How fast each libllama here runs a model: measured one after the other, in a fresh process each, in the order
A B B A, so that a machine that slows down meanwhile slows all of them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median

import msgspec

from nimbos.cli.measuring import CPU_SHARE_MIN, Bar, library_name, time_library
from nimbos.cli.probe import Timed, Timing
from nimbos.config import Settings
from nimbos.engine.library import thread_count
from nimbos.hub import LocalModel

PREFILL_ROWS, DECODE_ROWS = 128, (1, 8)
NOISE = 1.03  # a ratio between two runs that means nothing


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens/s of steps with so many rows (128 of one sequence: prefill; fewer, of one sequence each: decode).
    `ratio`: against the library that is used, None when that one cannot run the model."""

    rows: int
    tokens_per_second: float
    ratio: float | None


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    library: str
    used: bool
    speeds: tuple[Speed, ...] = ()
    refused: str = ""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """`order`: in which the libraries ran. `cpu_share`: the least that any run had of the cores' time."""

    model: str
    threads: int
    order: tuple[str, ...]
    libraries: tuple[Measured, ...]
    cpu_share: float | None

    @property
    def contended(self) -> bool:
        return self.cpu_share is not None and self.cpu_share < CPU_SHARE_MIN


def compare(settings: Settings, model: LocalModel, paths: list[Path], bar: Bar) -> Comparison:
    """`paths`: the library that is used, then the others."""
    rows = tuple(r for r in (*DECODE_ROWS, PREFILL_ROWS) if r <= settings.engine.max_step_tokens)
    timing = Timing(
        model=str(model.path),
        threads=thread_count(settings.engine),
        rows=rows,
        step_tokens=settings.engine.max_step_tokens,
        sequences=settings.engine.sequences,
        flash_attention=settings.engine.flash_attention,
    )
    times: dict[Path, dict[int, list[float]]] = {path: defaultdict(list) for path in paths}
    refused: dict[Path, str] = {}
    shares = []
    order = [*paths, *reversed(paths)]
    for number, path in enumerate(order):
        if path in refused:
            continue
        answer = time_library(path, timing, bar, f"{library_name(path)} ({number + 1} of {len(order)})")
        if isinstance(answer, Timed):
            shares.append(answer.cpu_share)
            for count, _, milliseconds in answer.points:
                times[path][count].append(milliseconds)
        else:
            refused[path] = answer.reason
    own = paths[0]
    return Comparison(
        model=model.id,
        threads=timing.threads,
        order=tuple(library_name(path) for path in order),
        libraries=tuple(
            Measured(library=library_name(path), used=path == own, refused=refused[path])
            if path in refused
            else Measured(library=library_name(path), used=path == own, speeds=_speeds(times[path], times[own]))
            for path in paths
        ),
        cpu_share=min(shares, default=None),
    )


def _speeds(times: dict[int, list[float]], own: dict[int, list[float]]) -> tuple[Speed, ...]:
    return tuple(
        Speed(
            rows=rows,
            tokens_per_second=rows * 1e3 / median(milliseconds),
            ratio=median(own[rows]) / median(milliseconds) if own.get(rows) else None,
        )
        for rows, milliseconds in times.items()
    )


def verdict(comparison: Comparison) -> list[str]:
    """One sentence for each other library, in words. Other programs do not slow all libraries alike, so beside them
    there is none."""
    if comparison.contended:
        return ["Other programs had too much of the cores to say which is faster. Try again when they are idle."]
    found = []
    for other in comparison.libraries:
        if other.used:
            continue
        if other.refused:
            found.append(f"{other.library} cannot run this model: {other.refused}")
            continue
        ratios = {step_name(speed.rows): speed.ratio for speed in other.speeds if speed.ratio is not None}
        gains = [f"{name} {ratio:.2f}×" for name, ratio in ratios.items() if ratio > NOISE]
        losses = [f"{name} {ratio:.2f}×" for name, ratio in ratios.items() if ratio < 1 / NOISE]
        if not ratios:
            found.append(f"{other.library} runs this model; the one that is used does not.")
        elif gains:
            but = f", and lose in {', '.join(losses)}" if losses else ""
            found.append(f"{other.library} would gain here: {', '.join(gains)}{but}.")
        else:
            found.append(f"{other.library} would gain nothing here" + (f": {', '.join(losses)}." if losses else "."))
    return found


def step_name(rows: int) -> str:
    return f"prefill of {rows}" if rows == PREFILL_ROWS else f"decode of {rows}"

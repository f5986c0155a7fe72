"""`nimbos bench`: the numbers of this machine, and the step times that engines start with from then on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nimbos.cli.benchmark import Calibration, Results


def bench(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Without it: the default model, or the first that is installed.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Shorter and rougher; step times are not kept for engines.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure although a server has models loaded.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
) -> None:
    """Measure how fast a model runs on this machine, and calibrate its engine."""
    import msgspec

    from nimbos.cli import running
    from nimbos.cli.benchmark import run
    from nimbos.cli.measuring import Bar, choose_model, require_memory, require_quiet, shown
    from nimbos.cli.serve import configure_logs
    from nimbos.config import load
    from nimbos.hub import Hub

    configure_logs(enabled=False)
    settings = load()
    hub = Hub(settings)
    chosen = choose_model(hub, model)
    require_quiet(running.look(settings), force=force)
    require_memory(hub, chosen, settings)
    with Bar() as bar:
        results = run(settings, chosen, quick=quick, bar=bar)
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(results), indent=2).decode() + "\n")
    else:
        sys.stdout.writelines(shown(line) for line in _report(results))


def _report(results: Results) -> list[str]:
    from nimbos.cli.measuring import rate

    speed = results.engine
    lines = [
        f"{results.model} with {results.library}, {speed.threads} threads, {speed.cells:,} cells of KV",
        "",
        f"  Load                     {speed.load_s:.2f} s",
        f"  First token              {speed.first_token_ms:,.0f} ms after a short prompt",
    ]
    lines += [f"  Prefill of {p.tokens:<4}          {rate(p.tokens_per_second)}" for p in speed.prefill]
    lines += [f"  Decode, {d.rows:>2} at a time      {rate(d.tokens_per_second)}" for d in speed.decode]
    if (fan := speed.fan_out) is not None:
        lines.append(
            f"  Fan-out                  {fan.gain:.1f}×: {fan.branches} answers that share {fan.shared_tokens} tokens "
            f"in {fan.shared_s:.2f} s, computed apart in {fan.apart_s:.2f} s"
        )
    lines += [
        f"  Around the computing     {speed.overhead_share:.1%} of its time",
        "",
        *_table(results.calibration),
        "",
        f"Engines of this model start with these step times ({results.table})."
        if results.table
        else "These step times are not kept for engines.",
    ]
    return [*lines, *(f"Warning: {warning}" for warning in results.warnings)]


def _table(calibration: tuple[Calibration, ...]) -> list[str]:
    levels = sorted({point.cells for point in calibration})
    times = {(point.rows, point.cells): point.milliseconds for point in calibration}
    lines = ["  Milliseconds of a step   " + "".join(f"{f'{level:,} cells':>14}" for level in levels)]
    for rows in sorted({point.rows for point in calibration}):
        cells = (f"{times[rows, level]:>14,.2f}" if (rows, level) in times else " " * 14 for level in levels)
        lines.append(f"  {rows:>8} rows            " + "".join(cells))
    return lines

"""`nimbos doctor`: what Nimbos has here, what is wrong with it, and what another library would gain, measured."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nimbos.cli.checkup import Checkup, LibraryFacts
    from nimbos.cli.compare import Comparison
    from nimbos.config import Settings
    from nimbos.hub import Hub


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Measure with this one; without it, the default or first model.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only look; measure nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure although a server has models loaded.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
) -> None:
    """Check this installation, and measure what another library would gain. Exit code 1 when no model could run."""
    import msgspec

    from nimbos.cli import checkup
    from nimbos.cli.measuring import choose_model, shown
    from nimbos.config import load
    from nimbos.hub import Hub

    settings = load()
    hub = Hub(settings)
    if model is not None:
        choose_model(hub, model)  # a wrong name is said before anything takes time
    found = checkup.look(settings, hub)
    if quick:
        found.not_measured = "--quick was given."
    else:
        _measure(settings, hub, found, model=model, force=force)
    found.warnings = checkup.warnings(found)
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n")
    else:
        sys.stdout.writelines(shown(line) for line in _report(found))
    raise typer.Exit(0 if found.library is not None else 1)


def _measure(settings: Settings, hub: Hub, found: Checkup, *, model: str | None, force: bool) -> None:
    """Fills in `comparison`, or why there is none. Raises: NimbosError for a named model that cannot be measured."""
    from pathlib import Path

    from nimbos.cli.compare import compare
    from nimbos.cli.measuring import Bar, choose_model, require_memory, require_quiet
    from nimbos.errors import NimbosError

    usable = sorted((library for library in found.libraries if not library.refused), key=lambda each: not each.used)
    if len(usable) < 2:
        found.not_measured = "There is no second library here to compare with; `nimbos engine install` may bring one."
        return
    try:
        chosen = choose_model(hub, model)
        require_quiet(found.server, force=force)
        require_memory(hub, chosen, settings)
    except NimbosError as error:
        if model is not None:
            raise
        found.not_measured = error.message
        return
    with Bar() as bar:
        found.comparison = compare(settings, chosen, [Path(library.path) for library in usable], bar)


def _report(found: Checkup) -> list[str]:
    machine, tools, server = found.machine, found.tools, found.server
    lines = [
        f"Nimbos       {found.nimbos}, home {found.home}",
        f"Python       {found.python}",
        f"Machine      {machine.processor}, {machine.system}",
        f"Cores        {machine.usable_cores} of {machine.cores}{_busy(machine.busy_share)}",
        f"Memory       {_gigabytes(machine.memory_free_bytes)} free of {_gigabytes(machine.memory_bytes)}",
        f"Disk         {_gigabytes(machine.disk_free_bytes)} free",
        f"Clients      npm: {tools.npm or 'none'}; pip: {'there' if tools.pip else 'none'}",
    ]
    lines += [f"Private      {secret.path}, mode {secret.mode}" for secret in found.secrets]
    if server is None:
        lines.append("Server       none is running")
    elif server.reachable:
        loaded = "not known" if server.loaded is None else ", ".join(server.loaded) or "none"
        lines.append(f"Server       {server.url}, process {server.pid}; models loaded: {loaded}")
    lines += [
        f"Model        {m.id}, {m.size_bytes / 1e6:,.0f} MB{f', {m.quantisation}' if m.quantisation else ''}"
        for m in found.models
        if m.problem is None
    ] or ["Model        none is installed"]
    for library in found.libraries:
        lines += _about(library)
    lines += ["", *_measured(found.comparison)] if found.comparison else ["", f"Not measured: {found.not_measured}"]
    lines += ["", *(f"Warning: {warning}" for warning in found.warnings)] if found.warnings else ["", "All is well."]
    return lines


def _about(library: LibraryFacts) -> list[str]:
    if library.refused:
        return [f"Library      {library.name} is refused: {library.refused}"]
    variant = f", variant {library.variant}" if library.variant else ""
    lines = [
        f"Library      {library.name}{variant}{' (engines run on this one)' if library.used else ''}",
        f"               at {library.path}",
        f"               uses {' '.join(library.features) or 'nothing special of this processor'}",
    ]
    if library.unused:
        lines.append(f"               leaves {' '.join(library.unused)}, which this processor has")
    if library.used:
        holds = "; a forbidden file was refused" if library.confined else ""
        lines.append(f"Confinement  {library.tier}{holds}")
    return lines


def _measured(comparison: Comparison) -> list[str]:
    from nimbos.cli.compare import step_name, verdict
    from nimbos.cli.measuring import rate

    lines = [
        f"{comparison.model} on {comparison.threads} threads, in the order {', '.join(comparison.order)}; medians:"
    ]
    for library in comparison.libraries:
        speeds = "   ".join(
            f"{step_name(s.rows)} {rate(s.tokens_per_second)}"
            + ("" if library.used or s.ratio is None else f" ({s.ratio:.2f}×)")
            for s in library.speeds
        )
        lines.append(f"  {library.library}: {speeds or library.refused}")
    return [*lines, *(f"  {sentence}" for sentence in verdict(comparison))]


def _busy(share: float | None) -> str:
    return "" if share is None else f", {share:.0%} of their time in use by others just now"


def _gigabytes(count: int | None) -> str:
    return "not known" if count is None else f"{count / 1e9:,.1f} GB"

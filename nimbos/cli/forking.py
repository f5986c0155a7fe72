"""`nimbos fork`, `adopt`, `drop`, `replay`: what else could have come of a process."""

from __future__ import annotations

from typing import Annotated

import typer

from nimbos.cli.processes import PID

_PATIENCE_S = 600.0


def register(app: typer.Typer) -> None:
    for command in (fork, adopt, drop):
        app.command()(command)


def fork(
    pid: PID,
    at: Annotated[
        int | None, typer.Option(min=1, help="The event after which it goes its own way; else the last.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=64, help="How many.")] = 1,
) -> None:
    """Fork a process; prints the forks' ids. What they do outside is withheld until one is adopted."""
    from nimbos import config
    from nimbos.cli.remote import Remote, place

    with Remote(config.load()) as remote:
        found = remote.post(place(remote.find(pid), "fork"), {"at": at, "n": n}, timeout_s=_PATIENCE_S)
    for one in found["data"]:
        typer.echo(one["id"])


def adopt(pid: PID) -> None:
    """Make a fork real: what it does outside from now on is done."""
    from nimbos import config
    from nimbos.cli.remote import Remote, place

    with Remote(config.load()) as remote:
        whole = remote.find(pid)
        remote.post(place(whole, "adopt"))
    typer.echo(f"{whole} is adopted.")


def drop(pid: PID) -> None:
    """End a fork that is not wanted, and what it began."""
    from nimbos import config
    from nimbos.cli.remote import Remote, place

    with Remote(config.load()) as remote:
        whole = remote.find(pid)
        remote.delete(place(whole))
    typer.echo(f"{whole} is dropped.")

"""`nimbos engine install`: a libllama made for this processor."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class LibrarySource(StrEnum):
    NPM = "npm"
    BUILD = "build"


def register(app: typer.Typer) -> None:
    engine = typer.Typer(no_args_is_help=True, help="The library that runs models.")
    engine.callback()(_engine)
    engine.command()(install)
    app.add_typer(engine, name="engine")


def _engine() -> None:
    """The library that runs models."""


def install(
    *,
    if_possible: Annotated[
        bool, typer.Option("--if-possible", help="Without npm, say what is used instead and succeed.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option("--from", help="Take the libraries from this folder.", metavar="DIR")
    ] = None,
    source: Annotated[
        LibrarySource, typer.Option(help="npm: download a prebuilt one. build: compile it here.")
    ] = LibrarySource.NPM,
) -> None:
    """Install the library that fits this processor best."""
    from nimbos.config import load
    from nimbos.hub import NativeLibrary

    library = NativeLibrary(load())
    if if_possible and library.installed() is not None:
        return
    from nimbos.cli.interruptible import run_interruptible
    from nimbos.cli.progress import Watching

    try:
        with Watching() as progress:
            path = run_interruptible(
                library.install(if_possible=if_possible, source=source.value, folder=folder, progress=progress)
            )
    except KeyboardInterrupt:
        typer.echo("Stopped. Nothing was installed.", err=True)
        raise typer.Exit(130) from None
    if path is not None:
        typer.echo(f"The engine's library is {path}.")

"""The `nimbos` command: parse, call, print. Command modules import what is heavy inside their functions, so that
`--help` stays fast.

An error that a caller can see is one line on stderr and exit code 1, Ctrl-C is exit code 130, both without a trace.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nimbos import __version__
from nimbos.cli import (
    batch,
    budget,
    forking,
    key,
    limit,
    models,
    native,
    organisation,
    processes,
    programs,
    signalling,
    usage,
)
from nimbos.cli.backup import backup
from nimbos.cli.bench import bench
from nimbos.cli.chat import chat
from nimbos.cli.doctor import doctor
from nimbos.cli.run import run
from nimbos.cli.top import top
from nimbos.cli.up import up
from nimbos.errors import NimbosError, StorageUnavailable

app = typer.Typer(
    name="nimbos",
    help="An AI cloud you own, with a language model as its operating system.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(up)
app.command()(top)
app.command()(chat)
app.command()(run)
app.command()(bench)
app.command()(doctor)
app.command()(backup)
processes.register(app)
signalling.register(app)
forking.register(app)
programs.register(app)
models.register(app)
native.register(app)
key.register(app)
usage.register(app)
budget.register(app)
limit.register(app)
organisation.register(app)
batch.register(app)


def main() -> None:
    try:
        app()
    except StorageUnavailable as error:
        print(f"Error: {error.where} cannot be used: {error.reason}", file=sys.stderr)
        raise SystemExit(1) from error
    except NimbosError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error
    except OSError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as interrupt:
        raise SystemExit(130) from interrupt


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nimbos {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """An AI cloud you own, with a language model as its operating system."""

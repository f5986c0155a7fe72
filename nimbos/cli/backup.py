"""`nimbos backup`: a copy of the database, also while a server uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def backup(
    file: Annotated[Path, typer.Argument(help="Where to write the copy; must not exist yet.")],
) -> None:
    """Copy the database into FILE, also while the server runs.

    The copy is a SQLite database of one moment. With PostgreSQL use `pg_dump`.
    """
    from nimbos import config
    from nimbos.cli.interruptible import run_interruptible
    from nimbos.db import Database

    settings = config.load()
    run_interruptible(Database.copy(settings, file.absolute()))
    typer.echo(f"{file} ({file.stat().st_size / 2**20:.1f} MiB)")
    contents = Path(settings.storage.blobs or Path(settings.home) / "blobs")
    if settings.storage.blobs != "database" and contents.is_dir():
        typer.echo(f"Contents of files and answers are in {contents}: copy that folder now, too.", err=True)

"""`nimbos program`: the programs that the project has brought; `nimbos run` brings them."""

from __future__ import annotations

from typing import Annotated

import typer

_PAGE = 1_000


def register(app: typer.Typer) -> None:
    program = typer.Typer(no_args_is_help=True, help="Programs that were brought: what there is to run.")
    program.callback()(_program)
    program.command(name="list")(list_programs)
    program.command(name="remove")(remove_program)
    app.add_typer(program, name="program")


def _program() -> None:
    """Programs that were brought: what there is to run."""


def list_programs(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
) -> None:
    """List the project's programs, the one brought last first."""
    from nimbos import config
    from nimbos.cli.process_lines import moment
    from nimbos.cli.remote import Remote
    from nimbos.cli.tables import show_document, show_table

    with Remote(config.load()) as remote:
        found = []
        page = remote.get("/v1/programs", limit=_PAGE)
        while True:
            found += page["data"]
            if not page["has_more"]:
                break
            page = remote.get("/v1/programs", limit=_PAGE, after=page["last_id"])
    if json:
        show_document({"object": "list", "data": found})
        return
    if not found:
        typer.echo("No programs yet. `nimbos run FOLDER` brings one.")
        return
    rows = [
        (
            one["id"][:12],
            one["name"],
            one["version"],
            "yes" if one["python"] else "no",
            f"{one['size_bytes']:,}",
            moment(one["created_ms"])[:19],
        )
        for one in found
    ]
    show_table(("ID", "NAME", "VERSION", "PYTHON", "BYTES", "SINCE"), rows, right=("BYTES",))


def remove_program(
    program: Annotated[
        str, typer.Argument(metavar="PROGRAM", help="Its id, the beginning of one, its name, or name@version.")
    ],
) -> None:
    """Remove a program. Refused while a process of it is not over."""
    from urllib.parse import quote

    from nimbos import config
    from nimbos.cli.remote import Remote

    with Remote(config.load()) as remote:
        gone = remote.delete(f"/v1/programs/{quote(program, safe='')}")
    typer.echo(f"The program {gone['id'][:12]} is removed.")

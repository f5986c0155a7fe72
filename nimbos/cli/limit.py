"""`nimbos limit`: how fast an owner may go. What a limit does is in docs/budgets.md."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nimbos.cli.budget import OWNER, owner_of

_NUMBERS = ("requests_per_min", "requests_burst", "tokens_per_min", "tokens_burst", "concurrent")


def register(app: typer.Typer) -> None:
    limit = typer.Typer(help="Limits: requests and tokens a minute, asks at once.")
    limit.callback(invoke_without_command=True)(_limit)
    limit.command()(show)
    limit.command(name="set")(set_limit)
    app.add_typer(limit, name="limit")


def _limit(context: typer.Context) -> None:
    """Limits: requests and tokens a minute, asks at once. Without a command: show them."""
    if context.invoked_subcommand is None:
        show()


def show(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
) -> None:
    """Show all limits."""
    from nimbos import config
    from nimbos.cli.admin import connect
    from nimbos.cli.tables import show_document

    with connect(config.load()) as server:
        found = server.get("/v1/organization/limits")["data"]
    if json:
        show_document(found)
    elif not found:
        typer.echo("No limits yet. `nimbos limit set project:default --rpm 60` makes one.")
    else:
        _show(found)


def set_limit(
    owner: Annotated[str, typer.Argument(help=OWNER)],
    model: Annotated[str, typer.Option(help="For this model alone; without it for all together.")] = "*",
    rpm: Annotated[int | None, typer.Option(min=0, help="Requests a minute.")] = None,
    rpm_burst: Annotated[int | None, typer.Option(min=1, help="Requests at once after a pause.")] = None,
    tpm: Annotated[int | None, typer.Option(min=0, help="Tokens a minute.")] = None,
    tpm_burst: Annotated[int | None, typer.Option(min=1, help="Tokens at once after a pause.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=0, help="Asks at once.")] = None,
) -> None:
    """Set the whole limit of an owner; what is not given is not limited, and with nothing given there is none."""
    from nimbos import config
    from nimbos.cli.admin import connect

    kind, name = owner_of(owner)
    numbers = dict(zip(_NUMBERS, (rpm, rpm_burst, tpm, tpm_burst, concurrent), strict=True))
    with connect(config.load()) as server:
        made = server.post("/v1/organization/limits", {"owner_kind": kind, "owner_id": name, "model": model, **numbers})
    _show([made])


def _show(limits: list[dict[str, Any]]) -> None:
    from nimbos.cli.tables import show_table

    names = ("OWNER", "MODEL", "REQUESTS/MIN", "BURST", "TOKENS/MIN", "BURST", "AT ONCE")
    rows = []
    for limit in limits:
        of = limit["owner"]
        shown = of["kind"] if of["kind"] == "organisation" else f"{of['kind']}:{of['name'] or of['id']}"
        rows.append((shown, limit["model"], *(_number(limit[name]) for name in _NUMBERS)))
    show_table(names, rows, right=names[2:])


def _number(number: int | None) -> str:
    return "" if number is None else f"{number:,}"

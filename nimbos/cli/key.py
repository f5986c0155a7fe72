"""`nimbos key`: made, listed, revoked. The secret alone goes to standard output."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nimbos.cli.admin import Admin


class Per(StrEnum):
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


def register(app: typer.Typer) -> None:
    key = typer.Typer(no_args_is_help=True, help="Keys: who may ask, what, and how much.")
    key.callback()(_key)
    key.command()(create)
    key.command(name="list")(list_keys)
    key.command()(revoke)
    app.add_typer(key, name="key")


def _key() -> None:
    """Keys: who may ask, what, and how much."""


def create(
    name: Annotated[str, typer.Argument(help="Unique among the living keys of its project.")],
    project: Annotated[str, typer.Option(help="Whose tokens it uses: a name or an id.")] = "default",
    models: Annotated[str | None, typer.Option(help="Models it may ask, with commas; all without it.")] = None,
    rpm: Annotated[int | None, typer.Option(min=0, help="Requests a minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=0, help="Tokens a minute.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=0, help="Asks at once.")] = None,
    weight: Annotated[float, typer.Option(help="Its share of a busy machine; 1 is everybody's.")] = 1.0,
    classes: Annotated[
        str | None, typer.Option(help="interactive, agent, batch: only these, with commas; all without it.")
    ] = None,
    routes: Annotated[
        str | None, typer.Option(help="Routes such as /v1/embeddings: only these, with commas; all without it.")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may also administer.")] = False,
    code: Annotated[
        bool, typer.Option("--code", help="It may also bring programs with Python, which runs on the server's machine.")
    ] = False,
    budget_tokens: Annotated[int | None, typer.Option(min=0, help="So many tokens and no more.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="MONEY", help="So much money and no more, like 12.50.")] = None,
    per: Annotated[Per | None, typer.Option(help="How often the budgets are renewed; without it, never.")] = None,
    expires: Annotated[str | None, typer.Option(help="90d, 12h, or a day such as 2027-01-31.")] = None,
) -> None:
    """Make a key, and print it. It is shown this once."""
    from datetime import UTC, datetime

    from nimbos import config
    from nimbos.cli.admin import connect
    from nimbos.cli.quantities import micros_of, seconds_until, words_of
    from nimbos.errors import InvalidRequest

    if per is not None and budget_tokens is None and budget is None:
        raise InvalidRequest("--per says how often a budget is renewed: give --budget or --budget-tokens with it.")
    period = (per or Per.TOTAL).value
    budgets: list[dict[str, Any]] = []
    if budget_tokens is not None:
        budgets.append({"meter": "tokens", "limit": budget_tokens, "period": period})
    if budget is not None:
        budgets.append({"meter": "cost_micros", "limit": micros_of(budget), "period": period})
    allowance = {"requests_per_min": rpm, "tokens_per_min": tpm, "concurrent": concurrent, "budgets": budgets}
    scopes = [f"model:{model}" for model in words_of(models, "--models")]
    scopes += [f"class:{one}" for one in words_of(classes, "--classes")]
    scopes += [f"route:{route}" for route in words_of(routes, "--routes")] + (["admin"] if admin else [])
    scopes += ["programs:code"] if code else []
    body: dict[str, Any] = {"name": name, "scopes": scopes, "weight": weight}
    if any(value for value in allowance.values()) or 0 in (rpm, tpm, concurrent):
        body["allowance"] = allowance
    if expires is not None:
        body["expires_in_seconds"] = seconds_until(expires, now=datetime.now(UTC))
    with connect(config.load()) as server:
        project_id = find_project(server, project)
        made = server.post(f"/v1/organization/projects/{project_id}/api_keys", body)
    typer.echo(f"The key {name!r} ({made['id']}). This is the only time it is shown:", err=True)
    typer.echo(made["value"])


def list_keys(
    project: Annotated[str | None, typer.Option(help="Of this project alone.")] = None,
    revoked: Annotated[bool, typer.Option("--revoked", help="Also those that are revoked.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
) -> None:
    """List keys, without their secrets."""
    from nimbos import config
    from nimbos.cli.admin import connect, pages
    from nimbos.cli.tables import show_document, show_table

    with connect(config.load()) as server:
        projects = {one["id"]: one for one in _projects(server)}
        wanted = find_project(server, project) if project is not None else None
        query = {"include_revoked": "true"} if revoked else {}
        found = [
            key
            for key in pages(server, "/v1/organization/api_keys", **query)
            if wanted in (None, key["x_nimbos"]["project_id"])
        ]
    if json:
        show_document(found)
        return
    if not found:
        typer.echo("No keys yet. `nimbos key create NAME` makes one.")
        return
    columns = ("NAME", "ID", "PROJECT", "KEY", "OWNER", "MAY", "EXPIRES", "LAST USE", "STATE")
    show_table(columns, [_row(key, projects) for key in found])


def revoke(
    key: Annotated[str, typer.Argument(metavar="NAME|ID", help="As `nimbos key list` shows it.")],
    project: Annotated[str | None, typer.Option(help="Where several projects have such a name.")] = None,
) -> None:
    """End a key. What it asks from now on is refused."""
    from nimbos import config
    from nimbos.cli.admin import connect

    with connect(config.load()) as server:
        found = find_key(server, key, project)
        place = f"/v1/organization/projects/{found['x_nimbos']['project_id']}/api_keys/{found['id']}"
        server.delete(place)
    typer.echo(f"The key {found['name']!r} ({found['id']}) is revoked.", err=True)


def find_project(server: Admin, wanted: str) -> str:
    """The id of a living project, by its id, which no other's name can take away, or by its name.

    Raises: NotFound.
    """
    from nimbos.errors import NotFound

    living = [project for project in _projects(server) if project["status"] == "active"]
    for called in ("id", "name"):
        for project in living:
            if project[called] == wanted:
                return str(project["id"])
    raise NotFound(f"There is no project {wanted!r}. `nimbos project list` shows those there are.")


def _projects(server: Admin) -> list[dict[str, Any]]:
    from nimbos.cli.admin import pages

    return list(pages(server, "/v1/organization/projects", include_archived="true"))


def find_key(server: Admin, wanted: str, project: str | None) -> dict[str, Any]:
    """A living key, by its id or its name. Raises: NotFound; Conflict where several have the name."""
    from nimbos.cli.admin import pages
    from nimbos.errors import Conflict, NotFound

    project_id = find_project(server, project) if project is not None else None
    found = [
        key
        for key in pages(server, "/v1/organization/api_keys")
        if wanted in (key["id"], key["name"]) and project_id in (None, key["x_nimbos"]["project_id"])
    ]
    if not found and wanted in ("owner", "key_owner"):
        raise NotFound("The owner's key is no entry of this list: remove `owner.key`, and a restart makes a new one.")
    if not found:
        raise NotFound(f"There is no key {wanted!r}. `nimbos key list` shows those there are.")
    if len(found) > 1:
        ids = ", ".join(key["id"] for key in found)
        raise Conflict(f"Several projects have a key {wanted!r}: give --project, or one of their ids ({ids}).")
    return found[0]


def _state(key: dict[str, Any], project: dict[str, Any], now_s: float) -> str:
    """Why it does not work, or `active`."""
    if key["x_nimbos"]["revoked_at"] is not None:
        return "revoked"
    if key["expires_at"] is not None and key["expires_at"] <= now_s:
        return "expired"
    if project["status"] != "active":
        return "project archived"
    return "active" if key["owner_project_access"] == "active" else "owner gone"


def _row(key: dict[str, Any], projects: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    import time

    from nimbos.cli.tables import moment

    owner = key["owner"]["user"] or key["owner"]["service_account"]
    project = projects[key["x_nimbos"]["project_id"]]
    return (
        key["name"],
        key["id"],
        project["name"],
        key["redacted_value"],
        owner["name"],
        " ".join(key["x_nimbos"]["scopes"]) or "everything",
        moment(key["expires_at"]) or "never",
        moment(key["last_used_at"]) or "never",
        _state(key, project, time.time()),
    )

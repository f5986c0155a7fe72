"""`nimbos project`, `nimbos user`, `nimbos audit`: who there is, and who changed what."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nimbos.cli.admin import Admin

_USERS = "/v1/organization/users"


class UserRole(StrEnum):
    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"
    READER = "reader"


def register(app: typer.Typer) -> None:
    project = typer.Typer(no_args_is_help=True, help="Projects: who pays, and whom the scheduler is fair to.")
    project.callback()(_project)
    project.command(name="create")(create_project)
    project.command(name="list")(list_projects)
    project.command()(archive)
    app.add_typer(project, name="project")
    user = typer.Typer(no_args_is_help=True, help="People: who may see and change what.")
    user.callback()(_user)
    user.command()(add)
    user.command(name="list")(list_users)
    user.command(name="remove")(remove_user)
    app.add_typer(user, name="user")
    app.command()(audit)


def _project() -> None:
    """Projects: who pays, and whom the scheduler is fair to."""


def _user() -> None:
    """People: who may see and change what."""


def create_project(
    name: Annotated[str, typer.Argument(help="Unique among those that are not archived.")],
    weight: Annotated[float, typer.Option(help="Its share of a busy machine; 1 is everybody's.")] = 1.0,
) -> None:
    """Make a project, and print its id."""
    from nimbos import config
    from nimbos.cli.admin import connect

    with connect(config.load()) as server:
        made = server.post("/v1/organization/projects", {"name": name, "weight": weight})
    typer.echo(made["id"])


def list_projects(
    archived: Annotated[bool, typer.Option("--archived", help="Also those that are archived.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
) -> None:
    """List the projects."""
    from nimbos import config
    from nimbos.cli.admin import connect, pages
    from nimbos.cli.tables import moment, show_document, show_table

    with connect(config.load()) as server:
        query = {"include_archived": "true"} if archived else {}
        found = list(pages(server, "/v1/organization/projects", **query))
    if json:
        show_document(found)
        return
    rows = [
        (one["name"], one["id"], one["status"], f"{one['x_nimbos']['weight']:g}", moment(one["created_at"]))
        for one in found
    ]
    show_table(("NAME", "ID", "STATE", "WEIGHT", "MADE"), rows)


def archive(
    project: Annotated[str, typer.Argument(metavar="NAME|ID", help="As `nimbos project list` shows it.")],
) -> None:
    """End a project and all its keys. Its usage stays; it cannot be undone."""
    from nimbos import config
    from nimbos.cli.admin import connect
    from nimbos.cli.key import find_project

    with connect(config.load()) as server:
        done = server.post(f"/v1/organization/projects/{find_project(server, project)}/archive", {})
    typer.echo(f"The project {done['name']!r} is archived.", err=True)


def add(
    email: Annotated[str, typer.Argument(help="Unique.")],
    role: Annotated[UserRole, typer.Option(help="What the user may do in the organisation.")] = UserRole.MEMBER,
    name: Annotated[str, typer.Option(help="As it is shown; without it the address.")] = "",
    project: Annotated[
        str | None, typer.Option(help="Where the user is a member; without it the default project, but for readers.")
    ] = None,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read a password from standard input, for the console.")
    ] = False,
) -> None:
    """Add a user, and print the id."""
    import sys

    from nimbos import config
    from nimbos.cli.admin import connect
    from nimbos.cli.key import find_project

    body: dict[str, Any] = {"email": email, "role": role.value, "name": name}
    if password_stdin:
        body["password"] = sys.stdin.readline().rstrip("\r\n")
    with connect(config.load()) as server:
        if project is not None:
            body["project"] = find_project(server, project)
        made = server.post(_USERS, body)
    typer.echo(made["id"])


def list_users(json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False) -> None:
    """List the users."""
    from nimbos import config
    from nimbos.cli.admin import connect, pages
    from nimbos.cli.tables import moment, show_document, show_table

    with connect(config.load()) as server:
        found = list(pages(server, _USERS))
    if json:
        show_document(found)
        return
    rows = [
        (
            one["email"],
            one["name"],
            one["role"],
            one["id"],
            "yes" if one["x_nimbos"]["has_password"] else "no",
            moment(one["added_at"]),
        )
        for one in found
    ]
    show_table(("EMAIL", "NAME", "ROLE", "ID", "LOG-IN", "ADDED"), rows)


def remove_user(
    user: Annotated[str, typer.Argument(metavar="EMAIL|ID", help="As `nimbos user list` shows it.")],
) -> None:
    """Remove a user: its keys and its log-ins end."""
    from nimbos import config
    from nimbos.cli.admin import connect

    with connect(config.load()) as server:
        server.delete(f"{_USERS}/{_find_user(server, user)}")
    typer.echo(f"The user {user} is removed.", err=True)


def audit(
    verify: Annotated[bool, typer.Option("--verify", help="Check the whole chain of hashes.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100, help="So many of the last changes.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
) -> None:
    """Show who changed what, newest first; with --verify, check that nothing was altered or is missing."""
    from nimbos import config
    from nimbos.cli.admin import connect

    with connect(config.load()) as server:
        if verify:
            found = server.get("/v1/organization/audit_logs/verify")
        else:
            found = server.get("/v1/organization/audit_logs", {"limit": limit})
    if json:
        from nimbos.cli.tables import show_document

        show_document(found)
    elif not verify:
        _show_entries(found["data"])
    elif found["problem"] is None:
        typer.echo(f"{found['rows']} rows, as they were written. The last hash is {found['last_hash']}.")
    if verify and found["problem"] is not None:
        typer.echo(f"The audit log was tampered with: {found['problem']}", err=True)
        raise typer.Exit(1)


def _show_entries(entries: list[dict[str, Any]]) -> None:
    from nimbos.cli.tables import moment, show_table

    rows = []
    for entry in entries:
        actor = entry["actor"]
        by = actor["session"]["user"]["email"] if actor["type"] == "session" else actor["api_key"]["id"]
        target = entry[entry["type"]]["id"]
        rows.append((moment(entry["effective_at"]), by, entry["x_nimbos"]["action"], target))
    show_table(("WHEN", "WHO", "WHAT", "TARGET"), rows)


def _find_user(server: Admin, wanted: str) -> str:
    from nimbos.cli.admin import pages
    from nimbos.errors import NotFound

    for user in pages(server, _USERS):
        if wanted.lower() == user["email"] or wanted == user["id"]:
            return str(user["id"])
    raise NotFound(f"There is no user {wanted!r}. `nimbos user list` shows those there are.")

"""`nimbos batch`: submit a file of requests to the running server, watch it, fetch what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx2

_UPLOAD_PATIENCE_S = 600.0
_LOOK_EVERY_S = 0.5
_PIECE_BYTES = 1 << 16
_LISTED = 100
_OVER = ("completed", "failed", "expired", "cancelled")
_GOOD = "completed"

_ID = "As `nimbos batch submit` printed it."
_JSON = "Machine-readable, one document."


def register(app: typer.Typer) -> None:
    batch = typer.Typer(no_args_is_help=True, help="Batches: many requests in one file, answered when there is room.")
    for command in (submit, list_batches, show, cancel, output):
        batch.command(name="list" if command is list_batches else None)(command)
    app.add_typer(batch, name="batch")


def submit(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Requests, a JSON object a line (JSONL).")],
    endpoint: Annotated[str, typer.Option(help="The route of all lines; else as the first line says.")] = "",
    window: Annotated[str, typer.Option(help="How long it may take: 30m, 24h, 14d.")] = "24h",
    wait: Annotated[bool, typer.Option("--wait", help="Show how far it is, until it is over.")] = False,
) -> None:
    """Submit a file of requests; prints the batch's id."""
    from nimbos import config
    from nimbos.cli.running import admin_client

    endpoint = endpoint or _first_url(file)
    with admin_client(config.load()) as client:
        with file.open("rb") as content:
            uploaded = _checked(
                client.post(
                    "/v1/files",
                    data={"purpose": "batch"},
                    files={"file": (file.name, content)},
                    timeout=_UPLOAD_PATIENCE_S,
                )
            )
        batch = _checked(
            client.post(
                "/v1/batches",
                json={"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": window},
            )
        )
        typer.echo(batch["id"])
        if wait:
            raise typer.Exit(0 if _wait(client, batch) == _GOOD else 1)


def list_batches(json: Annotated[bool, typer.Option("--json", help=_JSON)] = False) -> None:
    """List the newest batches."""
    from nimbos import config
    from nimbos.cli.running import admin_client
    from nimbos.cli.tables import count, moment, show_document, show_table

    with admin_client(config.load()) as client:
        found = _checked(client.get("/v1/batches", params={"limit": _LISTED}))["data"]
    if json:
        show_document(found)
        return
    names = ("ID", "STATUS", "LINES", "DONE", "FAILED", "SUBMITTED", "ROUTE")
    rows = [
        (
            batch["id"],
            batch["status"],
            *(count(batch["request_counts"][name]) for name in ("total", "completed", "failed")),
            moment(batch["created_at"]),
            batch["endpoint"],
        )
        for batch in found
    ]
    show_table(names, rows, right=names[2:5])


def show(
    batch_id: Annotated[str, typer.Argument(metavar="ID", help=_ID)],
    json: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
) -> None:
    """Show how far a batch is, and what holds it up."""
    from nimbos import config
    from nimbos.cli.running import admin_client
    from nimbos.cli.tables import show_document

    with admin_client(config.load()) as client:
        batch = _fetch(client, batch_id)
    if json:
        show_document(batch)
    else:
        typer.echo("\n".join(_told(batch)))


def cancel(batch_id: Annotated[str, typer.Argument(metavar="ID", help=_ID)]) -> None:
    """Cancel a batch; what is done stays."""
    from nimbos import config
    from nimbos.cli.running import admin_client

    with admin_client(config.load()) as client:
        batch = _checked(client.post(f"/v1/batches/{_in_path(batch_id)}/cancel"))
    typer.echo(f"{batch_id} is {batch['status']}.")


def output(
    batch_id: Annotated[str, typer.Argument(metavar="ID", help=_ID)],
    to: Annotated[Path | None, typer.Option("--output", "-o", help="A file; else it is printed.")] = None,
    errors: Annotated[bool, typer.Option("--errors", help="The error file instead.")] = False,
) -> None:
    """Fetch the answers of a batch, a JSON object a line, or its errors."""
    import sys

    from nimbos import config
    from nimbos.cli.running import admin_client
    from nimbos.errors import NotFound

    what = "error" if errors else "output"
    with admin_client(config.load()) as client:
        batch = _fetch(client, batch_id)
        file_id = batch[f"{what}_file_id"]
        if file_id is None:
            raise NotFound(f"The batch {batch_id} has no {what} file: it is {batch['status']}.")
        with client.stream("GET", f"/v1/files/{file_id}/content", timeout=_UPLOAD_PATIENCE_S) as response:
            if response.status_code != 200:
                response.read()
                _checked(response)
            if to is None:
                for piece in response.iter_bytes(_PIECE_BYTES):
                    sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
            else:
                with to.open("wb") as target:
                    for piece in response.iter_bytes(_PIECE_BYTES):
                        target.write(piece)


def _wait(client: httpx2.Client, batch: dict[str, Any]) -> str:
    """Watches until it is over; Ctrl-C stops watching, not the batch."""
    import time

    from nimbos.cli.batch_progress import Watching

    try:
        with Watching() as progress:
            while batch["status"] not in _OVER:
                progress.show(batch)
                time.sleep(_LOOK_EVERY_S)
                batch = _fetch(client, batch["id"])
            progress.show(batch)
    except KeyboardInterrupt:
        typer.echo(f"\nThe batch goes on without you: nimbos batch show {batch['id']}", err=True)
        raise typer.Exit(130) from None
    typer.echo("\n".join(_told(batch)), err=True)
    return str(batch["status"])


def _told(batch: dict[str, Any]) -> list[str]:
    from nimbos.cli.tables import moment

    counts = batch["request_counts"]
    lines = [
        f"{batch['id']}: {batch['status']}, {counts['completed']:,} of {counts['total']:,} done, "
        f"{counts['failed']:,} failed, {batch['endpoint']}"
    ]
    if batch["status"] not in _OVER:
        lines.append(f"Until {moment(batch['expires_at'])} UTC.")
    waiting = batch.get("x_nimbos")
    if waiting:
        lines.append(f"It waits: {waiting['waiting_for']}")
    for fault in (batch["errors"] or {"data": []})["data"]:
        where = f"line {fault['line']}: " if fault.get("line") else ""
        lines.append(f"{where}{fault['message']}")
    if batch["output_file_id"]:
        lines.append(f"Answers: nimbos batch output {batch['id']} -o answers.jsonl")
    if batch["error_file_id"]:
        lines.append(f"Errors: nimbos batch output {batch['id']} --errors")
    return ["".join(filter(str.isprintable, line)) for line in lines]


def _first_url(file: Path) -> str:
    """The route that the first line names. Raises: InvalidRequest."""
    import msgspec

    from nimbos.errors import InvalidRequest

    class Line(msgspec.Struct):
        url: str

    limit_bytes = 1 << 24
    with file.open("rb") as content:
        first = content.readline(limit_bytes)
    try:
        return msgspec.json.decode(first.removeprefix(b"\xef\xbb\xbf"), type=Line).url
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The first line of {file} names no `url`; give --endpoint.") from error


def _fetch(client: httpx2.Client, batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = _checked(client.get(f"/v1/batches/{_in_path(batch_id)}"))
    return found


def _in_path(batch_id: str) -> str:
    from urllib.parse import quote

    return quote(batch_id, safe="")


def _checked(response: httpx2.Response) -> Any:
    """Raises: NimbosError with the server's own words."""
    from nimbos.errors import NimbosError

    if response.status_code >= 400:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"The server answered {response.status_code}."
        raise NimbosError(message)
    return response.json()

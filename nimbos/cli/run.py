"""`nimbos run`: brings a program to the server, makes a process of it, and shows what it does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nimbos.cli.remote import Remote

INPUT_BYTES_MAX = 8 * 1024 * 1024


def run(
    program: Annotated[str, typer.Argument(metavar="PATH", help="A program's folder; or the name or id of one there.")],
    words: Annotated[
        str, typer.Argument(metavar="INPUT", help="What it is given. A JSON object or array is taken as one.")
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Print its id alone and leave it.")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Instead of the program's own.")] = None,
    name: Annotated[str | None, typer.Option(help="Instead of the program's.")] = None,
    input_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="What it is given: .json as JSON, else as text.")
    ] = None,
    budget_tokens: Annotated[int | None, typer.Option(min=0, help="Tokens that it may use, in and out.")] = None,
    budget: Annotated[str | None, typer.Option(help="Money that it may use, such as 0.50.")] = None,
    budget_seconds: Annotated[int | None, typer.Option(min=0, help="Seconds of computing and of tools.")] = None,
    budget_calls: Annotated[int | None, typer.Option(min=0, help="Calls of tools.")] = None,
    key: Annotated[str | None, typer.Option(help="The same key never makes a second process.")] = None,
) -> None:
    """Run a program. Shows what it does and asks for it; Ctrl-C leaves it alone, and it goes on."""
    from nimbos import config
    from nimbos.cli.process_watching import watch
    from nimbos.cli.quantities import micros_of
    from nimbos.cli.remote import Remote
    from nimbos.errors import InvalidRequest

    if words and input_file is not None:
        raise InvalidRequest("Give INPUT or --input-file, not both.")
    limits = {
        "tokens": budget_tokens,
        "cost_micros": micros_of(budget) if budget is not None else None,
        "seconds": budget_seconds,
        "calls": budget_calls,
    }
    body: dict[str, Any] = {"input": _input(words, input_file), "model": model, "name": name, "key": key}
    if any(limit is not None for limit in limits.values()):
        body["budget"] = limits
    with Remote(config.load()) as remote:
        process = remote.post("/v1/processes", {**body, "program": _program(remote, program)})
        if detach:
            typer.echo(process["id"])
            return
        typer.echo(f"{process['id']}  {process['name']} · {process['model']}", err=True)
        raise typer.Exit(watch(remote, process["id"]))


def _program(remote: Remote, given: str) -> str:
    """The id of what was brought, or what the server is to find by name."""
    from nimbos.errors import NotFound
    from nimbos.kernel import pack, read_folder

    folder = Path(given)
    if folder.name == "SKILL.md" or folder.name == "nimbos.toml":
        folder = folder.parent
    if folder.is_dir():
        return str(remote.upload(pack(read_folder(folder)))["id"])
    if "/" in given or given.startswith("."):
        raise NotFound(f"There is no folder {given}.")
    return given


def _input(words: str, file: Path | None) -> Any:
    """Raises: InvalidRequest."""
    import msgspec

    from nimbos.cli.process_asking import value_of
    from nimbos.errors import InvalidRequest, PayloadTooLarge

    if file is None:
        return value_of(words)
    if file.stat().st_size > INPUT_BYTES_MAX:
        raise PayloadTooLarge(have=file.stat().st_size, limit=INPUT_BYTES_MAX, what="input")
    content = file.read_bytes()
    try:
        return msgspec.json.decode(content) if file.suffix == ".json" else content.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{file} is not what its name says: {error}.") from error

"""`nimbos chat`: a conversation in the terminal with the running server."""

from __future__ import annotations

from typing import Annotated

import typer


def chat(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Without it: the server's first model.")] = None,
    url: Annotated[str | None, typer.Option(help="Without it: the server running on this machine.")] = None,
    key: Annotated[
        str | None, typer.Option(envvar="NIMBOS_API_KEY", help="Without it: the owner's key of this machine.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before all.")] = None,
) -> None:
    """Chat with the running server; piped input is asked as one question."""
    from nimbos.cli.conversation import talk

    raise typer.Exit(talk(model=model, url=url, key=key, system=system))

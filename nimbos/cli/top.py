"""`nimbos top`: what the server does now, again each second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from httpx2 import Client
    from rich.console import RenderableType

_ROWS = 20
_MICROS = 1_000_000


def top(
    once: Annotated[bool, typer.Option("--once", help="Show it one time and leave.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The server's own words, one line for each look.")] = False,
    every: Annotated[float, typer.Option(min=0.2, max=60, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Live: streams, queue, cells, tokens a second, spend. Ctrl-C leaves."""
    import msgspec
    from rich.console import Console
    from rich.live import Live

    from nimbos import config
    from nimbos.cli.running import admin_client

    with admin_client(config.load()) as client:
        console = Console()
        looks = _looks(client, once=once, every=every)
        if json or once:
            for look in looks:
                if json:
                    print(msgspec.json.encode(look).decode(), flush=True)
                else:
                    console.print(_shown(look, None))
            return
        last: dict[str, Any] | None = None
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as screen:
            for look in looks:
                screen.update(_shown(look, last), refresh=True)
                last = look


def _looks(client: Client, *, once: bool, every: float) -> Iterator[dict[str, Any]]:
    """Raises: NotReady when the server is gone, or says no, in its own words."""
    import time

    from httpx2 import HTTPError

    from nimbos.errors import NotReady

    while True:
        try:
            reply = client.get("/v1/organization/live")
        except HTTPError as error:
            raise NotReady(f"The server at {client.base_url} does not answer.") from error
        if reply.status_code != 200:
            raise NotReady(reply.json()["error"]["message"])
        yield reply.json()
        if once:
            return
        time.sleep(every)


def _shown(look: dict[str, Any], last: dict[str, Any] | None) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    waiting = sum(sum(engine["waiting"].values()) for engine in look["engines"].values())
    head = (
        f"Nimbos  {look['running']} running · {waiting} waiting · {_rate(look, last)} tokens/s · "
        f"spent today {look['spent_today_micros'] / _MICROS:.2f}"
    )
    return Group(Text(head, style="bold"), _engines(look, last), _asks(look))


def _rate(look: dict[str, Any], last: dict[str, Any] | None) -> str:
    """Output tokens a second between two looks; nothing is known after the first."""
    if last is None or last["server"] != look["server"] or look["at_ms"] <= last["at_ms"]:
        return "–"
    tokens = look["tokens"]["output"] - last["tokens"]["output"]
    return f"{max(0, tokens) * 1e3 / (look['at_ms'] - last['at_ms']):.1f}"


def _engines(look: dict[str, Any], last: dict[str, Any] | None) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("model", "running", "waiting", "cells", "cached", "rows/step", "stalls", "restarts", "memory"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for model, engine in look["engines"].items():
        before = (last or {}).get("engines", {}).get(model, {})
        steps = engine["steps"] - before.get("steps", 0)
        rows = engine["step_rows"] - before.get("step_rows", 0)
        table.add_row(
            model,
            str(sum(engine["running"].values())),
            str(sum(engine["waiting"].values())),
            f"{engine['cells_used']}/{engine['cells']}",
            f"{engine['cached_tokens'] / engine['prompt_tokens']:.0%}" if engine["prompt_tokens"] else "–",
            f"{rows / steps:.1f}" if steps > 0 else "–",
            str(engine["stalls"]),
            str(engine["restarts"]),
            f"{engine['resident_bytes'] / 2**20:.0f} MiB",
        )
    return table


def _asks(look: dict[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("ask", "key", "model", "class", "age", "first token", "in", "cached", "out", "tokens/s"):
        table.add_column(name, justify="right" if name in {"age", "first token", "in", "cached", "out"} else "left")
    for ask in look["asks"][:_ROWS]:
        first_ms, age_ms = ask["first_token_ms"], ask["age_ms"]
        speaking_ms = age_ms - first_ms if first_ms is not None else 0
        table.add_row(
            ask["id"][-12:],
            ask["key"] or ask["account"],
            ask["model"],
            ask["class"],
            f"{age_ms / 1e3:.1f} s",
            "–" if first_ms is None else f"{first_ms / 1e3:.2f} s",
            str(ask["input"]),
            str(ask["cached"]),
            str(ask["output"]),
            f"{ask['output'] * 1e3 / speaking_ms:.1f}" if speaking_ms > 0 else "–",
        )
    if look["running"] > _ROWS:
        table.caption = f"and {look['running'] - _ROWS} more"
    return table

"""`nimbos usage`: what was used, by whom, and what it cost."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer


class By(StrEnum):
    KEY = "key"
    MODEL = "model"
    PROJECT = "project"
    DAY = "day"
    CLASS = "class"
    PROCESS = "process"
    ASK = "ask"


_NUMBERS = ("asks", "input_tokens", "cached_tokens", "output_tokens", "thinking_tokens", "cost_micros")


def register(app: typer.Typer) -> None:
    app.command()(usage)


def usage(
    by: Annotated[By, typer.Option(help="One row for each; `ask` writes every single one, as CSV or JSON lines.")] = (
        By.KEY
    ),
    since: Annotated[str | None, typer.Option(help="A day such as 2026-11-01, or 7d: so long ago.")] = None,
    until: Annotated[str | None, typer.Option(help="Not including this moment.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="For spreadsheets.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="So many rows at most.")] = 1_000,
    page: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="So many rows are left out before.")] = 0,
) -> None:
    """Show what was used and what it cost, the most costly first. Days are in UTC; spans are whole hours."""
    import sys
    from datetime import UTC, datetime

    from nimbos import config
    from nimbos.cli.admin import Query, connect
    from nimbos.cli.quantities import since_ms
    from nimbos.cli.tables import show_document
    from nimbos.errors import InvalidRequest

    if json and csv:
        raise InvalidRequest("Give one of --json and --csv.")
    now = datetime.now(UTC)
    given = (("since_ms", since), ("until_ms", until))
    moments = {name: since_ms(text, now=now) for name, text in given if text is not None}
    if len(moments) == 2 and moments["since_ms"] >= moments["until_ms"]:
        raise InvalidRequest(f"--since {since} is not before --until {until}: there is no time between them.")
    query: dict[str, str | int | list[str]] = {**moments}
    with connect(config.load()) as server:
        if by is By.ASK:
            wanted: Query = {**query, "format": "json" if json else "csv"}
            for piece in server.lines("/v1/organization/usage/asks", wanted):
                sys.stdout.buffer.write(piece)
            return
        report = server.get("/v1/organization/usage", {**query, "by": by.value, "limit": limit, "page": page})
    if json:
        show_document(report)
    elif csv:
        _write_csv(by, report["rows"])
    else:
        _show(by, report)
    if report["has_more"] and not json:
        typer.echo(f"There are more rows: --page {report['next_page']} goes on there.", err=True)


def _show(by: By, report: dict[str, Any]) -> None:
    from nimbos.cli.tables import show_table

    names = (by.value.upper(), "ASKS", "INPUT", "CACHED", "OUTPUT", "THINKING", "COST")
    rows = [_row(row.get("name") or row[by.value], row) for row in report["rows"]]
    show_table(names, [*rows, _row("total", report["total"])], right=names[1:])


def _row(name: str, used: dict[str, int]) -> tuple[str, ...]:
    from nimbos.cli.quantities import money_of

    return (name, *(f"{used[number]:,}" for number in _NUMBERS[:-1]), money_of(used["cost_micros"]))


def _write_csv(by: By, rows: list[dict[str, Any]]) -> None:
    import csv
    import sys

    named = [by.value, "name"] if by in (By.KEY, By.PROJECT) else [by.value]
    writer = csv.writer(sys.stdout)
    writer.writerow([*named, *_NUMBERS])
    for row in rows:
        writer.writerow([*(_harmless(row[name]) for name in named), *(row[number] for number in _NUMBERS)])


def _harmless(text: str) -> str:
    """A name that a spreadsheet would run as a formula is quoted."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text

"""How lists of administration are shown: a table for people, one document for programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec


def show_document(value: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def show_table(names: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """`right`: columns of numbers. Cells are shown as they are, without control characters."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold", justify="right" if name in right else "left")
    for row in rows:
        table.add_row(*(Text("".join(filter(str.isprintable, cell))) for cell in row))
    terminal = Console(highlight=False)
    (terminal if terminal.is_terminal else Console(highlight=False, width=200)).print(table)


def moment(at_s: int | None) -> str:
    return "" if at_s is None else datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M")


def count(number: int | None) -> str:
    return "no limit" if number is None else f"{number:,}"

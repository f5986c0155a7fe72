"""The table `data.csv` beside this file: what it has, and numbers computed from it."""

import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from nimbos.adk import tool

TABLE = Path(__file__).parent / "data.csv"
WORDS_MAX = 30  # a column of text with more different values is no column to group by

KINDS: dict[str, Callable[[list[float]], float]] = {
    "total": sum,
    "average": statistics.fmean,
    "largest": max,
    "smallest": min,
    "count": len,
}


@tool(effect="pure")
def describe() -> dict[str, Any]:
    """Which columns the table has: those of numbers, and those of a few words with the words."""
    rows = read()
    columns = list(rows[0])
    numbers = [name for name in columns if all(number(row[name]) is not None for row in rows)]
    words = {name: sorted({row[name] for row in rows}) for name in columns if name not in numbers}
    return {
        "columns": columns,
        "numbers": numbers,
        "words": {name: values for name, values in words.items() if len(values) <= WORDS_MAX},
        "rows": len(rows),
    }


@tool(effect="pure")
def compute(
    column: str,
    kind: Literal["total", "average", "largest", "smallest", "count"],
    group_by: str = "nothing",
    only: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Computes one number for each group of rows, the largest first.

    Args:
        column: The column of numbers.
        kind: What to make of them.
        group_by: A column of words, or "nothing".
        only: Words that a row must have, by column.
    """
    groups: dict[str, list[float]] = {}
    for row in read():
        if all(row[name] == word for name, word in (only or {}).items()):
            value = number(row[column])
            if value is not None:
                groups.setdefault(row[group_by] if group_by != "nothing" else "all", []).append(value)
    found = [{"group": group, "value": round(KINDS[kind](values), 2)} for group, values in groups.items()]
    return sorted(found, key=lambda one: -one["value"])


def read() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

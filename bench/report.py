"""Numbers → a block for RESULTS.md on standard output, and a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bench.abba import Runs, medians
from bench.setup import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One number with its target. Exactly one of `at_least` and `at_most`, or neither for a number without a target."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        if self.at_least is None and self.at_most is None:
            return "—"
        met = not math.isnan(self.value)
        met &= self.at_least is None or self.value >= self.at_least
        met &= self.at_most is None or self.value <= self.at_most
        return "pass" if met else "miss"

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return "—" if self.at_most is None else f"≤ {self.at_most:g}"


def publish(
    setup: Setup, *, title: str, runs: Runs, findings: Sequence[Finding], place: list[str], notes: Sequence[str] = ()
) -> str:
    """Prints and returns the block. `place`: of `where`, taken before the runs."""
    block = _markdown(title, runs, findings, place, notes)
    print(block)
    if setup.out is not None:
        record = {
            "title": title,
            "where": place,
            "runs": runs,
            "medians": medians(runs),
            "findings": [asdict(finding) | {"verdict": finding.verdict} for finding in findings],
            "notes": list(notes),
        }
        setup.out.write_text(json.dumps(record, indent=1) + "\n")
    return block


def _markdown(title: str, runs: Runs, findings: Sequence[Finding], place: list[str], notes: Sequence[str]) -> str:
    lines = [f"## {title}", "", *(f"- {line}" for line in place), ""]
    names = list(dict.fromkeys(name for measured in runs.values() for run in measured for name in run))
    lines += _table(
        ["arm", *names], [[arm, *(_cell(measured, name) for name in names)] for arm, measured in runs.items()]
    )
    lines += ["", "Each cell: the median, then each run.", ""] if runs else []
    lines += _table(
        ["finding", "value", "target", "verdict"],
        [[finding.name, f"{finding.value:.3g}", finding.target, finding.verdict] for finding in findings],
    )
    lines += ["", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(measured: list[dict[str, float]], name: str) -> str:
    values = [run[name] for run in measured if name in run]
    if not values:
        return "—"
    middle = medians({"": [{name: value} for value in values]})[""][name]
    return f"**{middle:.4g}** ({', '.join(f'{value:.4g}' for value in values)})"

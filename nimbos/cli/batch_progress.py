"""How a running batch looks: a bar on a terminal, a line for every tenth elsewhere. Written to standard error."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


class Bar:
    """For people."""

    def __init__(self, console: Console) -> None:
        self._rich = Progress(
            TextColumn("{task.fields[status]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False, style="yellow"),
            console=console,
            transient=True,
        )
        self._task = self._rich.add_task("", total=None, status="validating", note="")
        self._rich.start()

    def show(self, batch: dict[str, Any]) -> None:
        counts = batch["request_counts"]
        note = (batch.get("x_nimbos") or {}).get("waiting_for", "")
        self._rich.update(
            self._task,
            total=counts["total"] or None,
            completed=counts["completed"] + counts["failed"],
            status=batch["status"],
            note="".join(filter(str.isprintable, note)),
        )

    def done(self) -> None:
        self._rich.stop()


class Lines:
    """For logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = ""

    def show(self, batch: dict[str, Any]) -> None:
        counts = batch["request_counts"]
        done, total = counts["completed"] + counts["failed"], counts["total"]
        tenths = 10 * done // total if total else 0
        told = f"{batch['status']}: {10 * tenths} %"
        if told != self._told:
            self._told = told
            self._console.print(Text(told), soft_wrap=True)

    def done(self) -> None:
        pass


class Watching:
    """Ends with its `with` block, whatever happens."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        self._shown: Bar | Lines = Bar(console) if console.is_terminal and sys.stderr.isatty() else Lines(console)

    def __enter__(self) -> Bar | Lines:
        return self._shown

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._shown.done()

"""How a download looks: a bar with speed and time left on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from nimbos.hub.progress import Progress


class Bar:
    """For people: one bar for the file that is coming."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rich = RichProgress(
            TextColumn("{task.fields[name]}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def start(self, name: str, *, total_bytes: int | None, done_bytes: int) -> None:
        if self._task is not None:
            self._rich.remove_task(self._task)
        self._task = self._rich.add_task("", total=total_bytes, completed=done_bytes, name=name[-48:])
        self._rich.start()

    def advance(self, count_bytes: int) -> None:
        if self._task is not None:
            self._rich.advance(self._task, count_bytes)

    def note(self, text: str) -> None:
        self._rich.console.print(Text(text, style="dim"))

    def done(self) -> None:
        self._rich.stop()


class Lines:
    """For logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._total: int | None = None
        self._have = 0
        self._began = 0
        self._began_at = 0.0
        self._tenths = 0

    def start(self, name: str, *, total_bytes: int | None, done_bytes: int) -> None:
        self._name, self._total, self._have, self._began = name, total_bytes, done_bytes, done_bytes
        self._began_at = time.monotonic()
        self._tenths = self._tenth()
        size = f" ({total_bytes / 1e6:,.1f} MB)" if total_bytes else ""
        self.note(f"{name}{size}")

    def advance(self, count_bytes: int) -> None:
        self._have += count_bytes
        if self._tenth() > self._tenths:
            self._tenths = self._tenth()
            speed = (self._have - self._began) / max(time.monotonic() - self._began_at, 1e-3)
            self.note(f"{self._name}: {self._tenths * 10} %, {speed / 1e6:,.1f} MB/s{self._left(speed)}")

    def note(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def done(self) -> None:
        pass

    def _tenth(self) -> int:
        return min(10 * self._have // self._total, 10) if self._total else 0

    def _left(self, speed: float) -> str:
        left = ((self._total or 0) - self._have) / max(speed, 1.0)
        return f", {left:,.0f} s left" if left >= 1 else ""


def kept_line(kept_bytes: int, command: str) -> str:
    """What is said of a download that was stopped."""
    if not kept_bytes:
        return f"Stopped. Nothing is kept of this one; the next `{command}` begins anew."
    return f"Stopped. {kept_bytes / 1e6:,.1f} MB are kept; the same `{command}` goes on from there."


class Watching:
    """A progress that ends with its `with` block, whatever happens. Written to standard error."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        self._progress: Bar | Lines = Bar(console) if console.is_terminal and sys.stderr.isatty() else Lines(console)

    def __enter__(self) -> Progress:
        return self._progress

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.done()

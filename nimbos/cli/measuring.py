"""What `nimbos doctor` and `nimbos bench` share: the model to measure, a machine that is free for it, a probe process
for each library, and a bar. Two engines never compute at the same time here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nimbos.cli.probe import Message, Opened, Order, Refused, Step, Timed, Timing
from nimbos.cli.running import ServerState
from nimbos.config import Settings
from nimbos.engine.engine import KEPT_ENVIRONMENT
from nimbos.engine.library import candidates, quiet_environment
from nimbos.errors import EngineFailed, InvalidRequest, NimbosError, NotReady
from nimbos.hub import Hub, LocalModel
from nimbos.models import check_memory, memory_budget_bytes

BUSY_SHARE = 0.15  # of all cores in other processes' hands, above which a measurement says more of them than of us
CPU_SHARE_MIN = 0.85  # of cores × time that a measurement must really get

OnStep = Callable[[int, int], None]


class NoModel(NimbosError):
    """Nothing is installed that could be measured."""


class Bar:
    """What runs now and how far it is, on standard error: a bar on a terminal, a line each elsewhere."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        self._shown = console.is_terminal and sys.stderr.isatty()
        self._rich = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._shown,
        )
        self._task = self._rich.add_task("", total=None)

    def begin(self, text: str) -> None:
        self._rich.reset(self._task, description=text, total=None)
        if not self._shown:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def at(self, done: int, total: int) -> None:
        self._rich.update(self._task, completed=done, total=total)

    def __enter__(self) -> Bar:
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()


@dataclass(frozen=True, slots=True)
class Choice:
    """A libllama that can be tried. `own`: the engine would try it too, in this order."""

    path: Path
    own: bool


def libraries(settings: Settings) -> list[Choice]:
    """Every libllama here, the engine's own order first. Raises: ConfigError, EngineFailed when there is none."""
    own = candidates(settings)
    unnamed = msgspec.structs.replace(settings.engine, library="")
    try:
        others = candidates(msgspec.structs.replace(settings, engine=unnamed))
    except EngineFailed:
        others = []
    tried = {path.resolve() for path in own}
    return [*(Choice(path, True) for path in own), *(Choice(p, False) for p in others if p.resolve() not in tried)]


def library_name(path: Path) -> str:
    return f"{path.parent.name} wheel" if path.is_file() else path.name


def rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 100 else 1}f} tokens/s"


def shown(line: str) -> str:
    """A line for a terminal: what a file says of itself must not steer it."""
    return "".join(character if character.isprintable() else "?" for character in line) + "\n"


def choose_model(hub: Hub, name: str | None) -> LocalModel:
    """The one that is named; else the default if it is here; else the first that can generate.

    Raises: ModelNotFound, ModelUnusable; InvalidRequest for one that does not generate; NoModel.
    """
    if name is not None:
        model = hub.find(name)
        if model.facts.kind != "generate":
            raise InvalidRequest(f"{model.id} makes no text, so there is nothing to time. Name one that generates.")
        return model
    found = {m.id: m for m in hub.models() if m.problem is None and m.facts.kind == "generate"}
    if not found:
        raise NoModel(f"No model is installed. `nimbos pull {hub.default_model}` brings a small one.")
    return found.get(hub.default_model) or next(iter(found.values()))


def require_memory(hub: Hub, model: LocalModel, settings: Settings) -> None:
    """Raises: ModelUnusable with the numbers, before anything is loaded."""
    check_memory(hub, model, settings.engine, budget_bytes=memory_budget_bytes(settings))


def why_not_now(server: ServerState | None) -> str | None:
    """Why measuring beside this server would be wrong, or None."""
    if server is None or not server.reachable:
        return None
    where = f"the server at {server.url} (process {server.pid})"
    if not server.ready:
        return f"{where} is loading a model or shutting down"
    if server.loaded is None:
        return f"{where} does not say which models it has loaded"
    if server.loaded:
        return f"{where} has loaded {', '.join(server.loaded)}"
    return None


def require_quiet(server: ServerState | None, *, force: bool) -> None:
    """Raises: NotReady when a server's engines would compute at the same time."""
    reason = why_not_now(server)
    if reason is not None and not force:
        raise NotReady(
            f"Not measured, as {reason}: two engines on the same cores slow each other down, and the numbers would be "
            "those of neither. Stop the server, or give --force."
        )


def look_at_library(path: Path) -> Opened | Refused:
    """In a process of its own, which confines itself."""
    answer = _probe(Order(library=str(path)))
    return answer if isinstance(answer, Opened | Refused) else Refused(reason="it gave no answer")


def time_library(path: Path, timing: Timing, bar: Bar, text: str) -> Timed | Refused:
    """In a process of its own, with `text` and its steps on the bar."""
    bar.begin(text)
    answer = _probe(Order(library=str(path), timing=timing), bar.at)
    return answer if isinstance(answer, Timed | Refused) else Refused(reason="it gave no answer")


def _probe(order: Order, on_step: OnStep | None = None) -> Message:
    """Runs a probe to its end. A process that crashes is a refusal that names the signal. Ctrl-C ends the process."""
    environment = {name: value for name in KEPT_ENVIRONMENT if (value := os.environ.get(name)) is not None}
    quiet_environment(environment)
    command = [sys.executable, "-P", "-m", "nimbos.cli.probe", msgspec.json.encode(order).decode()]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is ours to hear
        )
        try:
            assert process.stdout is not None
            last = _last_message(process.stdout, on_step)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        return last or Refused(reason=_last_words(code, errors))


def _last_message(lines: IO[bytes], on_step: OnStep | None) -> Message | None:
    last: Message | None = None
    for line in lines:
        try:
            message = msgspec.json.decode(line, type=Message)
        except msgspec.MsgspecError:
            continue  # a library that talks to stdout
        if not isinstance(message, Step):
            last = message
        elif on_step is not None:
            on_step(message.done, message.total)
    return last


def _last_words(code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read()[-2000:].decode(errors="replace").strip().splitlines()
    ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"its process ended with {ending}" + (f": {lines[-1]}" if lines else "")

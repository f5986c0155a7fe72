"""`nimbos fork`, `adopt`, `drop`, `replay`: what else could have come of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nimbos.cli.processes import PID

if TYPE_CHECKING:
    from rich.console import Console


def register(app: typer.Typer) -> None:
    for command in (fork, adopt, drop, replay):
        app.command()(command)


def fork(
    pid: PID,
    at: Annotated[
        int | None, typer.Option(min=1, help="The event after which it goes its own way; else the last.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=64, help="How many.")] = 1,
) -> None:
    """Fork a process; prints the forks' ids. What they do outside is withheld until one is adopted."""
    from nimbos import config
    from nimbos.cli.remote import Remote

    with Remote(config.load()) as remote:
        made = remote.fork(remote.find(pid), at=at, n=n)
    for fork in made:
        typer.echo(fork)


def adopt(pid: PID) -> None:
    """Make a fork real: what it does outside from now on is done."""
    from nimbos import config
    from nimbos.cli.remote import Remote, place

    with Remote(config.load()) as remote:
        whole = remote.find(pid)
        remote.post(place(whole, "adopt"))
    typer.echo(f"{whole} is adopted.")


def drop(pid: PID) -> None:
    """End a fork that is not wanted, and what it began."""
    from nimbos import config
    from nimbos.cli.remote import Remote, place

    with Remote(config.load()) as remote:
        whole = remote.find(pid)
        remote.delete(place(whole))
    typer.echo(f"{whole} is dropped.")


def replay(
    pid: PID,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Put the same questions to this one.")] = None,
) -> None:
    """Fold a process's log again, without doing anything; with a model, show where it says something else."""
    from rich.console import Console

    from nimbos import config
    from nimbos.cli.remote import Remote

    console = Console(highlight=False)
    with Remote(config.load()) as remote:
        for told in remote.replay(remote.find(pid), model):
            if told.kind == "answer":
                _show_answer(told.body, console)
            elif told.kind == "end":
                _show_end(told.body, console)


def _show_answer(answer: dict[str, Any], console: Console) -> None:
    from rich.text import Text

    from nimbos.cli.process_lines import short

    def line(mark: str, words: str, style: str = "") -> None:
        console.print(Text(f"{mark} {words}", style=style), soft_wrap=True)

    number, then, now = f"{answer['seq']:>5} ", _words(answer["then"]), answer["now"]
    if now is None or answer["same"]:
        line(f"{number} " if now is None else f"{number}=", short(then), "dim" if now is not None else "")
        return
    line(f"{number}-", short(then), "red")
    line(f"{'':>6}+", short(_words(now)), "green")
    common = answer["common_characters"]
    if common and not now["error"]:
        line(f"{'':>6} ", f"the same for {common:,} characters", "dim")


def _words(said: dict[str, Any]) -> str:
    calls = [f"→ {call['name']} {call['arguments']}" for call in said["calls"]]
    return " ".join(filter(None, [said["error"], said["text"], *calls]))


def _show_end(end: dict[str, Any], console: Console) -> None:
    """Raises: Conflict when the log says something else than the process."""
    from nimbos.cli.process_lines import state_of
    from nimbos.errors import Conflict

    if not end["agrees"]:
        raise Conflict(f"The log of {end['id']} folds to {state_of(end)}, and the process says something else.")
    console.print(
        f"{end['events']:,} events fold to {state_of(end)}, as the process says: {end['turns']:,} answers, "
        f"{end['calls']:,} calls.",
        soft_wrap=True,
    )

"""`nimbos pause`, `resume`, `kill`, `send`, `answer`: signals to a process."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nimbos.cli.processes import PID

if TYPE_CHECKING:
    from nimbos.cli.remote import Remote


def register(app: typer.Typer) -> None:
    for command in (pause, resume, kill, send, answer):
        app.command()(command)


def pause(pid: PID) -> None:
    """Pause a process. What comes for it meanwhile is kept."""
    _send(pid, "pause", "pauses")


def resume(pid: PID) -> None:
    """Let a paused process go on."""
    _send(pid, "resume", "goes on")


def kill(pid: PID) -> None:
    """End a process now, and its children."""
    _send(pid, "kill", "ends")


def send(
    pid: PID,
    message: Annotated[
        str, typer.Argument(metavar="TEXT", help="What it is told; a JSON object or array is sent as one.")
    ],
    id: Annotated[
        str | None, typer.Option(help="Of your own: with the same one it is the same message, and heard once.")
    ] = None,
) -> None:
    """Send a process a message. An agent hears it at once, also in the middle of an answer."""
    from nimbos import config
    from nimbos.cli.process_asking import value_of
    from nimbos.cli.remote import Remote
    from nimbos.errors import InvalidRequest

    if not message.strip():
        raise InvalidRequest("The message is empty.")
    with Remote(config.load()) as remote:
        whole = remote.find(pid)
        remote.signal_once(whole, "message", body=value_of(message), id=id)
    typer.echo(f"{whole} has your message.")


def answer(
    pid: PID,
    words: Annotated[
        str,
        typer.Argument(
            metavar="ANSWER",
            help="Words for a question; approve or refuse; happened, did_not, retry or abandon. Without: it asks here.",
        ),
    ] = "",
    about: Annotated[
        str | None, typer.Option(help="Which of several things that it asks, as `nimbos answer` lists.")
    ] = None,
    why: Annotated[str, typer.Option(help="Told to the process with a refusal.")] = "",
    result: Annotated[str | None, typer.Option(help="With `happened`: what came of it.")] = None,
    tokens: Annotated[int | None, typer.Option(min=0, help="So many tokens more.")] = None,
    money: Annotated[str | None, typer.Option(help="So much money more, such as 0.50.")] = None,
    seconds: Annotated[int | None, typer.Option(min=0, help="So many seconds of computing and of tools more.")] = None,
    calls: Annotated[int | None, typer.Option(min=0, help="So many calls more.")] = None,
) -> None:
    """Answer what a process asks: a question, an approval, an effect in doubt, a budget that is spent."""
    from nimbos import config
    from nimbos.cli.quantities import micros_of
    from nimbos.cli.remote import Remote
    from nimbos.errors import InvalidRequest

    amounts = {
        "tokens": tokens,
        "cost_micros": micros_of(money) if money is not None else None,
        "seconds": seconds,
        "calls": calls,
    }
    more = {meter: amount for meter, amount in amounts.items() if amount is not None}
    if more and (words or about or why or result is not None):
        raise InvalidRequest("Give an answer or more budget, not both.")
    with Remote(config.load()) as remote:
        whole = remote.find(pid)
        fields = {"signal": "top_up", "body": more} if more else _answer(remote, whole, words, about, why, result)
        remote.signal_once(whole, **fields)
    typer.echo(f"{whole} has {'more to spend' if more else 'its answer'}.")


def _answer(remote: Remote, pid: str, words: str, about: str | None, why: str, result: str | None) -> dict[str, Any]:
    """The fields of the signal. Raises: Conflict where it asks nothing; InvalidRequest."""
    from rich.console import Console

    from nimbos.cli.process_asking import ask, hint, signal_of
    from nimbos.cli.process_lines import state_of
    from nimbos.errors import Conflict, InvalidRequest

    process = remote.process(pid)
    asks = [one for one in process.get("asks", ()) if about in (None, one["about"])]
    if not asks:
        what = f"does not ask {about!r}" if process.get("asks") else f"asks nothing; it is {state_of(process)}"
        raise Conflict(f"The process {pid} {what}.")
    if len(asks) > 1:
        listed = "; ".join(f"{one['about']}: {one['question']}" for one in asks)
        raise Conflict(f"The process {pid} asks more than one thing: say which with --about. {listed}")
    if words:
        return signal_of(asks[0], words, why=why, result=result)
    fields = ask(asks[0], Console(stderr=True, highlight=False)) if sys.stdin.isatty() else None
    if fields is None:
        raise InvalidRequest(f"{asks[0]['question']} Answer with: {hint(pid, asks[0])}")
    return fields


def _send(pid: str, signal: str, words: str) -> None:
    from nimbos import config
    from nimbos.cli.remote import Remote

    with Remote(config.load()) as remote:
        whole = remote.find(pid)
        remote.signal(whole, signal)
    typer.echo(f"{whole} {words}.")

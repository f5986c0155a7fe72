"""Follows a process on the terminal until it ends: shows it, asks for it, and leaves it alone when told to.

Ctrl-C ends the watching, not the process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import typer

from nimbos.cli.conversation import ServerRefused
from nimbos.cli.process_asking import ask, hint
from nimbos.cli.process_screen import Screen
from nimbos.cli.remote import Remote, Told, place

OK, NOT_OK, DETACHED = 0, 1, 130


def watch(remote: Remote, pid: str, *, after: int = 0) -> int:
    """The exit code: 0 when it did what it was to do."""
    screen = Screen()
    try:
        for told in remote.follow(pid, after=after, watch=True):
            if told.kind == "end":
                screen.ended(told.body, _used(remote, pid))
                return ending_of(told.body)
            screen.show(told)
            if _asks(told):
                _answer(remote, pid, screen, told.body["seq"])
    except KeyboardInterrupt:
        typer.echo(f"\nIt goes on without you. Come back: nimbos logs {pid} -f   End it: nimbos kill {pid}", err=True)
        return DETACHED
    return NOT_OK


def _used(remote: Remote, pid: str) -> dict[str, int]:
    """By all that draw on its budget, itself included."""
    return {one["meter"]: one["used"] for one in remote.get(place(pid, "cost"))["budgets"]}


def ending_of(process: Mapping[str, Any]) -> int:
    return OK if process["reason"] == "ok" else NOT_OK


def _asks(told: Told) -> bool:
    return told.kind == "proc.state" and told.body["body"]["to"] == "asking"


def _answer(remote: Remote, pid: str, screen: Screen, seq: int) -> None:
    """What it asks since this event, if it still does."""
    process = remote.process(pid)
    if process["state"] != "asking" or process["events"] != seq:
        return
    for asked in process["asks"]:
        screen.line("")
        if not (sys.stdin.isatty() and screen.console.is_terminal):
            _tell(pid, screen, asked)
            continue
        fields = ask(asked, screen.console)
        if fields is None:
            _tell(pid, screen, asked)
            continue
        try:
            remote.signal_once(pid, **fields)
        except ServerRefused as error:  # somebody else was quicker
            screen.line(error.message, "red")


def _tell(pid: str, screen: Screen, asked: Mapping[str, Any]) -> None:
    screen.line(f"? {asked['question']}", "yellow")
    screen.line(f"  {hint(pid, asked)}", "dim")

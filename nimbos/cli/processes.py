"""`nimbos ps`, `logs`, `tree`, `cost`: the processes of the running server, and what they did."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nimbos.cli.remote import Remote

PID = Annotated[str, typer.Argument(metavar="PID", help="Its id, or a beginning of it that no other has.")]
_PIPE_COLUMNS = 200
_JSON = "Machine-readable, one document."
_TOKENS = {"INPUT": ("input", "cached"), "CACHED": ("cached",), "OUTPUT": ("output", "thinking")}
_OTHERS = {"CALLS": "calls", "SECONDS": "seconds_ms", "COST": "cost_micros"}


def register(app: typer.Typer) -> None:
    for command in (ps, logs, tree, cost):
        app.command()(command)


def ps(
    every: Annotated[bool, typer.Option("--all", "-a", help="Also those that are done.")] = False,
    json: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
) -> None:
    """List processes, newest first."""
    from nimbos import config
    from nimbos.cli.process_lines import moment, short, state_of
    from nimbos.cli.remote import Remote
    from nimbos.cli.tables import show_document, show_table

    with Remote(config.load()) as remote:
        found = list(remote.processes(**({} if every else {"state": "open"})))
    if json:
        show_document({"object": "list", "data": found})
        return
    names = ("ID", "STATE", "NAME", "MODEL", "TOKENS", "CHANGED", "RESULT")
    rows = [
        (
            one["id"],
            state_of(one),
            one["name"],
            one["model"],
            f"{one['usage'].get('tokens', 0):,}",
            moment(one["changed_ms"])[:19],
            _outcome(one, short),
        )
        for one in found
    ]
    show_table(names, rows, right=("TOKENS",))


def logs(
    pid: PID,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it is done.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check that nothing of it was altered.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The server's own words, one line for each event.")] = False,
) -> None:
    """Show what happened to a process: its log."""
    from nimbos import config
    from nimbos.cli.remote import Remote

    with Remote(config.load()) as remote:
        whole = remote.find(pid)
        if verify:
            _verify(remote, whole)
        elif follow:
            raise typer.Exit(_follow(remote, whole, json=json))
        else:
            for told in remote.events(whole):
                _show_event(told.body, json=json)


def tree(pid: PID, json: Annotated[bool, typer.Option("--json", help=_JSON)] = False) -> None:
    """Show a process and its children."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    from nimbos import config
    from nimbos.cli.process_lines import amounts, safe, state_of
    from nimbos.cli.remote import Remote
    from nimbos.cli.tables import show_document

    with Remote(config.load()) as remote:
        found = list(remote.tree(remote.find(pid)))
    if json:
        show_document({"object": "list", "data": found})
        return
    branches: dict[str, Tree] = {}
    for one in found:
        text = f"{one['id']}  {safe(one['name'])}  {state_of(one)}  {amounts(one['usage'])}"
        parent = branches.get(one["parent"] or "")
        branches[one["id"]] = parent.add(Text(text)) if parent is not None else Tree(Text(text))
    terminal = Console(highlight=False)
    wide = terminal if terminal.is_terminal else Console(highlight=False, width=_PIPE_COLUMNS)
    wide.print(branches[found[0]["id"]])


def cost(pid: PID, json: Annotated[bool, typer.Option("--json", help=_JSON)] = False) -> None:
    """Show what a process and its children spent, and what is left of its budget."""
    from nimbos import config
    from nimbos.cli.remote import Remote, place
    from nimbos.cli.tables import show_document

    with Remote(config.load()) as remote:
        found = remote.get(place(remote.find(pid), "cost"))
    if json:
        show_document(found)
    else:
        _show_cost(found)


def _show_cost(found: dict[str, Any]) -> None:
    from nimbos.cli.process_lines import quantity, state_of
    from nimbos.cli.tables import show_table

    def row(name: str, state: str, used: dict[str, int]) -> tuple[str, ...]:
        tokens = [f"{sum(used.get(meter, 0) for meter in meters):,}" for meters in _TOKENS.values()]
        rest = [quantity(meter, used.get(meter, 0)) for meter in _OTHERS.values()]
        return (name, state, *tokens, *rest)

    names = ("PROCESS", "STATE", *_TOKENS, *_OTHERS)
    rows = [row(one["id"], state_of(one), one["used"]) for one in found["processes"]]
    show_table(names, [*rows, row("total", "", found["total"])], right=names[2:])
    limited = [one for one in found["budgets"] if one["limit"] is not None]
    for one in limited:
        used, limit, left = (quantity(one["meter"], one[name]) for name in ("used", "limit", "left"))
        typer.echo(f"budget: {used} of {limit} {one['meter']} used, {left} left")


def _show_event(event: dict[str, Any], *, json: bool) -> None:
    import msgspec

    from nimbos.cli.process_lines import line_of, moment, printed_of

    if json:
        typer.echo(msgspec.json.encode(event).decode())
        return
    typer.echo(f"{event['seq']:>5}  {moment(event['ts_ms'])}  {event['kind']:<16}  {line_of(event)}")
    for line in printed_of(event):
        typer.echo(f"       │ {line}")


def _follow(remote: Remote, pid: str, *, json: bool) -> int:
    """The exit code. Ctrl-C ends the watching, not the process."""
    from nimbos.cli.process_watching import ending_of, watch

    if not json and sys.stdout.isatty():
        return watch(remote, pid)
    for told in remote.follow(pid, watch=False):
        if told.kind == "end":
            return ending_of(told.body)
        if told.seq is not None:
            _show_event(told.body, json=json)
    return 1


def _verify(remote: Remote, pid: str) -> None:
    """Raises: Conflict saying where it is broken."""
    from nimbos.cli.remote import place
    from nimbos.errors import Conflict

    found = remote.get(place(pid, "verify"))
    if found["broken_at"] is not None:
        raise Conflict(f"The log of {pid} is broken at event {found['broken_at']}: {found['why']}.")
    typer.echo(f"{found['events']:,} events, each chained to the one before. The last hash is {found['hash']}.")


def _outcome(one: dict[str, Any], short: Any) -> str:
    """What came of it, in a few words."""
    if one["error"]:
        return str(short(one["error"], 60))
    return "" if one["result"] is None else str(short(one["result"], 60))

"""`nimbos budget` and `nimbos prices`: what may be spent, and what tokens cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from nimbos.cli.key import Per

if TYPE_CHECKING:
    from nimbos.cli.admin import Admin

OWNER = "organisation, project:NAME, key:NAME, model:ID or process:ID."
_PERIOD = "day, month or total."
_KINDS = ("organisation", "project", "key", "model", "process")
_PRICED = ("input", "cached", "cache_write", "cache_read", "output", "thinking")


class PricesGroup(TyperGroup):
    """`nimbos prices FILE.toml` is `nimbos prices load FILE.toml`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].endswith(".toml"):
            args = ["load", *args]
        return super().resolve_command(ctx, args)


def register(app: typer.Typer) -> None:
    budget = typer.Typer(help="Budgets: what may be used in a day, a month or in total.")
    budget.callback(invoke_without_command=True)(_budget)
    budget.command()(show)
    budget.command(name="set")(set_budget)
    budget.command(name="raise")(raise_budget)
    budget.command()(remove)
    app.add_typer(budget, name="budget")
    prices = typer.Typer(cls=PricesGroup, help="Prices of tokens, by model, kind and class.")
    prices.callback(invoke_without_command=True)(_prices)
    prices.command(name="show")(show_prices)
    prices.command(name="set")(set_prices)
    prices.command()(load)
    app.add_typer(prices, name="prices")


def _budget(context: typer.Context) -> None:
    """Budgets: what may be used in a day, a month or in total. Without a command: show them."""
    if context.invoked_subcommand is None:
        show()


def _prices(context: typer.Context) -> None:
    """Prices of tokens, by model, kind and class. Without a command: show them; with a FILE.toml: take them from it."""
    if context.invoked_subcommand is None:
        show_prices()


def show(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
) -> None:
    """Show all budgets, and how much of them is left."""
    from nimbos import config
    from nimbos.cli.admin import connect
    from nimbos.cli.tables import show_document, show_table

    with connect(config.load()) as server:
        found = server.get("/v1/organization/budgets")["data"]
    if json:
        show_document(found)
        return
    if not found:
        typer.echo("No budgets yet. `nimbos budget set project:default --money 20 --per month` makes one.")
        return
    names = ("OWNER", "PER", "OF", "LIMIT", "USED", "HELD", "LEFT", "ALERTS")
    show_table(names, [_budget_row(budget) for budget in found], right=names[3:7])


def set_budget(
    owner: Annotated[str, typer.Argument(help=OWNER)],
    tokens: Annotated[int | None, typer.Option(min=0, help="So many tokens.")] = None,
    money: Annotated[str | None, typer.Option("--money", metavar="MONEY", help="So much money, like 12.50.")] = None,
    per: Annotated[Per, typer.Option(help="How often it is renewed; total: never.")] = Per.TOTAL,
    alert: Annotated[
        list[str] | None, typer.Option(help="Tell when so much is used; several times for several.")
    ] = None,
) -> None:
    """Set a budget, or change one. What is used stays used."""
    _post_budget(owner, tokens, money, per, key="limit", alerts=alert)


def raise_budget(
    owner: Annotated[str, typer.Argument(help=OWNER)],
    tokens: Annotated[int | None, typer.Option(min=0, help="So many tokens more.")] = None,
    money: Annotated[str | None, typer.Option("--money", metavar="MONEY", help="So much money more.")] = None,
    per: Annotated[Per, typer.Option(help="Which budget: " + _PERIOD)] = Per.TOTAL,
) -> None:
    """Add to a budget that is there."""
    _post_budget(owner, tokens, money, per, key="raise_by", alerts=None)


def remove(
    owner: Annotated[str, typer.Argument(help=OWNER)],
    money: Annotated[bool, typer.Option("--money", help="The budget of money, not that of tokens.")] = False,
    per: Annotated[Per, typer.Option(help="Which budget: " + _PERIOD)] = Per.TOTAL,
) -> None:
    """Remove a budget: its owner is no longer held by it."""
    from nimbos import config
    from nimbos.cli.admin import connect
    from nimbos.errors import NotFound

    kind, name = owner_of(owner)
    meter = "cost_micros" if money else "tokens"
    with connect(config.load()) as server:
        query = {"process_id": name} if kind == "process" else None
        found = [
            budget
            for budget in server.get("/v1/organization/budgets", query)["data"]
            if (budget["owner"]["kind"], budget["meter"], budget["period"]) == (kind, meter, per.value)
        ]
        budget = _chosen(server, found, kind, name)
        if budget is None:
            raise NotFound(f"The {owner} has no such budget; `nimbos budget` shows those there are.")
        server.delete(f"/v1/organization/budgets/{budget['id']}")
    typer.echo(f"The budget of the {owner} is removed.", err=True)


def _chosen(server: Admin, found: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any] | None:
    """By the owner's id, or its name: that of a living one, as one that was revoked or archived may have had the same,
    and still has its budget.

    Raises: Conflict for a name of several.
    """
    from nimbos.cli.key import find_key, find_project
    from nimbos.errors import Conflict, NotFound

    by_id = {budget["owner"]["id"]: budget for budget in found}
    if kind == "organisation":
        return found[0] if found else None
    if name in by_id or kind not in ("key", "project"):
        return by_id.get(name)
    try:
        return by_id.get(find_project(server, name) if kind == "project" else find_key(server, name, None)["id"])
    except NotFound as error:
        called = {owner: budget for owner, budget in by_id.items() if budget["owner"]["name"] == name}
        if len(called) > 1:
            raise Conflict(f"Several had the name {name!r}: give one of their ids ({', '.join(called)}).") from error
        return next(iter(called.values()), None)


def show_prices(
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, one document.")] = False,
) -> None:
    """Show the present prices, for a million tokens."""
    from nimbos import config
    from nimbos.cli.admin import connect
    from nimbos.cli.tables import show_document

    with connect(config.load()) as server:
        table = server.get("/v1/organization/prices")
    if json:
        show_document(table)
    else:
        _show_prices(table)


def set_prices(
    model: Annotated[str, typer.Argument(help="A model's id, or * for all that have no price of their own.")],
    input: Annotated[str | None, typer.Option(metavar="MONEY", help="A million tokens of prompt.")] = None,
    cached: Annotated[str | None, typer.Option(metavar="MONEY", help="Of prompt that was in memory.")] = None,
    cache_write: Annotated[
        str | None, typer.Option(metavar="MONEY", help="Of a prefix that is to be kept, when it is computed.")
    ] = None,
    cache_read: Annotated[
        str | None, typer.Option(metavar="MONEY", help="Of a prefix that was kept on demand, when it is found.")
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="MONEY", help="A million tokens of answer.")] = None,
    thinking: Annotated[str | None, typer.Option(metavar="MONEY", help="Of thinking.")] = None,
    ask_class: Annotated[
        str, typer.Option("--class", help="interactive, agent or batch; without it all that have no own price.")
    ] = "*",
) -> None:
    """Set prices of one model. What was asked before keeps the old ones."""
    from nimbos.cli.quantities import micros_of
    from nimbos.errors import InvalidRequest

    values = (input, cached, cache_write, cache_read, output, thinking)
    given = dict(zip(_PRICED, values, strict=True))
    prices = [
        {"model": model, "meter": meter, "class": ask_class, "micros_per_million": micros_of(money)}
        for meter, money in given.items()
        if money is not None
    ]
    if not prices:
        raise InvalidRequest("Give a price: --input, --cached, --cache-write, --cache-read, --output, --thinking.")
    _change_prices({"prices": prices})


def load(
    file: Annotated[Path, typer.Argument(help="A table for each model, and in it one for each class.")],
) -> None:
    """Take all prices from a file: these and no others."""
    _change_prices({"prices": prices_of(file), "replace": True})


def prices_of(file: Path) -> list[dict[str, Any]]:
    """Raises: InvalidRequest naming the file and what is wrong in it."""
    import tomllib
    from decimal import Decimal

    from nimbos.cli.quantities import exact_money
    from nimbos.errors import InvalidRequest

    try:
        tables = tomllib.loads(file.read_text(), parse_float=Decimal)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file}: {error}") from error
    except OSError as error:
        raise InvalidRequest(f"The file {file} of prices cannot be read: {error.strerror}.") from error
    prices: list[dict[str, Any]] = []

    def read(model: str, ask_class: str, table: dict[str, Any]) -> None:
        for name, value in table.items():
            if isinstance(value, dict) and ask_class == "*":
                read(model, name, value)
            elif name not in _PRICED or isinstance(value, bool) or not isinstance(value, str | int | Decimal):
                raise InvalidRequest(f"{file}: [{model}] has {name!r}; there are {', '.join(_PRICED)} and classes.")
            else:
                price = {"meter": name, "class": ask_class, "micros_per_million": exact_money(value)}
                prices.append({"model": model, **price})

    for model, table in tables.items():
        if not isinstance(table, dict):
            raise InvalidRequest(f"{file}: {model!r} must be a table, like [{model}].")
        read(model, "*", table)
    return prices


def _post_budget(
    owner: str, tokens: int | None, money: str | None, per: Per, *, key: str, alerts: list[str] | None
) -> None:
    from nimbos import config
    from nimbos.cli.admin import connect
    from nimbos.cli.quantities import micros_of
    from nimbos.cli.tables import show_table
    from nimbos.errors import InvalidRequest

    if (tokens is None) == (money is None):
        raise InvalidRequest("Give one of --tokens and --money.")
    kind, name = owner_of(owner)
    body: dict[str, Any] = {"owner_kind": kind, "owner_id": name, "period": per.value}
    if money is not None:
        body |= {"meter": "cost_micros", key: micros_of(money)}
    else:
        body |= {"meter": "tokens", key: tokens}
    if alerts:
        body["alerts_at"] = [_alert(one, in_money=money is not None) for one in alerts]
    with connect(config.load()) as server:
        made = server.post("/v1/organization/budgets", body)
    names = ("OWNER", "PER", "OF", "LIMIT", "USED", "HELD", "LEFT", "ALERTS")
    show_table(names, [_budget_row(made)], right=names[3:7])


def _alert(text: str, *, in_money: bool) -> int:
    from nimbos.cli.quantities import micros_of
    from nimbos.errors import InvalidRequest

    if in_money:
        return micros_of(text)
    if not text.isascii() or not text.isdigit():
        raise InvalidRequest(f"{text[:60]!r} is no number of tokens.")
    return int(text)


def owner_of(text: str) -> tuple[str, str]:
    from nimbos.errors import InvalidRequest

    kind, _, name = text.partition(":")
    if kind not in _KINDS or (kind != "organisation") != bool(name):
        raise InvalidRequest(f"{text[:60]!r} is nobody with a budget; there are {OWNER}")
    return kind, name


def _budget_row(budget: dict[str, Any]) -> tuple[str, ...]:
    from nimbos.cli.quantities import money_of
    from nimbos.cli.tables import count

    in_money = budget["meter"] == "cost_micros"

    def shown(number: int | None) -> str:
        return money_of(number) if in_money and number is not None else count(number)

    of = budget["owner"]
    alerts = [f"{shown(one['threshold'])}{' (told)' if one['fired_ms'] else ''}" for one in budget["alerts"]]
    return (
        of["kind"] if of["kind"] == "organisation" else f"{of['kind']}:{of['name'] or of['id']}",
        budget["period"],
        "money" if in_money else "tokens",
        shown(budget["limit"]),
        shown(budget["used"]),
        shown(budget["reserved"]),
        shown(budget["remaining"]),
        ", ".join(alerts),
    )


def _change_prices(body: dict[str, Any]) -> None:
    from nimbos import config
    from nimbos.cli.admin import connect

    with connect(config.load()) as server:
        _show_prices(server.post("/v1/organization/prices", body))


def _show_prices(table: dict[str, Any]) -> None:
    from nimbos.cli.quantities import money_of
    from nimbos.cli.tables import show_table

    if not table["prices"]:
        typer.echo("No prices: everything is free. `nimbos prices set '*' --input 0.10 --output 0.40` sets some.")
        return
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for price in table["prices"]:
        rows.setdefault((price["model"], price["class"]), {})[price["meter"]] = money_of(price["micros_per_million"])
    names = ("MODEL", "CLASS", *(meter.upper() for meter in _PRICED))
    show_table(
        names,
        [(*which, *(of.get(meter, "") for meter in _PRICED)) for which, of in rows.items()],
        right=names[2:],
    )
    typer.echo(f"Version {table['version']}, for a million tokens.", err=True)

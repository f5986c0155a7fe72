"""`/v1/organization/prices`: what tokens cost. A change makes a new version; asks keep the one they began with."""

from __future__ import annotations

import msgspec

from nimbos.accounts import Action
from nimbos.accounts.words import Changed
from nimbos.api.admin.desk import AdminRoute, Call, get, post
from nimbos.db import Transaction
from nimbos.errors import InvalidRequest
from nimbos.ledger import Price, PriceTable, current_table, set_prices

PRICES = "/v1/organization/prices"
PRICES_MAX = 1000


class PriceBody(msgspec.Struct, kw_only=True):
    """Millionths of the currency for a million tokens. `*`: every model, every class."""

    model: str = "*"
    meter: str
    ask_class: str = msgspec.field(name="class", default="*")
    micros_per_million: int


class PricesBody(msgspec.Struct, kw_only=True):
    object: str = "organization.prices"
    version: int
    prices: list[PriceBody]

    @classmethod
    def of(cls, table: PriceTable) -> PricesBody:
        bodies = [
            PriceBody(
                model=price.model,
                meter=price.meter,
                ask_class=price.ask_class,
                micros_per_million=price.micros_per_million,
            )
            for price in table.prices()
        ]
        return cls(version=table.version, prices=bodies)


class RemovedPrice(msgspec.Struct, kw_only=True):
    model: str = "*"
    meter: str
    ask_class: str = msgspec.field(name="class", default="*")


class PricesUpdate(msgspec.Struct, kw_only=True):
    """Changes of the present table; with `replace` these and no others."""

    prices: tuple[PriceBody, ...] = ()
    removed: tuple[RemovedPrice, ...] = ()
    replace: bool = False


async def show_prices(call: Call) -> PricesBody:
    return PricesBody.of(await call.read(current_table))


async def change_prices(call: Call) -> PricesBody:
    wanted = call.body(PricesUpdate)
    if len(wanted.prices) > PRICES_MAX or len(wanted.removed) > PRICES_MAX:
        raise InvalidRequest(f"There may be {PRICES_MAX} prices in one change.", param="prices")
    changes = [
        Price(
            model=price.model,
            meter=price.meter,
            ask_class=price.ask_class,
            micros_per_million=price.micros_per_million,
        )
        for price in wanted.prices
    ]
    removed = [
        Price(model=price.model, meter=price.meter, ask_class=price.ask_class, micros_per_million=0)
        for price in wanted.removed
    ]

    def change() -> Transaction[Changed[PricesBody]]:
        before = yield from current_table()
        version = yield from set_prices(changes, removed=removed, replace=wanted.replace)
        after = PricesBody.of((yield from current_table()))
        return Changed(
            value=after,
            action="prices.updated",
            target=f"prices {version}",
            before=msgspec.to_builtins(PricesBody.of(before)),
            after=msgspec.to_builtins(after),
        )

    return await call.change(change)


def routes() -> list[AdminRoute]:
    return [get(PRICES, Action.SEE, show_prices), post(PRICES, Action.PRICES, change_prices)]

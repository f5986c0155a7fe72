"""Spend limits in OpenAI's own words, of a project and of the organisation: the ledger's budget of money of a month.

Cents there are ten thousand millionths here. `spend_alerts.py` has the thresholds of the same budgets.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from nimbos.accounts import Action
from nimbos.accounts.words import Changed
from nimbos.api.admin.allowances import budget_there
from nimbos.api.admin.desk import AdminRoute, Call, get, post, remove
from nimbos.api.admin.owners import Owner, find_owner
from nimbos.api.admin.projects import PROJECTS
from nimbos.db import Transaction
from nimbos.errors import InvalidRequest, NotFound
from nimbos.ledger import (
    Budget,
    alerts_of,
    remove_budget,
    set_budget,
)

ORGANISATION = "/v1/organization"
MICROS_PER_CENT = 10_000
CENTS_MAX = 10**11


class SpendLimitUpdate(msgspec.Struct, kw_only=True):
    threshold_amount: int
    currency: Literal["USD"]
    interval: Literal["month"]


class Enforcement(msgspec.Struct, kw_only=True):
    status: str


class SpendLimitBody(msgspec.Struct, kw_only=True):
    object: str
    threshold_amount: int
    currency: str = "USD"
    interval: str = "month"
    enforcement: Enforcement


class SpendLimitDeleted(msgspec.Struct, kw_only=True):
    object: str
    deleted: bool = True


async def retrieve_spend_limit(call: Call) -> SpendLimitBody:
    return await call.read(lambda: _spend_limit(call))


async def update_spend_limit(call: Call) -> SpendLimitBody:
    wanted = call.body(SpendLimitUpdate)
    limit = micros(wanted.threshold_amount)

    def change() -> Transaction[Changed[SpendLimitBody]]:
        owner = yield from owner_called(call)
        before = yield from months_money(owner)
        after = yield from set_money(owner, limit)
        return Changed(
            value=_spend_limit_body(owner, after),
            action="spend_limit.updated",
            target=owner.id,
            project=owner.project,
            before=before,
            after=after,
        )

    return await call.change(change)


async def remove_spend_limit(call: Call) -> SpendLimitDeleted:
    """Its alerts stay; without any the budget goes."""

    def change() -> Transaction[Changed[Owner]]:
        owner = yield from owner_called(call)
        before = yield from _limited_money(owner)
        if (yield from alerts_of(before.id)):
            yield from set_money(owner, None)
        else:
            yield from remove_budget(before.id)
        return Changed(value=owner, action="spend_limit.deleted", target=owner.id, project=owner.project, before=before)

    owner = await call.change(change)
    return SpendLimitDeleted(object=f"{word(owner)}.spend_limit.deleted")


def _spend_limit(call: Call) -> Transaction[SpendLimitBody]:
    owner = yield from owner_called(call)
    return _spend_limit_body(owner, (yield from _limited_money(owner)))


def _spend_limit_body(owner: Owner, budget: Budget) -> SpendLimitBody:
    assert budget.limit is not None
    enforcing = budget.used >= budget.limit
    return SpendLimitBody(
        object=f"{word(owner)}.spend_limit",
        threshold_amount=budget.limit // MICROS_PER_CENT,
        enforcement=Enforcement(status="enforcing" if enforcing else "inactive"),
    )


def owner_called(call: Call) -> Transaction[Owner]:
    project_id = call.path.get("project_id")
    kind: Literal["project", "organisation"] = "organisation" if project_id is None else "project"
    return (yield from find_owner(kind, project_id or ""))


def word(owner: Owner) -> str:
    return "project" if owner.kind == "project" else "organization"


def months_money(owner: Owner) -> Transaction[Budget | None]:
    return (yield from budget_there(owner.kind, owner.id, meter="cost_micros", period="month"))


def _limited_money(owner: Owner) -> Transaction[Budget]:
    budget = yield from months_money(owner)
    if budget is None or budget.limit is None:
        raise NotFound(f"There is no spend limit for the {owner.kind} {owner.name!r}.")
    return budget


def set_money(owner: Owner, limit: int | None) -> Transaction[Budget]:
    return (
        yield from set_budget(
            owner.kind, owner.id, owner_name=owner.name, meter="cost_micros", limit=limit, period="month"
        )
    )


def micros(cents: int) -> int:
    if not 0 <= cents <= CENTS_MAX:
        raise InvalidRequest(
            f"`threshold_amount` is from 0 to {CENTS_MAX} cents, not {cents}.", param="threshold_amount"
        )
    return cents * MICROS_PER_CENT


def routes() -> list[AdminRoute]:
    found = []
    for owner in (f"{PROJECTS}/{{project_id}}", ORGANISATION):
        limit = f"{owner}/spend_limit"
        found += [
            get(limit, Action.SEE, retrieve_spend_limit),
            post(limit, Action.LIMITS, update_spend_limit),
            remove(limit, Action.LIMITS, remove_spend_limit),
        ]
    return found

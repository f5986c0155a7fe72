"""Limits, budgets and their alerts: what an owner may use, set and shown. What they do is the ledger's (`ledger/`)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType
from sqlalchemy import Text, bindparam, literal_column, select

from nimbos.accounts import Action
from nimbos.accounts.words import Changed
from nimbos.api.admin.desk import AdminRoute, Call, Page, get, post, remove
from nimbos.api.admin.owners import OwnerBody, OwnerKind, find_owner, project_of
from nimbos.api.admin.projects import Deleted
from nimbos.db import Statement, Transaction
from nimbos.db.tables.processes import processes
from nimbos.errors import Conflict, InvalidRequest
from nimbos.ledger import (
    Alert,
    Budget,
    Limit,
    alerts_of,
    all_budgets,
    all_limits,
    budgets_of,
    find_budget,
    limits_of,
    remove_budget,
    set_budget,
    set_limit,
)

_LIVES = Statement(
    select(processes.c.id).where(
        processes.c.id == bindparam("id", type_=Text), processes.c.state != literal_column("'done'")
    )
)

BUDGETS = "/v1/organization/budgets"
LIMITS = "/v1/organization/limits"

Meter = Literal["tokens", "cost_micros"]
Period = Literal["day", "month", "total"]


class BudgetWanted(msgspec.Struct, kw_only=True):
    """`limit` null: it counts, and holds nothing. `alerts_at`: thresholds in the meter's unit."""

    meter: Meter
    limit: int | None
    period: Period = "total"
    alerts_at: tuple[int, ...] | None = None


class Allowance(msgspec.Struct, kw_only=True):
    """What a new key may use, from its first ask on. A burst is how much may come at once after a pause."""

    requests_per_min: int | None = None
    requests_burst: int | None = None
    tokens_per_min: int | None = None
    tokens_burst: int | None = None
    concurrent: int | None = None
    budgets: tuple[BudgetWanted, ...] = ()


class AlertBody(msgspec.Struct, kw_only=True):
    id: str
    threshold: int
    fired_ms: int | None


class BudgetBody(msgspec.Struct, kw_only=True):
    """`used` and `reserved` in the meter's unit: tokens, or millionths of the currency."""

    id: str
    object: str = "organization.budget"
    owner: OwnerBody
    meter: str
    period: str
    limit: int | None
    used: int
    reserved: int
    remaining: int | None
    alerts: list[AlertBody]

    @classmethod
    def of(cls, budget: Budget, alerts: list[Alert]) -> BudgetBody:
        rest = None if budget.limit is None else max(0, budget.limit - budget.used - budget.reserved)
        return cls(
            id=budget.id,
            owner=OwnerBody(kind=budget.owner_kind, id=budget.owner_id, name=budget.owner_name),
            meter=budget.meter,
            period=budget.period,
            limit=budget.limit,
            used=budget.used,
            reserved=budget.reserved,
            remaining=rest,
            alerts=[AlertBody(id=one.id, threshold=one.threshold, fired_ms=one.fired_ms) for one in alerts],
        )


class BudgetSet(msgspec.Struct, kw_only=True):
    """`limit` sets, `raise_by` adds to the limit that is there; one of them. `owner_id`: a name or an id."""

    owner_kind: OwnerKind
    owner_id: str = ""
    meter: Meter
    period: Period = "total"
    limit: int | UnsetType | None = UNSET
    raise_by: int | None = None
    alerts_at: tuple[int, ...] | None = None


class LimitBody(msgspec.Struct, kw_only=True):
    object: str = "organization.limit"
    id: str
    owner: OwnerBody
    model: str
    requests_per_min: int | None
    requests_burst: int | None
    tokens_per_min: int | None
    tokens_burst: int | None
    concurrent: int | None

    @classmethod
    def of(cls, limit: Limit) -> LimitBody:
        return cls(
            id=f"{limit.owner_kind}/{limit.owner_id}/{limit.model}",
            owner=OwnerBody(kind=limit.owner_kind, id=limit.owner_id, name=limit.owner_name),
            model=limit.model,
            requests_per_min=limit.requests_per_min,
            requests_burst=limit.requests_burst,
            tokens_per_min=limit.tokens_per_min,
            tokens_burst=limit.tokens_burst,
            concurrent=limit.concurrent,
        )


class LimitSet(msgspec.Struct, kw_only=True):
    """The whole limit of one owner for one model, or `*` for all together; what is null is not limited."""

    owner_kind: OwnerKind
    owner_id: str = ""
    model: str = "*"
    requests_per_min: int | None = None
    requests_burst: int | None = None
    tokens_per_min: int | None = None
    tokens_burst: int | None = None
    concurrent: int | None = None


def allow(kind: OwnerKind, owner_id: str, name: str, allowance: Allowance) -> Transaction[None]:
    """Limits and budgets of a new owner. Raises: InvalidRequest."""
    yield from set_limit(
        kind,
        owner_id,
        owner_name=name,
        requests_per_min=allowance.requests_per_min,
        requests_burst=allowance.requests_burst,
        tokens_per_min=allowance.tokens_per_min,
        tokens_burst=allowance.tokens_burst,
        concurrent=allowance.concurrent,
    )
    for wanted in allowance.budgets:
        yield from set_budget(
            kind,
            owner_id,
            owner_name=name,
            meter=wanted.meter,
            limit=wanted.limit,
            period=wanted.period,
            alerts_at=wanted.alerts_at,
        )


async def list_budgets(call: Call) -> Page:
    """From the root. All of them: whoever sets budgets sets few. Those of a process are told alone (`process_id`)."""
    process = call.query.text("process_id")

    def read() -> Transaction[list[BudgetBody]]:
        found = yield from (all_budgets() if process is None else budgets_of("process", process))
        told = {}
        for budget in found:
            told[budget.id] = yield from alerts_of(budget.id)
        return [BudgetBody.of(budget, told[budget.id]) for budget in found]

    return whole(await call.read(read))


async def set_one_budget(call: Call) -> BudgetBody:
    wanted = call.body(BudgetSet)
    if (wanted.limit is UNSET) == (wanted.raise_by is None):
        raise InvalidRequest("Give one of `limit` and `raise_by`.", param="limit")

    def change() -> Transaction[Changed[BudgetBody]]:
        owner = yield from find_owner(wanted.owner_kind, wanted.owner_id)
        before = yield from budget_there(owner.kind, owner.id, meter=wanted.meter, period=wanted.period)
        after = yield from set_budget(
            owner.kind,
            owner.id,
            owner_name=owner.name,
            meter=wanted.meter,
            limit=_limit_wanted(wanted, before),
            period=wanted.period,
            alerts_at=wanted.alerts_at,
        )
        body = BudgetBody.of(after, (yield from alerts_of(after.id)))
        return Changed(
            value=body,
            action="budget.updated",
            target=after.id,
            project=owner.project,
            before=before,
            after=msgspec.to_builtins(body),
        )

    return await call.change(change)


async def remove_one_budget(call: Call) -> Deleted:
    def change() -> Transaction[Changed[Budget]]:
        before = yield from find_budget(call.path["budget_id"])
        if (before.owner_kind, before.period) == ("process", "total") and (yield _LIVES(id=before.owner_id)):
            raise Conflict(f"{before.owner} counts in the budget {before.id} to its end; `nimbos budget raise` it.")
        project = yield from project_of(before.owner_kind, before.owner_id)
        yield from remove_budget(before.id)
        return Changed(value=before, action="budget.deleted", target=before.id, project=project, before=before)

    budget = await call.change(change)
    return Deleted(id=budget.id, object="organization.budget.deleted")


async def list_limits(call: Call) -> Page:
    return whole([LimitBody.of(limit) for limit in await call.read(all_limits)])


async def set_one_limit(call: Call) -> LimitBody:
    wanted = call.body(LimitSet)

    def change() -> Transaction[Changed[Limit]]:
        owner = yield from find_owner(wanted.owner_kind, wanted.owner_id)
        before = yield from limit_there(owner.kind, owner.id, wanted.model)
        after = yield from set_limit(
            owner.kind,
            owner.id,
            wanted.model,
            owner_name=owner.name,
            requests_per_min=wanted.requests_per_min,
            requests_burst=wanted.requests_burst,
            tokens_per_min=wanted.tokens_per_min,
            tokens_burst=wanted.tokens_burst,
            concurrent=wanted.concurrent,
        )
        return Changed(
            value=after,
            action="rate_limit.updated",
            target=owner.id,
            project=owner.project,
            before=before,
            after=asdict(after),
        )

    return LimitBody.of(await call.change(change))


def budget_there(kind: str, owner_id: str, *, meter: str, period: str) -> Transaction[Budget | None]:
    found = yield from budgets_of(kind, owner_id)
    return next((budget for budget in found if (budget.meter, budget.period) == (meter, period)), None)


def limit_there(kind: str, owner_id: str, model: str) -> Transaction[Limit | None]:
    found = yield from limits_of(kind, owner_id)
    return next((limit for limit in found if limit.model == model), None)


def _limit_wanted(wanted: BudgetSet, before: Budget | None) -> int | None:
    if wanted.raise_by is None:
        assert wanted.limit is not UNSET
        return wanted.limit
    if before is None or before.limit is None:
        raise Conflict("There is no such budget to raise; set one first.")
    return before.limit + wanted.raise_by


def whole(bodies: list[BudgetBody] | list[LimitBody]) -> Page:
    return Page(
        data=list(bodies),
        first_id=bodies[0].id if bodies else None,
        last_id=bodies[-1].id if bodies else None,
        has_more=False,
    )


def routes() -> list[AdminRoute]:
    return [
        get(BUDGETS, Action.SEE, list_budgets),
        post(BUDGETS, Action.LIMITS, set_one_budget),
        remove(f"{BUDGETS}/{{budget_id}}", Action.LIMITS, remove_one_budget),
        get(LIMITS, Action.SEE, list_limits),
        post(LIMITS, Action.LIMITS, set_one_limit),
    ]

"""OpenAI's own words for limits: a project's rate limits, spend limits and spend alerts, on the ledger's limits and
budgets.

A spend limit is the budget of money of a month; cents there are ten thousand millionths here. Alerts are told in the
log, the metrics and here: this server sends no mail, and keeps the recipients for whoever reads them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import msgspec

from nimbos.accounts import Action
from nimbos.accounts.words import Changed
from nimbos.api.admin.allowances import budget_there, limit_there
from nimbos.api.admin.desk import AdminRoute, Call, Page, Window, get, post, remove
from nimbos.api.admin.owners import Owner, find_owner
from nimbos.api.admin.projects import PROJECTS, Deleted
from nimbos.db import Transaction
from nimbos.errors import InvalidRequest, NotFound
from nimbos.ledger import (
    Alert,
    Budget,
    Limit,
    add_alert,
    alerts_of,
    change_alert,
    find_alert,
    limits_of,
    remove_alert,
    remove_budget,
    set_budget,
    set_limit,
)

ORGANISATION = "/v1/organization"
UNLIMITED = 10**12  # what a limit shows that is not set; OpenAI's clients know no null there
MICROS_PER_CENT = 10_000
CENTS_MAX = 10**11
RECIPIENTS_MAX = 50
_PREFIX = "rl-"
_OTHER_LIMITS = {
    "batch_1_day_max_input_tokens": "give the project a budget of tokens a day",
    "max_audio_megabytes_per_1_minute": "no model here takes audio",
    "max_images_per_1_minute": "no model here takes images",
    "max_requests_per_1_day": "limits are per minute; budgets are per day",
}


class RateLimitExtension(msgspec.Struct, kw_only=True):
    requests_burst: int | None
    tokens_burst: int | None
    concurrent: int | None


class RateLimitBody(msgspec.Struct, kw_only=True):
    """`model` `*`: all of them together."""

    id: str
    object: str = "project.rate_limit"
    model: str
    max_requests_per_1_minute: int
    max_tokens_per_1_minute: int
    x_nimbos: RateLimitExtension

    @classmethod
    def of(cls, limit: Limit) -> RateLimitBody:
        return cls(
            id=f"{_PREFIX}{limit.model}",
            model=limit.model,
            max_requests_per_1_minute=_shown(limit.requests_per_min),
            max_tokens_per_1_minute=_shown(limit.tokens_per_min),
            x_nimbos=RateLimitExtension(
                requests_burst=limit.requests_burst, tokens_burst=limit.tokens_burst, concurrent=limit.concurrent
            ),
        )


class RateLimitUpdate(msgspec.Struct, kw_only=True):
    max_requests_per_1_minute: int | None = None
    max_tokens_per_1_minute: int | None = None


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


class Channel(msgspec.Struct, kw_only=True):
    type: Literal["email"]
    recipients: tuple[str, ...]
    subject_prefix: str | None = None


class SpendAlertUpdate(msgspec.Struct, kw_only=True):
    threshold_amount: int
    currency: Literal["USD"]
    interval: Literal["month"]
    notification_channel: Channel


class SpendAlertExtension(msgspec.Struct, kw_only=True):
    fired_ms: int | None


class SpendAlertBody(msgspec.Struct, kw_only=True):
    id: str
    object: str
    threshold_amount: int
    currency: str = "USD"
    interval: str = "month"
    notification_channel: Channel
    x_nimbos: SpendAlertExtension


# --- rate limits


async def list_rate_limits(call: Call) -> Page:
    """Those that are set, and `*`."""
    window = Window.of(call.query, default=100)
    call.query.text("before")

    def read() -> Transaction[list[Limit]]:
        owner = yield from find_owner("project", call.path["project_id"])
        found = yield from limits_of("project", owner.id)
        if all(limit.model != "*" for limit in found):
            found.append(Limit(owner_kind="project", owner_id=owner.id))
        return found

    bodies = sorted((RateLimitBody.of(limit) for limit in await call.read(read)), key=lambda body: body.id)
    return window.page([body for body in bodies if body.id > window.after][: window.limit + 1])


async def update_rate_limit(call: Call) -> RateLimitBody:
    wanted = call.body(RateLimitUpdate, refused=_OTHER_LIMITS)
    model = call.path["rate_limit_id"].removeprefix(_PREFIX)

    def change() -> Transaction[Changed[Limit]]:
        owner = yield from find_owner("project", call.path["project_id"])
        before = yield from limit_there("project", owner.id, model)
        now = before or Limit(owner_kind="project", owner_id=owner.id, model=model)
        after = yield from set_limit(
            "project",
            owner.id,
            model,
            owner_name=owner.name,
            requests_per_min=_wanted(wanted.max_requests_per_1_minute, now.requests_per_min),
            tokens_per_min=_wanted(wanted.max_tokens_per_1_minute, now.tokens_per_min),
            requests_burst=now.requests_burst,
            tokens_burst=now.tokens_burst,
            concurrent=now.concurrent,
        )
        return Changed(
            value=after,
            action="rate_limit.updated",
            target=f"{_PREFIX}{model}",
            project=owner.id,
            before=before,
            after=asdict(after),
        )

    return RateLimitBody.of(await call.change(change))


def _shown(limit: int | None) -> int:
    return UNLIMITED if limit is None else limit


def _wanted(given: int | None, before: int | None) -> int | None:
    if given is None:
        return before
    return None if given >= UNLIMITED else given


# --- spend limits


async def retrieve_spend_limit(call: Call) -> SpendLimitBody:
    return await call.read(lambda: _spend_limit(call))


async def update_spend_limit(call: Call) -> SpendLimitBody:
    wanted = call.body(SpendLimitUpdate)
    limit = _micros(wanted.threshold_amount)

    def change() -> Transaction[Changed[SpendLimitBody]]:
        owner = yield from _owner(call)
        before = yield from _months_money(owner)
        after = yield from _set_money(owner, limit)
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
        owner = yield from _owner(call)
        before = yield from _limited_money(owner)
        if (yield from alerts_of(before.id)):
            yield from _set_money(owner, None)
        else:
            yield from remove_budget(before.id)
        return Changed(value=owner, action="spend_limit.deleted", target=owner.id, project=owner.project, before=before)

    owner = await call.change(change)
    return SpendLimitDeleted(object=f"{_word(owner)}.spend_limit.deleted")


def _spend_limit(call: Call) -> Transaction[SpendLimitBody]:
    owner = yield from _owner(call)
    return _spend_limit_body(owner, (yield from _limited_money(owner)))


def _spend_limit_body(owner: Owner, budget: Budget) -> SpendLimitBody:
    assert budget.limit is not None
    enforcing = budget.used >= budget.limit
    return SpendLimitBody(
        object=f"{_word(owner)}.spend_limit",
        threshold_amount=budget.limit // MICROS_PER_CENT,
        enforcement=Enforcement(status="enforcing" if enforcing else "inactive"),
    )


# --- spend alerts


async def list_spend_alerts(call: Call) -> Page:
    window = Window.of(call.query)
    order = call.query.one_of("order", ("asc", "desc"), absent="desc")
    before = call.query.text("before")

    def read() -> Transaction[list[SpendAlertBody]]:
        owner = yield from _owner(call)
        budget = yield from _months_money(owner)
        found = [] if budget is None else (yield from alerts_of(budget.id))
        return [_alert_body(owner, alert) for alert in found]

    bodies = sorted(await call.read(read), key=lambda body: body.id, reverse=order == "desc")
    ids = [body.id for body in bodies]
    if window.after:
        bodies = bodies[ids.index(window.after) + 1 :] if window.after in ids else []
    elif before is not None:
        place = ids.index(before) if before in ids else 0
        bodies = bodies[max(0, place - window.limit) : place]
    return window.page(bodies)


async def create_spend_alert(call: Call) -> SpendAlertBody:
    wanted = _checked(call.body(SpendAlertUpdate))
    threshold = _micros(wanted.threshold_amount)

    def change() -> Transaction[Changed[SpendAlertBody]]:
        owner = yield from _owner(call)
        budget = yield from _months_money(owner)
        if budget is None:
            budget = yield from _set_money(owner, None)
        alert = yield from add_alert(budget.id, threshold=threshold, details=_details(wanted))
        body = _alert_body(owner, alert)
        return Changed(
            value=body, action="spend_alert.created", target=alert.id, project=owner.project, after=_plain(body)
        )

    return await call.change(change)


async def retrieve_spend_alert(call: Call) -> SpendAlertBody:
    def read() -> Transaction[SpendAlertBody]:
        owner, alert = yield from _alert(call)
        return _alert_body(owner, alert)

    return await call.read(read)


async def update_spend_alert(call: Call) -> SpendAlertBody:
    wanted = _checked(call.body(SpendAlertUpdate))
    threshold = _micros(wanted.threshold_amount)

    def change() -> Transaction[Changed[SpendAlertBody]]:
        owner, before = yield from _alert(call)
        yield from change_alert(before.id, threshold=threshold, details=_details(wanted))
        _, after = yield from _alert(call)
        body = _alert_body(owner, after)
        return Changed(
            value=body,
            action="spend_alert.updated",
            target=before.id,
            project=owner.project,
            before=_plain(_alert_body(owner, before)),
            after=_plain(body),
        )

    return await call.change(change)


async def remove_spend_alert(call: Call) -> Deleted:
    def change() -> Transaction[Changed[Deleted]]:
        owner, alert = yield from _alert(call)
        yield from remove_alert(alert.id)
        return Changed(
            value=Deleted(id=alert.id, object=f"{_word(owner)}.spend_alert.deleted"),
            action="spend_alert.deleted",
            target=alert.id,
            project=owner.project,
            before=_plain(_alert_body(owner, alert)),
        )

    return await call.change(change)


def _alert(call: Call) -> Transaction[tuple[Owner, Alert]]:
    """Only an alert of this very owner. Raises: NotFound."""
    owner = yield from _owner(call)
    budget = yield from _months_money(owner)
    alert = yield from find_alert(call.path["alert_id"])
    if alert is None or budget is None or alert.budget != budget.id:
        raise NotFound(f"There is no alert {call.path['alert_id'][:100]!r} here.")
    return owner, alert


def _alert_body(owner: Owner, alert: Alert) -> SpendAlertBody:
    """An alert that was set otherwise (`nimbos budget`) tells nobody by mail."""
    channel = (
        msgspec.json.decode(alert.details, type=Channel) if alert.details else Channel(type="email", recipients=())
    )
    return SpendAlertBody(
        id=alert.id,
        object=f"{_word(owner)}.spend_alert",
        threshold_amount=alert.threshold // MICROS_PER_CENT,
        notification_channel=channel,
        x_nimbos=SpendAlertExtension(fired_ms=alert.fired_ms),
    )


def _checked(wanted: SpendAlertUpdate) -> SpendAlertUpdate:
    channel = wanted.notification_channel
    if len(channel.recipients) > RECIPIENTS_MAX or any(len(one) > 320 for one in channel.recipients):
        raise InvalidRequest(
            f"There may be {RECIPIENTS_MAX} recipients of 320 characters.", param="notification_channel.recipients"
        )
    if len(channel.subject_prefix or "") > 200:
        raise InvalidRequest("A prefix has at most 200 characters.", param="notification_channel.subject_prefix")
    return wanted


def _details(wanted: SpendAlertUpdate) -> str:
    return msgspec.json.encode(wanted.notification_channel).decode()


# --- both


def _owner(call: Call) -> Transaction[Owner]:
    project_id = call.path.get("project_id")
    kind: Literal["project", "organisation"] = "organisation" if project_id is None else "project"
    return (yield from find_owner(kind, project_id or ""))


def _word(owner: Owner) -> str:
    return "project" if owner.kind == "project" else "organization"


def _months_money(owner: Owner) -> Transaction[Budget | None]:
    return (yield from budget_there(owner.kind, owner.id, meter="cost_micros", period="month"))


def _limited_money(owner: Owner) -> Transaction[Budget]:
    budget = yield from _months_money(owner)
    if budget is None or budget.limit is None:
        raise NotFound(f"There is no spend limit for the {owner.kind} {owner.name!r}.")
    return budget


def _set_money(owner: Owner, limit: int | None) -> Transaction[Budget]:
    return (
        yield from set_budget(
            owner.kind, owner.id, owner_name=owner.name, meter="cost_micros", limit=limit, period="month"
        )
    )


def _micros(cents: int) -> int:
    if not 0 <= cents <= CENTS_MAX:
        raise InvalidRequest(
            f"`threshold_amount` is from 0 to {CENTS_MAX} cents, not {cents}.", param="threshold_amount"
        )
    return cents * MICROS_PER_CENT


def _plain(body: SpendAlertBody) -> Any:
    return msgspec.to_builtins(body)


def routes() -> list[AdminRoute]:
    one = f"{PROJECTS}/{{project_id}}"
    found = [
        get(f"{one}/rate_limits", Action.SEE, list_rate_limits),
        post(f"{one}/rate_limits/{{rate_limit_id:path}}", Action.LIMITS, update_rate_limit),
    ]
    for owner in (one, ORGANISATION):
        limit, alerts = f"{owner}/spend_limit", f"{owner}/spend_alerts"
        found += [
            get(limit, Action.SEE, retrieve_spend_limit),
            post(limit, Action.LIMITS, update_spend_limit),
            remove(limit, Action.LIMITS, remove_spend_limit),
            get(alerts, Action.SEE, list_spend_alerts),
            post(alerts, Action.LIMITS, create_spend_alert),
            get(f"{alerts}/{{alert_id}}", Action.SEE, retrieve_spend_alert),
            post(f"{alerts}/{{alert_id}}", Action.LIMITS, update_spend_alert),
            remove(f"{alerts}/{{alert_id}}", Action.LIMITS, remove_spend_alert),
        ]
    return found

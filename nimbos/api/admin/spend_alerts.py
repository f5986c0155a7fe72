"""Spend alerts in OpenAI's own words: thresholds of the budget of money of a month.

They are told in the log, the metrics and here: this server sends no mail, and keeps the recipients for whoever reads
them.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from nimbos.accounts import Action
from nimbos.accounts.words import Changed
from nimbos.api.admin.desk import AdminRoute, Call, Page, Window, get, post, remove
from nimbos.api.admin.owners import Owner
from nimbos.api.admin.projects import PROJECTS, Deleted
from nimbos.api.admin.spending import (
    MICROS_PER_CENT,
    ORGANISATION,
    micros,
    months_money,
    owner_called,
    set_money,
    word,
)
from nimbos.db import Transaction
from nimbos.errors import InvalidRequest, NotFound
from nimbos.ledger import Alert, add_alert, alerts_of, change_alert, find_alert, remove_alert

RECIPIENTS_MAX = 50


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


async def list_spend_alerts(call: Call) -> Page:
    window = Window.of(call.query)
    order = call.query.one_of("order", ("asc", "desc"), absent="desc")
    before = call.query.text("before")

    def read() -> Transaction[list[SpendAlertBody]]:
        owner = yield from owner_called(call)
        budget = yield from months_money(owner)
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
    threshold = micros(wanted.threshold_amount)

    def change() -> Transaction[Changed[SpendAlertBody]]:
        owner = yield from owner_called(call)
        budget = yield from months_money(owner)
        if budget is None:
            budget = yield from set_money(owner, None)
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
    threshold = micros(wanted.threshold_amount)

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
            value=Deleted(id=alert.id, object=f"{word(owner)}.spend_alert.deleted"),
            action="spend_alert.deleted",
            target=alert.id,
            project=owner.project,
            before=_plain(_alert_body(owner, alert)),
        )

    return await call.change(change)


def _alert(call: Call) -> Transaction[tuple[Owner, Alert]]:
    """Only an alert of this very owner. Raises: NotFound."""
    owner = yield from owner_called(call)
    budget = yield from months_money(owner)
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
        object=f"{word(owner)}.spend_alert",
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


def _plain(body: SpendAlertBody) -> Any:
    return msgspec.to_builtins(body)


def routes() -> list[AdminRoute]:
    found = []
    for owner in (f"{PROJECTS}/{{project_id}}", ORGANISATION):
        alerts = f"{owner}/spend_alerts"
        found += [
            get(alerts, Action.SEE, list_spend_alerts),
            post(alerts, Action.LIMITS, create_spend_alert),
            get(f"{alerts}/{{alert_id}}", Action.SEE, retrieve_spend_alert),
            post(f"{alerts}/{{alert_id}}", Action.LIMITS, update_spend_alert),
            remove(f"{alerts}/{{alert_id}}", Action.LIMITS, remove_spend_alert),
        ]
    return found

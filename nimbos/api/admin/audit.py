"""`/v1/organization/audit_logs`: who changed what, newest first, in OpenAI's shape; the check of the whole chain."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Executable, bindparam, select

from nimbos.accounts import Action
from nimbos.accounts.audit import Entry, entry_of
from nimbos.api.admin.desk import AdminRoute, Call, Query, Window, get
from nimbos.db import Dialect, Row, Statement
from nimbos.db.tables.accounts import audit_log
from nimbos.errors import InvalidRequest

AUDIT = "/v1/organization/audit_logs"
FILTERS = {
    "event_types": "action",
    "project_ids": "project_id",
    "actor_ids": "actor_id",
    "actor_emails": "actor_email",
    "resource_ids": "target_id",
}
# What OpenAI's clients have no word for, by the word they read instead; our own is in `x_nimbos.action`.
_TYPES = {
    "model_permissions.updated": "project.updated",
    "model_permissions.deleted": "project.updated",
    "spend_limit.updated": "organization.updated",
    "spend_limit.deleted": "organization.updated",
    "spend_alert.created": "organization.updated",
    "spend_alert.updated": "organization.updated",
    "spend_alert.deleted": "organization.updated",
    "budget.updated": "organization.updated",
    "budget.deleted": "organization.updated",
    "prices.updated": "organization.updated",
    "model.pulled": "organization.updated",
    "model.removed": "organization.updated",
}
_FILTER_VALUES_MAX = 100
_LAST = 2**62
_SEQ = Statement(select(audit_log.c.seq).where(audit_log.c.id == bindparam("wanted")))
MOMENTS = ("gt", "gte", "lt", "lte")


class Entries(msgspec.Struct, kw_only=True):
    """Like `Page`; an entry has a field named as its own type, as OpenAI's clients read it."""

    object: str = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class CheckedBody(msgspec.Struct, kw_only=True):
    """`problem` null: every row is as it was written, and none is missing. `last_hash`: note it elsewhere, and a forged
    chain can be told from this one."""

    object: str = "organization.audit_logs.verification"
    rows: int
    last_hash: str
    problem: str | None


async def list_entries(call: Call) -> Entries:
    query = call.query
    window = Window.of(query)
    before = query.text("before")
    filters = {column: query.texts(name) for name, column in FILTERS.items()}
    filters["action"] = _actions(filters["action"])
    since_ms, until_ms = _moments(query)
    query.flag("tenant_only")
    backwards = before is not None and not window.after
    low = await _seq(call, before) if backwards and before else 0
    high = await _seq(call, window.after) if window.after else _LAST
    values: dict[str, int | str] = {"low": low, "high": high, "since": since_ms, "until": until_ms}
    for column, wanted in filters.items():
        if len(wanted) > _FILTER_VALUES_MAX:
            raise InvalidRequest(f"A filter may have {_FILTER_VALUES_MAX} values.")
        values |= {f"{column}_{number}": value for number, value in enumerate(wanted)}
    shape = {column: len(wanted) for column, wanted in filters.items() if wanted}
    rows = await call.accounts.database.read(_query(shape, newest_first=not backwards)(**values, most=window.limit + 1))
    shown = rows[: window.limit]
    data = [entry_body(entry_of(row)) for row in (reversed(shown) if backwards else shown)]
    return Entries(
        data=data,
        first_id=data[0]["id"] if data else None,
        last_id=data[-1]["id"] if data else None,
        has_more=len(rows) > window.limit,
    )


async def verify(call: Call) -> CheckedBody:
    checked = await call.accounts.verify_audit()
    return CheckedBody(rows=checked.rows, last_hash=checked.last_hash, problem=checked.problem)


def entry_body(entry: Entry) -> dict[str, Any]:
    kind = _TYPES.get(entry.action, entry.action)
    body: dict[str, Any] = {
        "id": entry.id,
        "object": "organization.audit_log",
        "type": kind,
        "effective_at": entry.at_ms // 1000,
        "actor": _actor(entry),
        kind: _details(entry),
        "x_nimbos": {
            "seq": entry.seq,
            "at_ms": entry.at_ms,
            "action": entry.action,
            "before": entry.before,
            "after": entry.after,
        },
    }
    if entry.project:
        body["project"] = {"id": entry.project}
    return body


def _actions(types: list[str]) -> list[str]:
    """A type stands for all actions that are shown as it; an action of our own for itself."""
    return [*types, *(action for action, shown in _TYPES.items() if shown in types)]


def _actor(entry: Entry) -> dict[str, Any]:
    actor = entry.actor
    user = {"id": actor.user, "email": actor.email}
    if actor.kind == "session":
        return {"type": "session", "session": {"user": user, "ip_address": actor.address}}
    key: dict[str, Any] = {"id": actor.id}
    if actor.service_account:
        key |= {"type": "service_account", "service_account": {"id": actor.service_account}}
    else:
        key |= {"type": "user", "user": user}
    return {"type": "api_key", "api_key": key}


def _details(entry: Entry) -> dict[str, Any]:
    """What was made as `data`, what was changed as `changes_requested`."""
    details: dict[str, Any] = {"id": entry.target}
    if isinstance(entry.after, dict):
        if entry.before is None:
            details["data"] = entry.after
        else:
            before = entry.before if isinstance(entry.before, dict) else {}
            details["changes_requested"] = {
                name: value for name, value in entry.after.items() if before.get(name) != value
            }
    return details


def _query(filters: dict[str, int], *, newest_first: bool) -> Statement:
    """Made for this one call: filters come in too many shapes to keep."""

    def build(_: Dialect) -> Executable:
        columns = audit_log.c
        where = [
            columns.seq > bindparam("low"),
            columns.seq < bindparam("high"),
            columns.at_ms >= bindparam("since"),
            columns.at_ms < bindparam("until"),
        ]
        where += [
            columns[column].in_([bindparam(f"{column}_{number}") for number in range(count)])
            for column, count in filters.items()
        ]
        order = columns.seq.desc() if newest_first else columns.seq
        return select(audit_log).where(*where).order_by(order).limit(bindparam("most"))

    return Statement(build)


async def _seq(call: Call, entry_id: str) -> int:
    rows: list[Row] = await call.accounts.database.read(_SEQ(wanted=entry_id))
    if not rows:
        raise InvalidRequest(f"There is no entry {entry_id[:100]!r} to go on from.", param="after")
    return int(rows[0]["seq"])


def _moments(query: Query) -> tuple[int, int]:
    """`effective_at[gte]` and the like as [since, until) in milliseconds."""
    found = {word: query.integer(f"effective_at[{word}]", 0, 2**40) for word in MOMENTS}
    since = max(
        0 if found["gte"] is None else found["gte"] * 1000,
        0 if found["gt"] is None else (found["gt"] + 1) * 1000,
    )
    until = min(
        _LAST if found["lt"] is None else found["lt"] * 1000,
        _LAST if found["lte"] is None else (found["lte"] + 1) * 1000,
    )
    return since, until


def routes() -> list[AdminRoute]:
    return [get(AUDIT, Action.SEE, list_entries), get(f"{AUDIT}/verify", Action.SEE, verify)]

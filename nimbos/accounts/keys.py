"""Service accounts and keys. A key belongs to a user or a service account, and dies with it (`authentication.py`).

The secret is returned beside the key once, by whoever made it; here only its hash passes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sqlalchemy import Executable, Select, and_, bindparam, literal_column, select, update

from nimbos.accounts.people import live_user, member_of
from nimbos.accounts.projects import checked_name, checked_names, checked_weight, live_project, now_ms
from nimbos.accounts.roles import ProjectRole, Role, runs_everything
from nimbos.accounts.secret import Secret
from nimbos.accounts.words import (
    ADMIN_SCOPE,
    Changed,
    Grant,
    Key,
    KeyKind,
    OwnerKind,
    ServiceAccount,
    encoded,
)
from nimbos.db import Bound, Dialect, Row, Statement, Transaction, insert
from nimbos.db.tables.accounts import api_keys, memberships, service_accounts, users
from nimbos.errors import Conflict, InvalidRequest, NotFound
from nimbos.types import AskClass, new_id

CODE_SCOPE = "programs:code"
SCOPES = (ADMIN_SCOPE, *(f"class:{name}" for name in AskClass), CODE_SCOPE)
EXPIRES_S_MAX = 100 * 366 * 86_400

INSERT = insert(api_keys)
BY_ID = Statement(select(api_keys).where(api_keys.c.id == bindparam("wanted")))
BY_NAME = Statement(
    select(api_keys).where(
        api_keys.c.live_name == bindparam("wanted"),
        (api_keys.c.project_id == bindparam("project")) | (bindparam("everywhere") == 1),
    )
)
OWNED = (
    users.c.email.label("user_email"),
    users.c.name.label("user_name"),
    users.c.role.label("user_role"),
    users.c.created_ms.label("user_created"),
    users.c.removed_ms.label("user_removed"),
    memberships.c.role.label("member_role"),
    service_accounts.c.name.label("service_name"),
    service_accounts.c.role.label("service_role"),
    service_accounts.c.created_ms.label("service_created"),
    service_accounts.c.removed_ms.label("service_removed"),
)


def with_owner() -> Select[Any]:
    """Keys with the columns of `OWNED`."""
    by_user = and_(users.c.id == api_keys.c.owner_id, api_keys.c.owner_kind == literal_column("'user'"))
    here = and_(memberships.c.user_id == users.c.id, memberships.c.project_id == api_keys.c.project_id)
    by_program = and_(
        service_accounts.c.id == api_keys.c.owner_id, api_keys.c.owner_kind == literal_column("'service_account'")
    )
    return (
        select(api_keys, *OWNED)
        .select_from(api_keys)
        .outerjoin(users, by_user)
        .outerjoin(memberships, here)
        .outerjoin(service_accounts, by_program)
    )


def _page(_: Dialect) -> Executable:
    return (
        with_owner()
        .where(
            api_keys.c.id > bindparam("after"),
            api_keys.c.kind == bindparam("kind"),
            (api_keys.c.project_id == bindparam("project")) | (bindparam("everywhere") == 1),
            (api_keys.c.owner_id == bindparam("owner")) | (bindparam("anyones") == 1),
            api_keys.c.revoked_ms.is_(None) | (bindparam("revoked") == 1),
        )
        .order_by(api_keys.c.id)
        .limit(bindparam("most"))
    )


def _one(_: Dialect) -> Executable:
    return with_owner().where(api_keys.c.id == bindparam("wanted"))


def _by_digest(_: Dialect) -> Executable:
    return with_owner().where(api_keys.c.digest == bindparam("digest"))


PAGE = Statement(_page)
OWNED_BY_ID = Statement(_one)
BY_DIGEST = Statement(_by_digest)
_CHANGE = Statement(
    update(api_keys)
    .where(api_keys.c.id == bindparam("of"))
    .values(
        live_name=bindparam("to_live_name"),
        scopes=bindparam("to_scopes"),
        models=bindparam("to_models"),
        routes=bindparam("to_routes"),
        weight=bindparam("to_weight"),
        expires_ms=bindparam("to_expires"),
        revoked_ms=bindparam("to_revoked"),
    )
)
USED = Statement(
    update(api_keys)
    .where(
        api_keys.c.id == bindparam("of"),
        api_keys.c.last_used_ms.is_(None) | (api_keys.c.last_used_ms < bindparam("at")),
    )
    .values(last_used_ms=bindparam("at"))
)
_REVOKE_OWNERS = Statement(
    update(api_keys)
    .where(api_keys.c.owner_id == bindparam("owner"), api_keys.c.revoked_ms.is_(None))
    .values(revoked_ms=bindparam("now"), live_name=None)
)

ACCOUNT = insert(service_accounts)
ACCOUNT_BY_ID = Statement(
    select(service_accounts).where(
        service_accounts.c.id == bindparam("wanted"),
        service_accounts.c.project_id == bindparam("project"),
        service_accounts.c.removed_ms.is_(None),
    )
)
ACCOUNTS_PAGE = Statement(
    select(service_accounts)
    .where(
        service_accounts.c.id > bindparam("after"),
        service_accounts.c.project_id == bindparam("project"),
        service_accounts.c.removed_ms.is_(None),
    )
    .order_by(service_accounts.c.id)
    .limit(bindparam("most"))
)
_CHANGE_ACCOUNT = Statement(
    update(service_accounts)
    .where(service_accounts.c.id == bindparam("of"))
    .values(name=bindparam("to_name"), role=bindparam("to_role"), removed_ms=bindparam("to_removed"))
)


def create_key(
    *,
    name: str,
    secret: Secret,
    project_id: str,
    owner_kind: OwnerKind,
    owner_id: str,
    grant: Grant,
    kind: KeyKind = "project",
    expires_ms: int | None = None,
) -> Transaction[Changed[Key]]:
    """Raises: Conflict for a name that a living key of the project has, or an owner without a place in the project;
    InvalidRequest; NotFound."""
    project = yield from live_project(project_id)
    checked_name(name)
    if (yield BY_NAME(wanted=name, project=project_id, everywhere=0)):
        raise Conflict(
            f"The project {project.name!r} has a key named {name!r} already. Choose another name, or "
            f"`nimbos key revoke {name}` first."
        )
    if kind == "project":
        yield from _check_owner(project_id, owner_kind, owner_id)
    key = Key(
        id=new_id("key"),
        kind=kind,
        project_id=project_id,
        name=name,
        redacted=secret.redacted,
        owner_kind=owner_kind,
        owner_id=owner_id,
        grant=checked_grant(grant),
        created_ms=now_ms(),
        expires_ms=expires_ms,
        revoked_ms=None,
        last_used_ms=None,
    )
    yield INSERT(
        id=key.id,
        kind=kind,
        project_id=project_id,
        name=name,
        live_name=name,
        digest=secret.digest,
        redacted=key.redacted,
        owner_kind=owner_kind,
        owner_id=owner_id,
        scopes=encoded(key.grant.scopes),
        models=encoded(key.grant.models),
        routes=encoded(key.grant.routes),
        weight=key.grant.weight,
        created_ms=key.created_ms,
        expires_ms=expires_ms,
        revoked_ms=None,
        last_used_ms=None,
    )
    return Changed(value=key, action="api_key.created", target=key.id, project=project_id, after=key)


def update_key(
    project_id: str, key_id: str, *, grant: Grant | None = None, expires_ms: int | None = None
) -> Transaction[Changed[Key]]:
    """None leaves as it is. Raises: Conflict for a key that is revoked or expired."""
    before = yield from key_of(project_id, key_id)
    if before.revoked_ms is not None or (before.expires_ms or now_ms() + 1) <= now_ms():
        raise Conflict(f"The key {before.name!r} is revoked or expired; make a new one.")
    after = replace(
        before,
        grant=before.grant if grant is None else checked_grant(grant),
        expires_ms=before.expires_ms if expires_ms is None else expires_ms,
    )
    yield _changed(after)
    return Changed(value=after, action="api_key.updated", target=key_id, project=project_id, before=before, after=after)


def revoke_key(key: Key) -> Transaction[Changed[Key]]:
    """Raises: Conflict when it is already."""
    if key.revoked_ms is not None:
        raise Conflict(f"The key {key.name!r} is revoked already.")
    after = replace(key, revoked_ms=now_ms())
    yield _changed(after)
    return Changed(value=after, action="api_key.deleted", target=key.id, project=key.project_id, before=key)


def key_of(project_id: str | None, key_id: str) -> Transaction[Key]:
    """`project_id` None: of any project. Raises: NotFound."""
    rows = yield BY_ID(wanted=key_id)
    if not rows or (project_id is not None and rows[0]["project_id"] != project_id):
        raise NotFound(f"There is no key {key_id[:100]!r} here. `nimbos key list` shows those there are.")
    return Key.of(rows[0])


def create_service_account(
    project_id: str, name: str, *, role: ProjectRole = ProjectRole.MEMBER
) -> Transaction[Changed[ServiceAccount]]:
    yield from live_project(project_id)
    account = ServiceAccount(
        id=new_id("svc_acct"),
        project_id=project_id,
        name=checked_name(name),
        role=role,
        created_ms=now_ms(),
        removed_ms=None,
    )
    yield ACCOUNT(
        id=account.id,
        project_id=project_id,
        name=account.name,
        role=role.value,
        created_ms=account.created_ms,
        removed_ms=None,
    )
    return Changed(
        value=account, action="service_account.created", target=account.id, project=project_id, after=account
    )


def update_service_account(
    project_id: str, account_id: str, *, name: str | None, role: ProjectRole | None
) -> Transaction[Changed[ServiceAccount]]:
    before = yield from service_account_of(project_id, account_id)
    after = replace(before, name=before.name if name is None else checked_name(name), role=role or before.role)
    yield _changed_account(after)
    return Changed(
        value=after,
        action="service_account.updated",
        target=account_id,
        project=project_id,
        before=before,
        after=after,
    )


def remove_service_account(project_id: str, account_id: str) -> Transaction[Changed[ServiceAccount]]:
    """Its keys die with it."""
    before = yield from service_account_of(project_id, account_id)
    after = replace(before, removed_ms=now_ms())
    yield _changed_account(after)
    yield _REVOKE_OWNERS(owner=account_id, now=after.removed_ms)
    return Changed(value=after, action="service_account.deleted", target=account_id, project=project_id, before=before)


def service_account_of(project_id: str, account_id: str) -> Transaction[ServiceAccount]:
    rows = yield ACCOUNT_BY_ID(wanted=account_id, project=project_id)
    if not rows:
        raise NotFound(f"There is no service account {account_id[:100]!r} in this project.")
    return ServiceAccount.of(rows[0])


def checked_grant(grant: Grant) -> Grant:
    """Raises: InvalidRequest naming what is wrong and what there is."""
    unknown = sorted(set(grant.scopes) - set(SCOPES))
    if unknown:
        raise InvalidRequest(f"Unknown scope {unknown[0][:100]!r}; there are {', '.join(SCOPES)}.", param="scopes")
    for route in grant.routes or ():
        if not route.startswith("/") or route != route.rstrip("/"):
            raise InvalidRequest(f"A route looks like `/v1/chat/completions`, not {route[:100]!r}.", param="routes")
    return replace(
        grant,
        scopes=tuple(dict.fromkeys(grant.scopes)),
        models=checked_names(grant.models, "models"),
        routes=checked_names(grant.routes, "routes"),
        weight=checked_weight(grant.weight),
    )


def grant_of(scopes: Iterable[str]) -> Grant:
    """From one list of words, as OpenAI's client sends it: `model:ID`, `route:/PATH`, and the scopes themselves."""
    plain: list[str] = []
    models: list[str] = []
    routes: list[str] = []
    for word in scopes:
        if word.startswith("model:"):
            models.append(word.removeprefix("model:"))
        elif word.startswith("route:"):
            routes.append(word.removeprefix("route:"))
        else:
            plain.append(word)
    return Grant(scopes=tuple(plain), models=tuple(models) or None, routes=tuple(routes) or None)


def words_of(grant: Grant) -> list[str]:
    """The inverse of `grant_of`."""
    models = [f"model:{model}" for model in grant.models or ()]
    return [*grant.scopes, *models, *(f"route:{route}" for route in grant.routes or ())]


def expires_at(seconds: int | None) -> int | None:
    """Raises: InvalidRequest."""
    if seconds is None:
        return None
    if not 1 <= seconds <= EXPIRES_S_MAX:
        raise InvalidRequest(
            f"`expires_in_seconds` is {seconds}; it must be from 1 to {EXPIRES_S_MAX}.", param="expires_in_seconds"
        )
    return now_ms() + 1000 * seconds


def owner_has_access(key: Key, row: Row) -> bool:
    """`row` has the columns of `OWNED`."""
    if key.owner_kind == "service_account":
        return row["service_role"] not in (None, ProjectRole.NONE.value) and row["service_removed"] is None
    if row["user_role"] is None or row["user_removed"] is not None:
        return False
    return key.kind == "admin" or runs_everything(Role(row["user_role"])) or row["member_role"] is not None


def scopes_of(key: Key, row: Row) -> frozenset[str]:
    """A key that administers everything may also bring Python that runs here. `row` has the columns of `OWNED`."""
    scopes = frozenset(key.grant.scopes)
    if ADMIN_SCOPE not in scopes:
        return scopes
    runs = key.owner_kind == "service_account" or runs_everything(Role(row["user_role"]))
    return scopes | {CODE_SCOPE} if runs else scopes


def _check_owner(project_id: str, owner_kind: OwnerKind, owner_id: str) -> Transaction[None]:
    if owner_kind == "service_account":
        account = yield from service_account_of(project_id, owner_id)
        if account.role is ProjectRole.NONE:
            raise Conflict(f"The service account {account.name!r} has no role in the project; give it one first.")
        return
    user = yield from live_user(owner_id)
    if not runs_everything(user.role):
        yield from member_of(project_id, owner_id)


def _changed(key: Key) -> Bound:
    return _CHANGE(
        of=key.id,
        to_live_name=key.name if key.revoked_ms is None else None,
        to_scopes=encoded(key.grant.scopes),
        to_models=encoded(key.grant.models),
        to_routes=encoded(key.grant.routes),
        to_weight=key.grant.weight,
        to_expires=key.expires_ms,
        to_revoked=key.revoked_ms,
    )


def _changed_account(account: ServiceAccount) -> Bound:
    return _CHANGE_ACCOUNT(
        of=account.id, to_name=account.name, to_role=account.role.value, to_removed=account.removed_ms
    )

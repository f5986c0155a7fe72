"""Keys of projects. A secret is in the one answer that makes it. Keys of service accounts are made in `programs.py`."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from msgspec import UNSET, UnsetType

from nimbos.accounts import Action, Role
from nimbos.accounts import keys as rows
from nimbos.accounts.keys import CODE_SCOPE, expires_at, grant_of, owner_has_access, words_of
from nimbos.accounts.people import live_user
from nimbos.accounts.secret import new_secret
from nimbos.accounts.words import ADMIN_SCOPE, Changed, Grant, Key, OwnerKind
from nimbos.api.admin.allowances import Allowance, allow
from nimbos.api.admin.desk import AdminRoute, Call, Page, Window, get, post, remove, seconds
from nimbos.api.admin.projects import PROJECTS, Deleted
from nimbos.db import Row, Transaction
from nimbos.errors import InvalidRequest, NotFound

ALL_KEYS = "/v1/organization/api_keys"


class OwnerUser(msgspec.Struct, kw_only=True):
    id: str
    email: str
    name: str
    created_at: int
    role: str


class OwnerServiceAccount(msgspec.Struct, kw_only=True):
    id: str
    name: str
    created_at: int
    role: str


class OwnerBody(msgspec.Struct, kw_only=True):
    type: str
    user: OwnerUser | None = None
    service_account: OwnerServiceAccount | None = None


class KeyExtension(msgspec.Struct, kw_only=True):
    """`scopes` has all words: the scopes, `model:ID` and `route:/PATH`; without any of a kind all are allowed."""

    project_id: str
    scopes: list[str]
    weight: float
    revoked_at: int | None


class KeyBody(msgspec.Struct, kw_only=True):
    """`value`: the secret, in the answer that makes it and never again."""

    id: str
    object: str = "organization.project.api_key"
    name: str
    redacted_value: str
    value: str | UnsetType = UNSET
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    owner: OwnerBody
    owner_project_access: str
    x_nimbos: KeyExtension

    @classmethod
    def of(cls, row: Row) -> KeyBody:
        key = Key.of(row)
        return cls(
            id=key.id,
            name=key.name,
            redacted_value=key.redacted,
            created_at=key.created_ms // 1000,
            expires_at=seconds(key.expires_ms),
            last_used_at=seconds(key.last_used_ms),
            owner=owner_of(key, row),
            owner_project_access="active" if owner_has_access(key, row) else "inactive",
            x_nimbos=KeyExtension(
                project_id=key.project_id,
                scopes=words_of(key.grant),
                weight=key.grant.weight,
                revoked_at=seconds(key.revoked_ms),
            ),
        )


class KeyCreate(msgspec.Struct, kw_only=True):
    """For oneself; `user_id` or `service_account_id` for another. `allowance`: limits and budgets from the start."""

    name: str
    user_id: str | None = None
    service_account_id: str | None = None
    scopes: tuple[str, ...] = ()
    weight: float = 1.0
    expires_in_seconds: int | None = None
    allowance: Allowance | None = None


class KeyUpdate(msgspec.Struct, kw_only=True):
    scopes: tuple[str, ...] | None = None
    weight: float | None = None
    expires_in_seconds: int | None = None


def owner_of(key: Key, row: Row) -> OwnerBody:
    if key.owner_kind == "service_account":
        program = OwnerServiceAccount(
            id=key.owner_id,
            name=row["service_name"],
            created_at=row["service_created"] // 1000,
            role=row["service_role"],
        )
        return OwnerBody(type="service_account", service_account=program)
    person = OwnerUser(
        id=key.owner_id,
        email=row["user_email"],
        name=row["user_name"],
        created_at=row["user_created"] // 1000,
        role=row["member_role"] or row["user_role"],
    )
    return OwnerBody(type="user", user=person)


async def list_keys(call: Call) -> Page:
    """All of the project, for who may see them; else one's own."""
    return await _page(call, project=call.path["project_id"], anyones=call.may(Action.SEE))


async def list_all_keys(call: Call) -> Page:
    return await _page(call, project=None, anyones=True)


async def _page(call: Call, *, project: str | None, anyones: bool) -> Page:
    window = Window.of(call.query)
    access = call.query.one_of("owner_project_access", ("active", "inactive", "any"), absent="any")
    revoked = bool(call.query.flag("include_revoked")) if project is None else False
    found: list[KeyBody] = []
    after = window.after
    while len(found) <= window.limit:
        part = await call.accounts.database.read(
            rows.PAGE(
                after=after,
                kind="project",
                project=project or "",
                everywhere=int(project is None),
                owner=call.identity.actor.user,
                anyones=int(anyones),
                revoked=int(revoked),
                most=window.limit + 1,
            )
        )
        bodies = [KeyBody.of(row) for row in part]
        found += [body for body in bodies if access in ("any", body.owner_project_access)]
        if len(part) <= window.limit:
            break
        after = part[-1]["id"]
    return window.page(found)


async def create_key(call: Call) -> KeyBody:
    wanted = call.body(KeyCreate)
    project_id = call.path["project_id"]
    owner_kind, owner_id = _owner_wanted(call, wanted)
    if not (owner_kind == "user" and owner_id == call.identity.actor.user):
        call.check(Action.PROJECT_KEYS)
    grant = replace(grant_of(wanted.scopes), weight=wanted.weight)
    check_grant(call, grant)
    if wanted.allowance is not None or wanted.weight != 1.0:
        call.check(Action.LIMITS)
    secret = new_secret()
    expires_ms = expires_at(wanted.expires_in_seconds)

    def change() -> Transaction[Changed[Key]]:
        yield from _check_not_above(call, grant, owner_kind, owner_id)
        made = yield from rows.create_key(
            name=wanted.name,
            secret=secret,
            project_id=project_id,
            owner_kind=owner_kind,
            owner_id=owner_id,
            grant=grant,
            expires_ms=expires_ms,
        )
        if wanted.allowance is None:
            return made
        yield from allow("key", made.value.id, made.value.name, wanted.allowance)
        return replace(made, after={"key": made.value, "allowance": msgspec.to_builtins(wanted.allowance)})

    key = await call.change(change)
    body = await _body_of(call, key.id)
    body.value = secret.value
    return body


async def retrieve_key(call: Call) -> KeyBody:
    key = await _visible(call)
    return await _body_of(call, key.id)


async def update_key(call: Call) -> KeyBody:
    wanted = call.body(KeyUpdate)
    key = await _changeable(call)
    expires_ms = expires_at(wanted.expires_in_seconds)

    def change() -> Transaction[Changed[Key]]:
        now = yield from rows.key_of(call.path["project_id"], key.id)  # another change may have been between
        grant = _grant_wanted(call, wanted, now.grant)
        if grant != now.grant:
            yield from _check_not_above(call, grant, key.owner_kind, key.owner_id)
        return (yield from rows.update_key(call.path["project_id"], key.id, grant=grant, expires_ms=expires_ms))

    await call.change(change)
    return await _body_of(call, key.id)


def _grant_wanted(call: Call, wanted: KeyUpdate, before: Grant) -> Grant:
    """Raises: Forbidden."""
    grant = before
    if wanted.scopes is not None:
        grant = replace(grant_of(wanted.scopes), weight=grant.weight)
        check_grant(call, grant, before=before)
    if wanted.weight is not None:
        call.check(Action.LIMITS)
        grant = replace(grant, weight=wanted.weight)
    return grant


async def remove_key(call: Call) -> Deleted:
    key = await _changeable(call)

    def change() -> Transaction[Changed[Key]]:
        now = yield from rows.key_of(call.path["project_id"], key.id)
        return (yield from rows.revoke_key(now))

    await call.change(change)
    return Deleted(id=key.id, object="organization.project.api_key.deleted")


def _owner_wanted(call: Call, wanted: KeyCreate) -> tuple[OwnerKind, str]:
    if wanted.user_id is not None and wanted.service_account_id is not None:
        raise InvalidRequest("Give one of `user_id` and `service_account_id`.", param="user_id")
    if wanted.service_account_id is not None:
        return "service_account", wanted.service_account_id
    owner = wanted.user_id or call.identity.actor.user
    if owner:
        return "user", owner
    if call.identity.actor.service_account:
        return "service_account", call.identity.actor.service_account
    raise InvalidRequest("Whose key? Give `user_id` or `service_account_id`.", param="user_id")


def check_grant(call: Call, grant: Grant, *, before: Grant | None = None) -> None:
    """Who may not make keys that administer may give none that scope, nor that of running Python here; nobody widens
    a key by changing it without the right to make such a key for anyone."""
    added = set(grant.scopes) - set(before.scopes if before is not None else ())
    if added & {ADMIN_SCOPE, CODE_SCOPE}:
        call.check(Action.ADMIN_KEYS)
    if before is not None and grant != before:
        call.check(Action.PROJECT_KEYS)


def _check_not_above(call: Call, grant: Grant, owner_kind: OwnerKind, owner_id: str) -> Transaction[None]:
    """A key that administers has its owner's role, whoever holds it: only owners give one to an owner."""
    if ADMIN_SCOPE in grant.scopes and owner_kind == "user":
        user = yield from live_user(owner_id)
        if user.role is Role.OWNER:
            call.check(Action.OWNERS)


async def _visible(call: Call) -> Key:
    """Raises: NotFound, also for another's key that one may not see."""
    key = await call.read(lambda: rows.key_of(call.path["project_id"], call.path["key_id"]))
    if key.kind != "project" or not (call.may(Action.SEE) or _is_own(call, key)):
        raise NotFound(f"There is no key {call.path['key_id'][:100]!r} here.")
    return key


async def _changeable(call: Call) -> Key:
    key = await _visible(call)
    if not _is_own(call, key):
        call.check(Action.PROJECT_KEYS)
    return key


def _is_own(call: Call, key: Key) -> bool:
    return key.owner_kind == "user" and key.owner_id == call.identity.actor.user


async def _body_of(call: Call, key_id: str) -> KeyBody:
    (row,) = await call.accounts.database.read(rows.OWNED_BY_ID(wanted=key_id))
    return KeyBody.of(row)


def routes() -> list[AdminRoute]:
    keys = f"{PROJECTS}/{{project_id}}/api_keys"
    key = f"{keys}/{{key_id}}"
    return [
        get(keys, Action.SEE_KEYS, list_keys),
        post(keys, Action.OWN_KEYS, create_key),
        get(key, Action.SEE_KEYS, retrieve_key),
        post(key, Action.OWN_KEYS, update_key),
        remove(key, Action.OWN_KEYS, remove_key),
        get(ALL_KEYS, Action.SEE, list_all_keys),
    ]

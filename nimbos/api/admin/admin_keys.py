"""`/v1/organization/admin_api_keys`: keys that administer, each of a person and as far as that person may."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from nimbos.accounts import Action, Role
from nimbos.accounts import keys as rows
from nimbos.accounts.keys import expires_at
from nimbos.accounts.people import live_user
from nimbos.accounts.secret import new_secret
from nimbos.accounts.words import ADMIN_SCOPE, DEFAULT_PROJECT, Changed, Grant, Key
from nimbos.api.admin.desk import AdminRoute, Call, Page, Window, get, post, remove, seconds
from nimbos.api.admin.projects import Deleted
from nimbos.db import Row, Transaction
from nimbos.errors import Conflict, Forbidden, InvalidRequest, NotFound

ADMIN_KEYS = "/v1/organization/admin_api_keys"


class AdminKeyOwner(msgspec.Struct, kw_only=True):
    type: str = "user"
    object: str = "organization.user"
    id: str
    name: str
    created_at: int
    role: str


class AdminKeyBody(msgspec.Struct, kw_only=True):
    id: str
    object: str = "organization.admin_api_key"
    name: str
    redacted_value: str
    value: str | UnsetType = UNSET
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    owner: AdminKeyOwner

    @classmethod
    def of(cls, row: Row) -> AdminKeyBody:
        key = Key.of(row)
        return cls(
            id=key.id,
            name=key.name,
            redacted_value=key.redacted,
            created_at=key.created_ms // 1000,
            expires_at=seconds(key.expires_ms),
            last_used_at=seconds(key.last_used_ms),
            owner=AdminKeyOwner(
                id=key.owner_id,
                name=row["user_name"],
                created_at=row["user_created"] // 1000,
                role=row["user_role"],
            ),
        )


class AdminKeyCreate(msgspec.Struct, kw_only=True):
    name: str
    expires_in_seconds: int | None = None


async def list_admin_keys(call: Call) -> Page:
    window = Window.of(call.query)
    order = call.query.one_of("order", ("asc", "desc"), absent="asc")
    if order == "desc":
        raise InvalidRequest("Keys are listed in ascending order alone.", param="order")
    found = await call.accounts.database.read(
        rows.PAGE(
            after=window.after,
            kind="admin",
            project="",
            everywhere=1,
            owner="",
            anyones=1,
            revoked=0,
            most=window.limit + 1,
        )
    )
    return window.page([AdminKeyBody.of(row) for row in found])


async def create_admin_key(call: Call) -> AdminKeyBody:
    wanted = call.body(AdminKeyCreate)
    user_id = call.identity.actor.user
    if not user_id:
        raise Forbidden("A service account's key may not make keys that administer; a person's may.")
    secret = new_secret()
    expires_ms = expires_at(wanted.expires_in_seconds)

    def change() -> Transaction[Changed[Key]]:
        yield from live_user(user_id)
        return (
            yield from rows.create_key(
                name=wanted.name,
                secret=secret,
                project_id=DEFAULT_PROJECT,
                owner_kind="user",
                owner_id=user_id,
                grant=Grant(scopes=(ADMIN_SCOPE,)),
                kind="admin",
                expires_ms=expires_ms,
            )
        )

    key = await call.change(change)
    body = await _admin_body(call, key.id)
    body.value = secret.value
    return body


async def retrieve_admin_key(call: Call) -> AdminKeyBody:
    return await _admin_body(call, call.path["key_id"])


async def remove_admin_key(call: Call) -> Deleted:
    await _admin_body(call, call.path["key_id"])

    def change() -> Transaction[Changed[Key]]:
        key = yield from rows.key_of(None, call.path["key_id"])
        if key.owner_id != call.identity.actor.user:
            owner = yield from live_user(key.owner_id)
            if owner.role is Role.OWNER:
                call.check(Action.OWNERS)
        return (yield from rows.revoke_key(key))

    key = await call.change(change)
    return Deleted(id=key.id, object="organization.admin_api_key.deleted")


async def _admin_body(call: Call, key_id: str) -> AdminKeyBody:
    found = await call.accounts.database.read(rows.OWNED_BY_ID(wanted=key_id))
    if not found or found[0]["kind"] != "admin":
        raise NotFound(f"There is no admin key {key_id[:100]!r} here.")
    if found[0]["revoked_ms"] is not None:
        raise Conflict("This key is revoked.")
    return AdminKeyBody.of(found[0])


def routes() -> list[AdminRoute]:
    return [
        get(ADMIN_KEYS, Action.SEE, list_admin_keys),
        post(ADMIN_KEYS, Action.ADMIN_KEYS, create_admin_key),
        get(f"{ADMIN_KEYS}/{{key_id}}", Action.SEE, retrieve_admin_key),
        remove(f"{ADMIN_KEYS}/{{key_id}}", Action.ADMIN_KEYS, remove_admin_key),
    ]

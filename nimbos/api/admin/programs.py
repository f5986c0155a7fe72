"""Service accounts of a project: programs, with keys of their own. A secret is in the one answer that makes it."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from nimbos.accounts import Action, ProjectRole
from nimbos.accounts import keys as rows
from nimbos.accounts.keys import expires_at, grant_of
from nimbos.accounts.secret import Secret, new_secret
from nimbos.accounts.words import Changed, Grant, Key, ServiceAccount
from nimbos.api.admin.desk import AdminRoute, Call, Page, Window, get, post, remove, seconds
from nimbos.api.admin.keys import check_grant
from nimbos.api.admin.projects import PROJECTS, Deleted
from nimbos.db import Transaction
from nimbos.errors import InvalidRequest


class NewKeyBody(msgspec.Struct, kw_only=True):
    id: str
    object: str = "organization.project.service_account.api_key"
    name: str
    value: str
    created_at: int
    expires_at: int | None

    @classmethod
    def of(cls, key: Key, secret: Secret) -> NewKeyBody:
        return cls(
            id=key.id,
            name=key.name,
            value=secret.value,
            created_at=key.created_ms // 1000,
            expires_at=seconds(key.expires_ms),
        )


class ServiceAccountBody(msgspec.Struct, kw_only=True):
    id: str
    object: str = "organization.project.service_account"
    name: str
    role: str
    created_at: int
    api_key: NewKeyBody | UnsetType | None = UNSET

    @classmethod
    def of(cls, account: ServiceAccount) -> ServiceAccountBody:
        return cls(id=account.id, name=account.name, role=account.role.value, created_at=account.created_ms // 1000)


class ServiceAccountCreate(msgspec.Struct, kw_only=True):
    name: str
    create_service_account_only: bool | None = None
    expires_in_seconds: int | None = None


class ServiceAccountUpdate(msgspec.Struct, kw_only=True):
    name: str | None = None
    role: ProjectRole | None = None


class ServiceAccountKeyCreate(msgspec.Struct, kw_only=True):
    name: str | None = None
    scopes: tuple[str, ...] = ()
    expires_in_seconds: int | None = None


async def list_service_accounts(call: Call) -> Page:
    window = Window.of(call.query)
    found = await call.accounts.database.read(
        rows.ACCOUNTS_PAGE(project=call.path["project_id"], after=window.after, most=window.limit + 1)
    )
    return window.page([ServiceAccountBody.of(ServiceAccount.of(row)) for row in found])


async def create_service_account(call: Call) -> ServiceAccountBody:
    wanted = call.body(ServiceAccountCreate)
    project_id = call.path["project_id"]
    if wanted.create_service_account_only:
        if wanted.expires_in_seconds is not None:
            raise InvalidRequest("Without a key nothing expires.", param="expires_in_seconds")
        alone = await call.change(lambda: rows.create_service_account(project_id, wanted.name, role=ProjectRole.NONE))
        body = ServiceAccountBody.of(alone)
        body.api_key = None
        return body
    secret = new_secret()
    expires_ms = expires_at(wanted.expires_in_seconds)

    def change() -> Transaction[Changed[tuple[ServiceAccount, Key]]]:
        made = yield from rows.create_service_account(project_id, wanted.name)
        key = yield from rows.create_key(
            name=wanted.name,
            secret=secret,
            project_id=project_id,
            owner_kind="service_account",
            owner_id=made.value.id,
            grant=Grant(),
            expires_ms=expires_ms,
        )
        both = {"service_account": made.value, "key": key.value}
        return Changed(
            value=(made.value, key.value),
            action=made.action,
            target=made.target,
            project=project_id,
            after=both,
        )

    account, key = await call.change(change)
    body = ServiceAccountBody.of(account)
    body.api_key = NewKeyBody.of(key, secret)
    return body


async def retrieve_service_account(call: Call) -> ServiceAccountBody:
    return ServiceAccountBody.of(
        await call.read(lambda: rows.service_account_of(call.path["project_id"], call.path["account_id"]))
    )


async def update_service_account(call: Call) -> ServiceAccountBody:
    wanted = call.body(ServiceAccountUpdate)
    account = await call.change(
        lambda: rows.update_service_account(
            call.path["project_id"], call.path["account_id"], name=wanted.name, role=wanted.role
        )
    )
    return ServiceAccountBody.of(account)


async def remove_service_account(call: Call) -> Deleted:
    account = await call.change(lambda: rows.remove_service_account(call.path["project_id"], call.path["account_id"]))
    return Deleted(id=account.id, object="organization.project.service_account.deleted")


async def create_service_account_key(call: Call) -> NewKeyBody:
    wanted = call.body(ServiceAccountKeyCreate)
    grant = grant_of(wanted.scopes)
    check_grant(call, grant)
    secret = new_secret()
    expires_ms = expires_at(wanted.expires_in_seconds)

    def change() -> Transaction[Changed[Key]]:
        account = yield from rows.service_account_of(call.path["project_id"], call.path["account_id"])
        return (
            yield from rows.create_key(
                name=wanted.name or f"{account.name} {secret.redacted}",
                secret=secret,
                project_id=call.path["project_id"],
                owner_kind="service_account",
                owner_id=account.id,
                grant=grant,
                expires_ms=expires_ms,
            )
        )

    return NewKeyBody.of(await call.change(change), secret)


def routes() -> list[AdminRoute]:
    programs = f"{PROJECTS}/{{project_id}}/service_accounts"
    program = f"{programs}/{{account_id}}"
    return [
        get(programs, Action.SEE, list_service_accounts),
        post(programs, Action.PROJECT_KEYS, create_service_account),
        get(program, Action.SEE, retrieve_service_account),
        post(program, Action.PROJECT_KEYS, update_service_account),
        remove(program, Action.PROJECT_KEYS, remove_service_account),
        post(f"{program}/api_keys", Action.PROJECT_KEYS, create_service_account_key),
    ]

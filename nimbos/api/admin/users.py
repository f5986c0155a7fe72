"""`/v1/organization/users`: people. OpenAI invites them by mail; here they are added, and given a password or keys."""

from __future__ import annotations

import msgspec
from sqlalchemy import bindparam, func, select

from nimbos.accounts import Action, Role
from nimbos.accounts import people as rows
from nimbos.accounts.words import DEFAULT_PROJECT, Changed, User
from nimbos.api.admin.desk import AdminRoute, Call, Page, Window, get, post, remove
from nimbos.api.admin.projects import Deleted
from nimbos.db import Row, Statement, Transaction
from nimbos.db.tables.accounts import api_keys
from nimbos.errors import InvalidRequest

USERS = "/v1/organization/users"
_NOT_HERE = {
    "role_id": "roles are `owner`, `admin`, `member` and `reader`; give `role`",
    "developer_persona": "nothing here depends on it",
    "technical_level": "nothing here depends on it",
}
_LAST_USE = Statement(
    select(func.max(api_keys.c.last_used_ms).label("last")).where(
        api_keys.c.owner_kind == "user", api_keys.c.owner_id == bindparam("user")
    )
)


class ProjectOfUser(msgspec.Struct, kw_only=True):
    id: str
    name: str
    role: str


class ProjectsOfUser(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[ProjectOfUser]


class UserExtension(msgspec.Struct, kw_only=True):
    has_password: bool


class UserBody(msgspec.Struct, kw_only=True, omit_defaults=False):
    id: str
    object: str = "organization.user"
    name: str
    email: str
    role: str
    added_at: int
    created: int
    is_service_account: bool = False
    api_key_last_used_at: int | None = None
    projects: ProjectsOfUser | None = None
    x_nimbos: UserExtension

    @classmethod
    def of(cls, user: User) -> UserBody:
        return cls(
            id=user.id,
            name=user.name,
            email=user.email,
            role=user.role.value,
            added_at=user.created_ms // 1000,
            created=user.created_ms // 1000,
            x_nimbos=UserExtension(has_password=user.has_password),
        )


class UserCreate(msgspec.Struct, kw_only=True):
    """`project`: where the user is a member from the start; without it the default project, except for readers. With
    `password` the user can log in to the console."""

    email: str
    role: Role = Role.MEMBER
    name: str = ""
    password: str | None = None
    project: str | None = None


class UserUpdate(msgspec.Struct, kw_only=True):
    role: Role | None = None
    name: str | None = None


class PasswordUpdate(msgspec.Struct, kw_only=True):
    """null: the user cannot log in any more."""

    password: str | None


async def list_users(call: Call) -> Page:
    window = Window.of(call.query)
    emails = [email.lower() for email in call.query.texts("emails")]
    if emails:
        users = [User.of(row) for email in emails for row in await _by_email(call, email)]
        users = sorted((user for user in users if user.id > window.after), key=lambda user: user.id)
    else:
        found = await call.accounts.database.read(rows.PAGE(after=window.after, most=window.limit + 1))
        users = [User.of(row) for row in found]
    return window.page([UserBody.of(user) for user in users])


async def create_user(call: Call) -> UserBody:
    wanted = call.body(UserCreate)
    if wanted.role is Role.OWNER:
        call.check(Action.OWNERS)
    hashed = await call.accounts.passwords.hashed(wanted.password) if wanted.password is not None else None
    project = wanted.project or (DEFAULT_PROJECT if wanted.role is not Role.READER else None)
    user = await call.change(
        lambda: rows.create_user(
            wanted.email, role=wanted.role, name=wanted.name, password_hash=hashed, project_id=project
        )
    )
    return UserBody.of(user)


async def retrieve_user(call: Call) -> UserBody:
    user = await call.read(lambda: rows.live_user(call.path["user_id"]))
    database = call.accounts.database
    body = UserBody.of(user)
    found = rows.memberships_of(await database.read(rows.PROJECTS_OF(user=user.id)))
    body.projects = ProjectsOfUser(data=[ProjectOfUser(**one) for one in found])
    (last,) = await database.read(_LAST_USE(user=user.id))
    body.api_key_last_used_at = last["last"] // 1000 if last["last"] is not None else None
    return body


async def update_user(call: Call) -> UserBody:
    wanted = call.body(UserUpdate, refused=_NOT_HERE)
    if wanted.role is None and wanted.name is None:
        raise InvalidRequest("Give `role` or `name`.", param="role")
    if wanted.role is Role.OWNER:
        call.check(Action.OWNERS)

    def change() -> Transaction[Changed[User]]:
        yield from _check_not_above(call)
        return (yield from rows.update_user(call.path["user_id"], role=wanted.role, name=wanted.name))

    return UserBody.of(await call.change(change))


async def remove_user(call: Call) -> Deleted:
    def change() -> Transaction[Changed[User]]:
        yield from _check_not_above(call)
        return (yield from rows.remove_user(call.path["user_id"]))

    user = await call.change(change)
    return Deleted(id=user.id, object="organization.user.deleted")


async def set_password(call: Call) -> UserBody:
    """One's own, or whoever's one may change."""
    wanted = call.body(PasswordUpdate)
    own = call.identity.actor.user == call.path["user_id"]
    if not own:
        call.check(Action.USERS)
    hashed = await call.accounts.passwords.hashed(wanted.password) if wanted.password is not None else None

    def change() -> Transaction[Changed[User]]:
        if not own:
            yield from _check_not_above(call)
        return (yield from rows.set_password(call.path["user_id"], hashed))

    return UserBody.of(await call.change(change))


def _check_not_above(call: Call) -> Transaction[None]:
    """Only owners touch owners."""
    user = yield from rows.live_user(call.path["user_id"])
    if user.role is Role.OWNER:
        call.check(Action.OWNERS)


async def _by_email(call: Call, email: str) -> list[Row]:
    return await call.accounts.database.read(rows.BY_EMAIL(wanted=email))


def routes() -> list[AdminRoute]:
    one = f"{USERS}/{{user_id}}"
    return [
        get(USERS, Action.SEE, list_users),
        post(USERS, Action.USERS, create_user),
        get(one, Action.SEE, retrieve_user),
        post(one, Action.USERS, update_user),
        remove(one, Action.USERS, remove_user),
        post(f"{one}/password", Action.SELF, set_password),
    ]

"""Users, and which projects they belong to. A user who is removed keeps its row and loses memberships, keys, sessions.

Who may do what is asked before (`roles.py`); what must never happen whoever asks is refused here: an organisation
without an owner, two users of one address.
"""

from __future__ import annotations

import re
from dataclasses import replace

from sqlalchemy import bindparam, delete, func, select, update

from nimbos.accounts.projects import checked_name, live_project, now_ms
from nimbos.accounts.roles import ProjectRole, Role
from nimbos.accounts.words import ORGANISATION_ID, OWNER_USER, Changed, Member, User
from nimbos.db import Bound, Row, Statement, Transaction, insert, upsert
from nimbos.db.tables.accounts import api_keys, memberships, projects, sessions, users
from nimbos.errors import Conflict, InvalidRequest, NotFound
from nimbos.types import new_id

_ADDRESS = re.compile(r"[^@\s]{1,64}@[^@\s]{1,190}")

INSERT = insert(users)
BY_ID = Statement(select(users).where(users.c.id == bindparam("wanted"), users.c.removed_ms.is_(None)))
BY_EMAIL = Statement(select(users).where(users.c.live_email == bindparam("wanted")))
BY_LOGIN = Statement(
    select(users).where(
        users.c.removed_ms.is_(None), (users.c.email == bindparam("wanted")) | (users.c.name == bindparam("name"))
    )
)
PAGE = Statement(
    select(users)
    .where(users.c.id > bindparam("after"), users.c.removed_ms.is_(None))
    .order_by(users.c.id)
    .limit(bindparam("most"))
)
_OWNERS = Statement(
    select(func.count().label("count")).where(users.c.role == Role.OWNER.value, users.c.removed_ms.is_(None))
)
_CHANGE = Statement(
    update(users)
    .where(users.c.id == bindparam("of"))
    .values(
        name=bindparam("to_name"),
        role=bindparam("to_role"),
        live_email=bindparam("to_live_email"),
        removed_ms=bindparam("to_removed"),
    )
)
_SET_PASSWORD = Statement(update(users).where(users.c.id == bindparam("of")).values(password_hash=bindparam("to_hash")))
MEMBERS_PAGE = Statement(
    select(memberships, users.c.email, users.c.name)
    .join(users, users.c.id == memberships.c.user_id)
    .where(memberships.c.project_id == bindparam("project"), memberships.c.user_id > bindparam("after"))
    .order_by(memberships.c.user_id)
    .limit(bindparam("most"))
)
MEMBER = Statement(
    select(memberships, users.c.email, users.c.name)
    .join(users, users.c.id == memberships.c.user_id)
    .where(memberships.c.project_id == bindparam("project"), memberships.c.user_id == bindparam("user"))
)
PROJECTS_OF = Statement(
    select(projects.c.id, projects.c.name, memberships.c.role)
    .join(memberships, memberships.c.project_id == projects.c.id)
    .where(memberships.c.user_id == bindparam("user"), projects.c.archived_ms.is_(None))
    .order_by(projects.c.id)
)
JOIN = upsert(memberships, key=("project_id", "user_id"), set=("role",))
_LEAVE = Statement(
    delete(memberships).where(
        memberships.c.project_id == bindparam("project"), memberships.c.user_id == bindparam("user")
    )
)
_LEAVE_ALL = Statement(delete(memberships).where(memberships.c.user_id == bindparam("user")))
_END_SESSIONS = Statement(delete(sessions).where(sessions.c.user_id == bindparam("user")))
_REVOKE_KEYS = Statement(
    update(api_keys)
    .where(
        api_keys.c.owner_kind == "user",
        api_keys.c.owner_id == bindparam("user"),
        api_keys.c.revoked_ms.is_(None),
        (api_keys.c.project_id == bindparam("project")) | (bindparam("everywhere") == 1),
    )
    .values(revoked_ms=bindparam("now"), live_name=None)
)


def live_user(user_id: str) -> Transaction[User]:
    rows = yield BY_ID(wanted=user_id)
    if not rows:
        raise NotFound(f"There is no user {user_id[:100]!r}. `nimbos user list` shows those there are.")
    return User.of(rows[0])


def user_by_email(email: str) -> Transaction[User]:
    rows = yield BY_EMAIL(wanted=email.lower())
    if not rows:
        raise NotFound(f"There is no user {email[:100]!r} here; `nimbos user add` makes one.", param="email")
    return User.of(rows[0])


def create_user(
    email: str, *, role: Role, name: str = "", password_hash: str | None = None, project_id: str | None = None
) -> Transaction[Changed[User]]:
    """`project_id`: where the user is a member from the start.

    Raises: Conflict when there is one of this address; InvalidRequest; NotFound for the project.
    """
    email = checked_email(email)
    if (yield BY_EMAIL(wanted=email)):
        raise Conflict(f"There is a user {email!r} already.")
    user = User(
        id=new_id("user"),
        email=email,
        name=checked_name(name or email),
        role=role,
        has_password=password_hash is not None,
        created_ms=now_ms(),
        removed_ms=None,
    )
    yield insert_of(user, password_hash)
    if project_id is not None:
        yield from live_project(project_id)
        member = ProjectRole.MEMBER.value
        yield JOIN(project_id=project_id, user_id=user.id, role=member, added_ms=user.created_ms)
    return Changed(value=user, action="user.added", target=user.id, project=project_id or "", after=user)


def insert_of(user: User, password_hash: str | None) -> Bound:
    return INSERT(
        id=user.id,
        organisation=ORGANISATION_ID,
        email=user.email,
        live_email=user.email,
        name=user.name,
        role=user.role.value,
        password_hash=password_hash,
        created_ms=user.created_ms,
        removed_ms=user.removed_ms,
    )


def update_user(user_id: str, *, role: Role | None = None, name: str | None = None) -> Transaction[Changed[User]]:
    """Raises: Conflict when no owner would be left."""
    before = yield from live_user(user_id)
    after = replace(before, role=role or before.role, name=before.name if name is None else checked_name(name))
    if before.role is Role.OWNER and after.role is not Role.OWNER:
        yield from _check_other_owner(before)
    yield _changed(after)
    return Changed(value=after, action="user.updated", target=user_id, before=before, after=after)


def remove_user(user_id: str) -> Transaction[Changed[User]]:
    before = yield from live_user(user_id)
    if before.role is Role.OWNER:
        yield from _check_other_owner(before)
    after = replace(before, removed_ms=now_ms())
    yield _changed(after)
    yield _LEAVE_ALL(user=user_id)
    yield _END_SESSIONS(user=user_id)
    yield _REVOKE_KEYS(user=user_id, project="", everywhere=1, now=after.removed_ms)
    return Changed(value=before, action="user.deleted", target=user_id, before=before)


def set_password(user_id: str, password_hash: str | None) -> Transaction[Changed[User]]:
    """Ends all sessions of the user. None: the user cannot log in any more."""
    before = yield from live_user(user_id)
    yield _SET_PASSWORD(of=user_id, to_hash=password_hash)
    yield _END_SESSIONS(user=user_id)
    after = replace(before, has_password=password_hash is not None)
    return Changed(value=after, action="user.updated", target=user_id, before=before, after={"password": "changed"})


def add_member(project_id: str, user: User, role: ProjectRole) -> Transaction[Changed[Member]]:
    """Raises: Conflict when the user belongs to it already."""
    yield from live_project(project_id)
    if (yield MEMBER(project=project_id, user=user.id)):
        raise Conflict(f"{user.email} belongs to this project already.")
    yield JOIN(project_id=project_id, user_id=user.id, role=_checked(role).value, added_ms=now_ms())
    member = yield from member_of(project_id, user.id)
    return Changed(value=member, action="user.added", target=user.id, project=project_id, after=member)


def update_member(project_id: str, user_id: str, role: ProjectRole) -> Transaction[Changed[Member]]:
    yield from live_project(project_id)
    before = yield from member_of(project_id, user_id)
    yield JOIN(project_id=project_id, user_id=user_id, role=_checked(role).value, added_ms=before.added_ms)
    after = replace(before, role=role)
    return Changed(value=after, action="user.updated", target=user_id, project=project_id, before=before, after=after)


def remove_member(project_id: str, user_id: str) -> Transaction[Changed[Member]]:
    """The user's keys of this project die, as far as the user's role does not hold them."""
    yield from live_project(project_id)
    before = yield from member_of(project_id, user_id)
    yield _LEAVE(project=project_id, user=user_id)
    user = yield from live_user(user_id)
    if user.role not in (Role.OWNER, Role.ADMIN):
        yield _REVOKE_KEYS(user=user_id, project=project_id, everywhere=0, now=now_ms())
    return Changed(value=before, action="user.deleted", target=user_id, project=project_id, before=before)


def member_of(project_id: str, user_id: str) -> Transaction[Member]:
    rows = yield MEMBER(project=project_id, user=user_id)
    if not rows:
        raise NotFound(f"The user {user_id[:100]!r} does not belong to this project.")
    return Member.of(rows[0])


def memberships_of(rows: list[Row]) -> list[dict[str, str]]:
    return [{"id": row["id"], "name": row["name"], "role": row["role"]} for row in rows]


def checked_email(email: str) -> str:
    if not _ADDRESS.fullmatch(email) or not email.isprintable():
        raise InvalidRequest(f"{email[:100]!r} is not an e-mail address.", param="email")
    return email.lower()


def _checked(role: ProjectRole) -> ProjectRole:
    if role is ProjectRole.NONE:
        raise InvalidRequest("A user's role in a project is `owner` or `member`.", param="role")
    return role


def _check_other_owner(user: User) -> Transaction[None]:
    if user.id == OWNER_USER:
        raise Conflict("This user is whom the owner's key belongs to; it stays, and stays an owner.")
    (row,) = yield _OWNERS()
    if row["count"] < 2:
        raise Conflict(f"{user.email} is the only owner; make another one first.")


def _changed(user: User) -> Bound:
    return _CHANGE(
        of=user.id,
        to_name=user.name,
        to_role=user.role.value,
        to_live_email=user.email if user.removed_ms is None else None,
        to_removed=user.removed_ms,
    )

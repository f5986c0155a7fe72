"""From a secret to who that is: looked up by hash, kept for a few seconds, noted as used.

A key is good while its project is not archived, it is neither revoked nor expired, and its owner still has a place in
the project. Unknown keys are slowed by the address they come from; a good key passes whatever else that address sent.
"""

from __future__ import annotations

import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import bindparam, select

from nimbos.accounts.keys import BY_DIGEST, owner_has_access, scopes_of
from nimbos.accounts.projects import now_ms
from nimbos.accounts.roles import Role
from nimbos.accounts.secret import digest_of
from nimbos.accounts.slowdown import Slowdown, place_of
from nimbos.accounts.words import (
    ADMIN_SCOPE,
    ORGANISATION_ID,
    OWNER_KEY,
    OWNER_USER,
    Actor,
    Identity,
    Key,
    Project,
)
from nimbos.db import Database, Row, Statement
from nimbos.db.tables.accounts import projects, sessions, users
from nimbos.errors import Overloaded, Unauthorized
from nimbos.types import Account

KEPT_S = 3.0  # how long a change made by another server may go unseen
_KEPT_MAX = 10_000
_FREE_FAILURES = 20
_LONGEST_WAIT_S = 60.0
_FORGET_S = 300.0

_PROJECT = Statement(select(projects).where(projects.c.id == bindparam("wanted")))
_SESSION = Statement(
    select(users, sessions.c.expires_ms, sessions.c.address)
    .join(sessions, sessions.c.user_id == users.c.id)
    .where(sessions.c.digest == bindparam("digest"), users.c.removed_ms.is_(None))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfiguredKey:
    """A key that stands outside the database: the owner's, or one of `keys.toml`."""

    digest: bytes
    id: str
    name: str
    project_id: str
    scopes: frozenset[str]
    role: Role | None


@dataclass(slots=True)
class _Kept:
    identity: Identity
    until_s: float
    expires_ms: int | None


class Authentication:
    """`authenticate` and `session` are what `api/access.py` asks. `forget` is called with every change made here."""

    def __init__(
        self,
        database: Database,
        configured: tuple[ConfiguredKey, ...],
        *,
        clock: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._database = database
        self._configured = configured
        self._clock = clock
        self._now_ms = now_ms
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._changes = 0
        self._slowdown = Slowdown(free=_FREE_FAILURES, longest_s=_LONGEST_WAIT_S, forget_s=_FORGET_S)
        self.used: dict[str, int] = {}

    async def authenticate(self, secret: str, *, address: str = "") -> Identity:
        """Raises: Unauthorized; Overloaded (limit "unknown keys") for an address that keeps guessing; what the
        database raises."""
        digest = digest_of(secret)
        identity = self._remembered(digest)
        if identity is None:
            identity = await self._found(digest, address)
        if identity.actor.id != OWNER_KEY:
            self.used[identity.actor.id] = self._now_ms()
        return identity

    async def session(self, token: str) -> Identity:
        """Raises: Unauthorized."""
        digest = digest_of(token)
        identity = self._remembered(digest)
        if identity is not None:
            return identity
        changes = self._changes
        rows = await self._database.read(_SESSION(digest=digest))
        if not rows or rows[0]["expires_ms"] <= self._now_ms():
            raise Unauthorized("This session has ended. Log in again.")
        identity = _session_identity(rows[0])
        self._keep(digest, identity, rows[0]["expires_ms"], changes)
        return identity

    def forget(self) -> None:
        """Nothing that was looked up before counts any more, also what is being looked up right now."""
        self._changes += 1
        self._kept.clear()

    def _remembered(self, digest: bytes) -> Identity | None:
        kept = self._kept.get(digest)
        if kept is None:
            return None
        if kept.until_s <= self._clock() or (kept.expires_ms is not None and kept.expires_ms <= self._now_ms()):
            del self._kept[digest]
            return None
        return kept.identity

    def _keep(self, digest: bytes, identity: Identity, expires_ms: int | None, changes: int) -> None:
        if changes != self._changes:
            return
        self._kept[digest] = _Kept(identity=identity, until_s=self._clock() + KEPT_S, expires_ms=expires_ms)
        while len(self._kept) > _KEPT_MAX:
            self._kept.popitem(last=False)

    async def _found(self, digest: bytes, address: str) -> Identity:
        changes = self._changes
        configured = self._configured_key(digest)
        if configured is not None:
            identity = _configured_identity(configured, await self._project(configured.project_id))
            self._keep(digest, identity, None, changes)
            return identity
        rows = await self._database.read(BY_DIGEST(digest=digest))
        if not rows:
            raise self._unknown(place_of(address))
        key = Key.of(rows[0])
        _check_alive(key, rows[0], self._now_ms())
        identity = _key_identity(key, rows[0], await self._project(key.project_id))
        self._keep(digest, identity, key.expires_ms, changes)
        return identity

    def _configured_key(self, digest: bytes) -> ConfiguredKey | None:
        found = None
        for key in self._configured:  # always all of them: how long it takes tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    async def _project(self, project_id: str) -> Project:
        (row,) = await self._database.read(_PROJECT(wanted=project_id))
        project = Project.of(row)
        if project.archived_ms is not None:
            raise Unauthorized(f"This key belongs to the project {project.name!r}, which is archived.")
        return project

    def _unknown(self, place: str) -> Unauthorized | Overloaded:
        wait_s = self._slowdown.failed(place, self._clock())
        if wait_s:
            count = self._slowdown.count(place)
            return Overloaded(limit="unknown keys", value=_FREE_FAILURES, used=count, retry_after_s=wait_s)
        return Unauthorized("This key is not known here. `nimbos up` prints where the owner's key is kept.")


def _check_alive(key: Key, row: Row, now: int) -> None:
    """Raises: Unauthorized saying why a key that was good is so no more."""
    if key.revoked_ms is not None:
        raise Unauthorized(f"The key {key.name!r} was revoked at {_moment(key.revoked_ms)}.")
    if key.expires_ms is not None and key.expires_ms <= now:
        raise Unauthorized(f"The key {key.name!r} expired at {_moment(key.expires_ms)}.")
    if not owner_has_access(key, row):
        raise Unauthorized(f"The owner of the key {key.name!r} does not belong to its project any more.")


def account_of_key(key: Key, row: Row, project: Project) -> Account:
    return _account(
        project,
        key=key.id,
        key_name=key.name,
        user=key.owner_id if key.owner_kind == "user" else "",
        scopes=scopes_of(key, row),
        models=key.grant.models,
        routes=key.grant.routes,
        weight=key.grant.weight,
    )


def _key_identity(key: Key, row: Row, project: Project) -> Identity:
    by_user = key.owner_kind == "user"
    account = account_of_key(key, row, project)
    actor = Actor(
        kind="api_key",
        id=key.id,
        user=key.owner_id if by_user else "",
        email=row["user_email"] or "",
        service_account="" if by_user else key.owner_id,
    )
    role = None
    if ADMIN_SCOPE in key.grant.scopes:
        role = Role(row["user_role"]) if by_user else Role.ADMIN
    return Identity(account=account, actor=actor, role=role)


def _configured_identity(key: ConfiguredKey, project: Project) -> Identity:
    owner = key.id == OWNER_KEY
    user = OWNER_USER if owner else ""
    account = _account(project, key=key.id, key_name=key.name, user=user, scopes=key.scopes)
    return Identity(account=account, actor=Actor(kind="api_key", id=key.id, user=user), role=key.role)


def _session_identity(row: Row) -> Identity:
    """A session administers and does not ask: its account has no key to charge."""
    account = Account(id="", name="", organisation=ORGANISATION_ID, user=row["id"])
    actor = Actor(kind="session", id=row["id"], user=row["id"], email=row["email"], address=row["address"])
    return Identity(account=account, actor=actor, role=Role(row["role"]))


def _account(
    project: Project,
    *,
    key: str,
    key_name: str,
    user: str,
    scopes: frozenset[str],
    models: tuple[str, ...] | None = None,
    routes: tuple[str, ...] | None = None,
    weight: float = 1.0,
) -> Account:
    """What the key may do, and no more than its project may."""
    allowed = frozenset(models) if models is not None else None
    denied = frozenset(project.models) if project.model_mode == "deny_list" else frozenset()
    if project.model_mode == "allow_list":
        allowed = frozenset(project.models) if allowed is None else allowed & frozenset(project.models)
    return Account(
        id=project.id,
        name=project.name,
        organisation=ORGANISATION_ID,
        key=key,
        key_name=key_name,
        user=user,
        scopes=scopes,
        models=allowed,
        denied_models=denied,
        routes=frozenset(routes) if routes is not None else None,
        weight=weight * project.weight,
    )


def _moment(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

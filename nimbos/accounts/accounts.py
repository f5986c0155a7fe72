"""The door to accounts: who a secret is, and every change of who there is, written down with it.

A change is a transaction (`projects.py`, `people.py`, `keys.py`, or another part's) that returns `Changed`; `change`
runs it with its row of the audit log, and forgets what was looked up before, so that it holds at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import TypeVar, cast

import structlog

from nimbos.accounts import audit, people, projects
from nimbos.accounts.authentication import Authentication, ConfiguredKey
from nimbos.accounts.keys import CODE_SCOPE, USED
from nimbos.accounts.login import Login, Passwords, Session, close_session
from nimbos.accounts.projects import now_ms
from nimbos.accounts.roles import Role
from nimbos.accounts.secret import digest_of
from nimbos.accounts.words import (
    ADMIN_SCOPE,
    DEFAULT_PROJECT,
    LOCAL,
    ORGANISATION_ID,
    OWNER_KEY,
    OWNER_USER,
    Actor,
    Changed,
    Identity,
    Project,
    User,
)
from nimbos.db import Database, Transaction
from nimbos.errors import Conflict, NimbosError
from nimbos.keys import FileKey, OwnerKey

T = TypeVar("T")

NOTED_EVERY_S = 30.0  # last uses are written so often; so much of them is lost at a crash
OWNER_EMAIL = "owner@localhost"

_log = structlog.get_logger(__name__)


class Accounts:
    """Whoever opened it closes it, before the database."""

    def __init__(self, database: Database, authentication: Authentication, passwords: Passwords, login: Login) -> None:
        self.database = database
        self.passwords = passwords
        self.login = login
        self._authentication = authentication
        self._noting: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        database: Database,
        *,
        owner: OwnerKey | None = None,
        file_keys: tuple[FileKey, ...] = (),
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = now_ms,
        passwords: Passwords | None = None,
    ) -> Accounts:
        """Makes what must always be there: the default project, its owner, a project for each account of `keys.toml`.
        Without `owner` no key of the environment works: a command that reads the database itself needs none. `clock`,
        `wall_ms` and `passwords` are for tests."""
        await database.run(_bootstrap, durable=True)
        configured = [await _configured(database, key) for key in file_keys]
        if owner is not None:
            configured.append(_owners(owner))
        passwords = passwords or Passwords()
        authentication = Authentication(database, tuple(configured), clock=clock, now_ms=wall_ms)
        return cls(database, authentication, passwords, Login(database, passwords, clock=clock, now_ms=wall_ms))

    async def authenticate(self, secret: str, *, address: str = "") -> Identity:
        """Who a key belongs to, and what it may do.

        Raises: Unauthorized; Overloaded for an address that keeps guessing; StorageUnavailable.
        """
        if self._noting is None:
            self._noting = asyncio.create_task(self._note_uses(), name="last uses of keys")
        return await self._authentication.authenticate(secret, address=address)

    async def session(self, token: str) -> Identity:
        """Raises: Unauthorized for one that has ended, or never was; StorageUnavailable."""
        return await self._authentication.session(token)

    async def change(self, actor: Actor, begin: Callable[[], Transaction[Changed[T]]]) -> T:
        """Runs a change and its row of the audit log as one, on the disk before this returns."""
        at_ms = now_ms()
        try:
            return await self.database.run(lambda: audit.audited(actor, begin(), at_ms=at_ms), durable=True)
        finally:
            self._authentication.forget()

    async def read(self, begin: Callable[[], Transaction[T]]) -> T:
        """Runs a transaction that only reads: each of its queries sees what was committed before it."""
        transaction = begin()
        try:
            query = next(transaction)
            while True:
                query = transaction.send(await self.database.read(query))
        except StopIteration as end:
            return cast("T", end.value)
        finally:
            transaction.close()

    async def log_in(self, name: str, password: str, *, address: str) -> Session:
        """Raises: Unauthorized, Overloaded."""
        user = await self.login.check(name, password, address=address)
        session, begin = self.login.open_session(user, address=address)
        await self.change(_at_console(user, address), begin)
        return session

    async def log_out(self, token: str, actor: Actor) -> None:
        await self.change(actor, lambda: close_session(digest_of(token), actor.user))

    async def verify_audit(self) -> audit.Checked:
        """Walks the whole audit log, without holding it in memory."""
        heads = await self.database.read(audit.HEAD(organisation=ORGANISATION_ID))
        async with aclosing(self.database.stream(audit.ALL())) as rows:  # type: ignore[type-var]
            return await audit.verify(rows, heads[0] if heads else None)

    async def note_uses(self) -> None:
        """Writes when keys were last used; what cannot be written now is tried again."""
        used, self._authentication.used = self._authentication.used, {}
        if not used:
            return

        def write() -> Transaction[None]:
            for key, at in used.items():
                yield USED(of=key, at=at)

        try:
            await self.database.run(write)
        except NimbosError:
            self._authentication.used = {**used, **self._authentication.used}
            raise

    async def close(self) -> None:
        if self._noting is not None:
            self._noting.cancel()
            await asyncio.gather(self._noting, return_exceptions=True)
        with contextlib.suppress(NimbosError):
            await self.note_uses()

    async def _note_uses(self) -> None:
        while True:
            await asyncio.sleep(NOTED_EVERY_S)
            try:
                await self.note_uses()
            except NimbosError as error:
                _log.warning("accounts.uses_not_noted", code=error.code)


def _bootstrap() -> Transaction[None]:
    yield from audit.begin()
    if not (yield projects.BY_ID(wanted=DEFAULT_PROJECT)):
        make = projects.create_project("default", project_id=DEFAULT_PROJECT)
        yield from audit.audited(LOCAL, make, at_ms=now_ms())
    if not (yield people.BY_ID(wanted=OWNER_USER)):
        yield from audit.audited(LOCAL, _make_owner(), at_ms=now_ms())


def _make_owner() -> Transaction[Changed[User]]:
    user = User(
        id=OWNER_USER,
        email=OWNER_EMAIL,
        name="owner",
        role=Role.OWNER,
        has_password=False,
        created_ms=now_ms(),
        removed_ms=None,
    )
    yield people.insert_of(user, None)
    return Changed(value=user, action="user.added", target=user.id, after=user)


async def _configured(database: Database, key: FileKey) -> ConfiguredKey:
    """A project that was archived stays so: its keys died with it, whatever the file says."""

    def project() -> Transaction[Project]:
        rows = (yield projects.BY_NAME(wanted=key.account)) or (yield projects.ARCHIVED_BY_NAME(wanted=key.account))
        if rows:
            return Project.of(rows[0])
        return (yield from audit.audited(LOCAL, projects.create_project(key.account), at_ms=now_ms()))

    try:
        found = await database.run(project, durable=True)
    except Conflict:  # another server that starts was faster
        found = await database.run(project, durable=True)
    role = Role.ADMIN if ADMIN_SCOPE in key.scopes else None
    return ConfiguredKey(
        digest=key.digest,
        id=f"key_file_{key.name}",
        name=key.name,
        project_id=found.id,
        scopes=key.scopes | {CODE_SCOPE} if ADMIN_SCOPE in key.scopes else key.scopes,
        role=role,
    )


def _owners(owner: OwnerKey) -> ConfiguredKey:
    return ConfiguredKey(
        digest=digest_of(owner.secret),
        id=OWNER_KEY,
        name="owner",
        project_id=DEFAULT_PROJECT,
        scopes=frozenset({ADMIN_SCOPE, CODE_SCOPE}),
        role=Role.OWNER,
    )


def _at_console(user: User, address: str) -> Actor:
    return Actor(kind="session", id=user.id, user=user.id, email=user.email, address=address)

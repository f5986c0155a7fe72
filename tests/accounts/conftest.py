"""Accounts on both databases, with a clock that tests move."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import argon2
import pytest

from nimbos.accounts import Accounts, Role
from nimbos.accounts.keys import create_key
from nimbos.accounts.login import Passwords
from nimbos.accounts.people import User, create_user
from nimbos.accounts.projects import create_project
from nimbos.accounts.secret import new_secret
from nimbos.accounts.words import DEFAULT_PROJECT, LOCAL, OWNER_USER, Grant, Key, OwnerKind, Project
from nimbos.db import Database
from nimbos.keys import OwnerKey

OWNER = OwnerKey(secret="nb-the-owners", file=None)


@dataclass
class Clock:
    seconds: float = 1000.0
    wall_ms: int = 1_800_000_000_000

    def __call__(self) -> float:
        return self.seconds

    def wall(self) -> int:
        return self.wall_ms


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def accounts(database: Database, clock: Clock) -> AsyncIterator[Accounts]:
    opened = await Accounts.open(database, owner=OWNER, clock=clock, wall_ms=clock.wall, passwords=quick_passwords())
    yield opened
    await opened.close()


def quick_passwords() -> Passwords:
    """The real thing with a small cost, so that tests take no minutes."""
    return Passwords(argon2.PasswordHasher(time_cost=1, memory_cost=64, parallelism=1))


async def make_user(accounts: Accounts, email: str, role: Role, *, project_id: str | None = None) -> User:
    return await accounts.change(LOCAL, lambda: create_user(email, role=role, project_id=project_id))


async def make_key(
    accounts: Accounts,
    name: str = "laptop",
    *,
    project_id: str = DEFAULT_PROJECT,
    owner_kind: OwnerKind = "user",
    owner_id: str = OWNER_USER,
    grant: Grant | None = None,
    expires_ms: int | None = None,
) -> tuple[str, Key]:
    """The secret and the key."""
    secret = new_secret()
    key = await accounts.change(
        LOCAL,
        lambda: create_key(
            name=name,
            secret=secret,
            project_id=project_id,
            owner_kind=owner_kind,
            owner_id=owner_id,
            grant=grant or Grant(),
            expires_ms=expires_ms,
        ),
    )
    return secret.value, key


async def make_project(accounts: Accounts, name: str) -> Project:
    return await accounts.change(LOCAL, lambda: create_project(name))

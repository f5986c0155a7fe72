"""What a key may do now that asked for something earlier: keys change while a batch waits."""

from __future__ import annotations

import time

import msgspec

from nimbos.accounts.authentication import account_of_key
from nimbos.accounts.keys import OWNED_BY_ID, owner_has_access
from nimbos.accounts.projects import BY_ID
from nimbos.accounts.words import Key, Project
from nimbos.db import Database
from nimbos.errors import Unauthorized
from nimbos.types import Account


class Authority:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def check(self, account: Account) -> Account:
        """The account as it is now. A key of a file or of the environment has no row: it holds, and may ask what its
        project may. Raises: Unauthorized."""
        projects = [Project.of(row) for row in await self._database.read(BY_ID(wanted=account.id))]
        for project in projects:
            if project.archived_ms is not None:
                raise Unauthorized(f"The project {project.name!r} is archived.")
        for row in await self._database.read(OWNED_BY_ID(wanted=account.key)):
            key = Key.of(row)
            whose = f"The key {key.name!r}, which asked for this,"
            if key.revoked_ms is not None:
                raise Unauthorized(f"{whose} was revoked.")
            if key.expires_ms is not None and key.expires_ms <= time.time_ns() // 1_000_000:
                raise Unauthorized(f"{whose} has expired.")
            if not owner_has_access(key, row):
                raise Unauthorized(f"{whose} has an owner who does not belong to its project any more.")
            return account_of_key(key, row, projects[0])
        for project in projects:
            listed = frozenset(project.models)
            return msgspec.structs.replace(
                account,
                models=listed if project.model_mode == "allow_list" else None,
                denied_models=listed if project.model_mode == "deny_list" else frozenset(),
            )
        return account

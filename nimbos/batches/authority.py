"""Whether the key that submitted a batch may still ask: a batch outlives requests, and keys end meanwhile."""

from __future__ import annotations

import time

from sqlalchemy import bindparam, select

from nimbos.db import Database, Statement
from nimbos.db.tables.accounts import api_keys, projects
from nimbos.errors import Unauthorized
from nimbos.types import Account

_KEY = Statement(
    select(api_keys.c.name, api_keys.c.revoked_ms, api_keys.c.expires_ms).where(api_keys.c.id == bindparam("key"))
)
_PROJECT = Statement(select(projects.c.name, projects.c.archived_ms).where(projects.c.id == bindparam("project")))


class Authority:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def check(self, account: Account) -> Account:
        """The account as it was when the batch was submitted; a key of a file or of the environment has no row, and
        holds. Raises: Unauthorized."""
        now_ms = time.time_ns() // 1_000_000
        for row in await self._database.read(_KEY(key=account.key)):
            if row["revoked_ms"] is not None:
                raise Unauthorized(f"The key {row['name']!r}, which submitted this batch, was revoked.")
            if row["expires_ms"] is not None and row["expires_ms"] <= now_ms:
                raise Unauthorized(f"The key {row['name']!r}, which submitted this batch, has expired.")
        for row in await self._database.read(_PROJECT(project=account.id)):
            if row["archived_ms"] is not None:
                raise Unauthorized(f"The project {row['name']!r} is archived.")
        return account

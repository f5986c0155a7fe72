"""Names for ids in reports, also of what is revoked or archived."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import bindparam, select

from nimbos.accounts.words import OWNER_KEY
from nimbos.db import Database, Statement
from nimbos.db.tables.accounts import api_keys, projects

_FILE_KEY = "key_file_"
_KEY = Statement(select(api_keys.c.name).where(api_keys.c.id == bindparam("wanted")))
_PROJECT = Statement(select(projects.c.name).where(projects.c.id == bindparam("wanted")))


async def names_of(database: Database, kind: str, ids: Sequence[str]) -> dict[str, str]:
    """`kind`: key or project. Ids that nobody knows are left out."""
    query = _KEY if kind == "key" else _PROJECT
    names = {}
    for wanted in ids:
        if wanted == OWNER_KEY:
            names[wanted] = "owner"
        elif wanted.startswith(_FILE_KEY):
            names[wanted] = wanted.removeprefix(_FILE_KEY)
        elif rows := await database.read(query(wanted=wanted)):
            names[wanted] = rows[0]["name"]
    return names

"""How much a project keeps of responses and conversations, and the bound on that.

What is there is summed up for all projects at once, about once a minute, and more seldom where that takes long; what
this server adds in between counts on top. So what was deleted counts a little longer, and several servers together can
pass the bound by what each of them adds within that time. Bytes count once however often they are said, as that is how
they are kept (`segments.py`), and every row counts besides.
"""

from __future__ import annotations

import asyncio

from sqlalchemy import BigInteger, bindparam, func, select, union_all

from nimbos.db import Database, Statement
from nimbos.db.tables.responses import conversations, responses
from nimbos.db.tables.responses import response_items as items
from nimbos.errors import NimbosError, PayloadTooLarge

PROJECT_BYTES = 10 << 30
ROW_BYTES = 1024  # of the database, for an item, a response or a conversation
_REST_S = 60.0
_REST_SHARE = 100  # times as long as summing up took, it is not done again


class TooMuchKept(PayloadTooLarge):
    def __init__(self, *, have: int, limit: int) -> None:
        NimbosError.__init__(
            self,
            f"The responses and conversations of this project take {have} bytes, with this one, and may take {limit}. "
            "Delete some of them (for a minute or two they still count), or send `store: false` and no `conversation`.",
            param="store",
        )


class Room:
    def __init__(self, database: Database, *, project_bytes: int = PROJECT_BYTES) -> None:
        self._database = database
        self._project_bytes = project_bytes
        self._kept: dict[str, int] = {}
        self._added: dict[str, int] = {}  # since what is there was summed up
        self._due = 0.0

    def check(self, account: str, size_bytes: int) -> None:
        """Whether so much more may be kept. Raises: TooMuchKept."""
        have = self._kept.get(account, 0) + self._added.get(account, 0) + size_bytes
        if have > self._project_bytes:
            raise TooMuchKept(have=have, limit=self._project_bytes)

    def add(self, account: str, size_bytes: int, *, rows: int) -> None:
        """So much is kept from now on."""
        self._added[account] = self._added.get(account, 0) + size_bytes + rows * ROW_BYTES

    async def sum_up(self) -> None:
        """When it is time. Raises: StorageUnavailable."""
        now = asyncio.get_running_loop().time
        began = now()
        if began < self._due:
            return
        counted = dict(self._added)
        rows = await self._database.read(_SUMS(row_bytes=ROW_BYTES))
        self._kept = {row["account"]: int(row["size_bytes"]) for row in rows}
        left = {account: size - counted.get(account, 0) for account, size in self._added.items()}
        self._added = {account: size for account, size in left.items() if size > 0}
        self._due = began + max(_REST_S, (now() - began) * _REST_SHARE)


_ROW = bindparam("row_bytes", type_=BigInteger)
_EACH = union_all(
    select(func.max(items.c.account).label("account"), func.max(items.c.size_bytes).label("size_bytes")).group_by(
        items.c.hash
    ),
    select(items.c.account, func.count() * _ROW).group_by(items.c.account),
    select(responses.c.account, func.count() * _ROW).group_by(responses.c.account),
    select(conversations.c.account, func.sum(func.length(conversations.c.metadata) + _ROW)).group_by(
        conversations.c.account
    ),
).subquery()
_SUMS = Statement(select(_EACH.c.account, func.sum(_EACH.c.size_bytes).label("size_bytes")).group_by(_EACH.c.account))

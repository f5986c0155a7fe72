"""How much a project keeps of responses and conversations, and the bound on that.

What is there is summed up before a project adds to it for the first time since the start, then about once a minute for
each project that does, and more seldom where that takes long; what this server adds in between counts on top. So what
was deleted counts a little longer, and several servers together can pass the bound by what each of them adds within
that time. Bytes count once however often they are said, as that is how they are kept (`segments.py`), and every item,
response and conversation counts besides.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from sqlalchemy import Text, bindparam, func, select

from nimbos.db import Database, Statement
from nimbos.db.tables.responses import response_items as items
from nimbos.errors import NimbosError, PayloadTooLarge

PROJECT_BYTES = 10 << 30
ROW_BYTES = 1024  # of the database, for an item, a response or a conversation
_REST_S = 60.0
_REST_SHARE = 20  # times as long as summing up took, it is not done again
_AT_ONCE = 2  # of the few who can read a database


class TooMuchKept(PayloadTooLarge):
    def __init__(self, *, have: int, limit: int) -> None:
        NimbosError.__init__(
            self,
            f"The responses and conversations of this project take {have} bytes, with this one, and may take {limit}. "
            "Delete some of them (for a minute or two they still count), or send `store: false` and no `conversation`.",
            param="store",
        )


@dataclass(slots=True, eq=False)
class _Kept:
    """`added`: since what is there was summed up. `refused`: it may be less by now. `due`: not summed up before; None
    where it never was."""

    size_bytes: int = 0
    added: int = 0
    refused: bool = False
    due: float | None = None
    summing: asyncio.Task[None] | None = None


class Room:
    def __init__(self, database: Database, *, project_bytes: int = PROJECT_BYTES) -> None:
        self._database = database
        self._project_bytes = project_bytes
        self._projects: dict[str, _Kept] = {}
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def check(self, account: str, size_bytes: int) -> None:
        """Whether so much more may be kept. The first for a project waits until what it keeps is known.

        Raises: TooMuchKept, StorageUnavailable.
        """
        kept = self._of(account)
        if kept.due is None:
            await self._known(account, kept)
        have = kept.size_bytes + kept.added + size_bytes
        if have > self._project_bytes:
            kept.refused = True
            raise TooMuchKept(have=have, limit=self._project_bytes)

    def add(self, account: str, size_bytes: int, *, rows: int) -> None:
        """So much is kept from now on."""
        self._of(account).added += size_bytes + rows * ROW_BYTES

    async def sum_up(self) -> None:
        """For each project where it is time. Raises: StorageUnavailable."""
        now = asyncio.get_running_loop().time
        for account, kept in list(self._projects.items()):
            if (kept.added or kept.refused) and (kept.due is None or now() >= kept.due):
                await self._known(account, kept)

    async def _known(self, account: str, kept: _Kept) -> None:
        """One sum for all who wait for it; it goes on where they leave, as they would only come again."""
        if kept.summing is None or kept.summing.done():
            kept.summing = asyncio.create_task(self._sum(account, kept), name=f"sum of {account}")
        await asyncio.shield(kept.summing)

    async def _sum(self, account: str, kept: _Kept) -> None:
        now = asyncio.get_running_loop().time
        async with self._places:
            began, counted = now(), kept.added
            (row,) = await self._database.read(_SUM(account=account))
            kept.size_bytes = int(row["size_bytes"] or 0) + int(row["rows"] or 0) * ROW_BYTES
            kept.added -= counted
            kept.refused = False
            kept.due = now() + max(_REST_S, (now() - began) * _REST_SHARE)

    def _of(self, account: str) -> _Kept:
        return self._projects.setdefault(account, _Kept())


_EACH = (
    select(func.max(items.c.size_bytes).label("size_bytes"), func.count().label("rows"))
    .where(items.c.account == bindparam("account", type_=Text))
    .group_by(items.c.hash)
    .subquery()
)
_SUM = Statement(select(func.sum(_EACH.c.size_bytes).label("size_bytes"), func.sum(_EACH.c.rows).label("rows")))

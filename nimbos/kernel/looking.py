"""What anyone with an account may see of its processes: heads, families, events, what they say while they say it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractContextManager, aclosing

import msgspec

from nimbos.db import Database
from nimbos.errors import NotReady
from nimbos.kernel import heads, mailbox
from nimbos.kernel.bells import Bells, Delta, Follower
from nimbos.kernel.cost import Cost, cost_of
from nimbos.kernel.events import Event
from nimbos.kernel.log import Log
from nimbos.kernel.processes import Head, head_of, missing
from nimbos.kernel.segments import Segments
from nimbos.kernel.words import State
from nimbos.types import Account

POLL_S = 1.0  # other servers ring no bell here
EVENTS_MAX = 1_000
_ENDS = frozenset({"model.done", "model.failed", "proc.exited"})


class Looking:
    """Everywhere: NotFound for a process of another account."""

    def __init__(self, database: Database, log: Log, segments: Segments, bells: Bells) -> None:
        self.database = database
        self.log = log
        self.segments = segments
        self.bells = bells

    async def find(self, account: Account, pid: str) -> Head:
        """Raises: NotFound."""
        rows = await self.database.read(heads.one(pid))
        if not rows or rows[0]["account"] != account.id:
            raise missing(pid)
        return head_of(rows[0])

    async def tree(self, account: Account, pid: str, *, after: str = "", limit: int | None = None) -> list[Head]:
        """The process and all below it, parents before children. `after`: the last of the page before. `limit`: no more
        than that; None: all of it. Raises: NotFound."""
        await self.find(account, pid)
        last = await self.find(account, after) if after else None
        found: list[Head] = []
        while limit is None or len(found) < limit:
            most = heads.FAMILY_PAGE if limit is None else min(heads.FAMILY_PAGE, limit - len(found))
            page = heads.family(pid, after=found[-1] if found else last, most=most)
            rows = await self.database.read(page)
            found += map(head_of, rows)
            if len(rows) < most:
                break
        return found

    async def cost(self, account: Account, pid: str) -> Cost:
        """Raises: NotFound."""
        await self.find(account, pid)
        return await cost_of(self.database, pid)

    async def events(self, account: Account, pid: str, *, after: int = 0, limit: int = EVENTS_MAX) -> list[Event]:
        """Raises: NotFound."""
        await self.find(account, pid)
        return await self.log.read(pid, after=after, limit=min(limit, EVENTS_MAX))

    async def was_sent(self, pid: str, *, source: str, external_id: str) -> bool:
        """Whether this very signal was put into the mailbox of a process of one's own before."""
        return bool(await self.database.read(mailbox.KNOWN(process=pid, source=source, external_id=external_id)))

    async def text(self, account: Account, hash: str) -> bytes:
        """A segment's content. Raises: NotFound."""
        return await self.segments.get_bytes(account.id, hash)

    async def follow(self, account: Account, pid: str, *, after: int = 0) -> AsyncGenerator[Event | Delta, None]:
        """The events after `after` as they come, and what running generations say meanwhile, until the process is
        done. Close the iterator (`contextlib.aclosing`). Raises: NotFound; NotReady when the server stops."""
        await self.find(account, pid)
        with self.bells.follow(pid) as follower:
            while True:
                follower.appended = False
                head = await self.find(account, pid)  # before its events: what is done writes none any more
                while events := await self.log.read(pid, after=after):
                    for event in events:
                        after = event.seq
                        for delta in _told_by(event, follower):
                            yield delta
                        yield event
                if head.state is State.DONE and after >= head.seq:
                    return
                if self.bells.leaving:
                    raise NotReady("This server is shutting down. Go on behind the last event in a moment.")
                async with aclosing(_said(follower)) as said:
                    async for delta in said:
                        yield delta

    def watching(self, pid: str) -> AbstractContextManager[None]:
        """A person looks at the process for as long as this lasts."""
        return self.bells.watching(pid)

    async def list(
        self,
        account: Account,
        *,
        limit: int = 100,
        after: str = "",
        states: Iterable[State] = (),
        prefix: str = "",
    ) -> list[Head]:
        """Newest first, finished ones included. `after`: the last of the page before. `states`: those alone.
        `prefix`: those whose ids begin so."""
        page = heads.page(account.id, after=after, limit=limit, states=tuple(states), prefix=prefix)
        return [head_of(row) for row in await self.database.read(page)]


def _told_by(event: Event, follower: Follower) -> list[Delta]:
    """What is to be told before this event: of an answer that ends with it, or of a process that does."""
    if event.kind not in _ENDS or not follower.deltas:
        return []
    ended = msgspec.json.decode(event.body).get("ask_id")  # None for a process, with which all answers end
    told = [delta for delta in follower.deltas if ended in (None, delta.ask_id)]
    left = [delta for delta in follower.deltas if ended not in (None, delta.ask_id)]
    follower.deltas.clear()
    follower.deltas.extend(left)
    return told


async def _said(follower: Follower) -> AsyncGenerator[Delta, None]:
    """Until there may be new events, which go first: one of them may begin the answer that says it."""
    while not follower.appended:
        if follower.deltas:
            yield follower.deltas.popleft()
            continue
        follower.news.clear()
        try:
            async with asyncio.timeout(POLL_S):
                await follower.news.wait()
        except TimeoutError:
            return
